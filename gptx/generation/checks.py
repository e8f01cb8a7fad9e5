"""Checks of values of any type."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np

from gptx.errors import ParameterError, argument, shown


def is_int(value: object) -> bool:
    """Return True for a whole number, NumPy's included, but False for a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Return True for a number, NumPy's included, but False for a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_bool(name: str, value: Any) -> None:
    """Raise ParameterError unless the value of an option is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ParameterError(f"{argument(name)} is {shown(value)}, expected True or False")


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return the whole number of an option; raise ParameterError for another value."""
    if not is_int(value) or not least <= value < 2**63:
        raise ParameterError(
            f"{argument(name)} is {shown(value)}, expected a whole number of at least {least}"
        )
    return int(value)
