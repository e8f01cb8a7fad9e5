"""Checks of values of any type, and their form in messages."""

from __future__ import annotations

import numpy as np
import pytest

from gptx.errors import MAX_SHOWN_CHARACTERS, ParameterError, shown
from gptx.generation.checks import check_bool, is_int, is_real
from tests.support.cli import raises_error


@pytest.mark.parametrize(
    ("value", "int_", "real"),
    [
        (3, True, True),
        (np.int32(3), True, True),
        (3.0, False, True),
        (np.float16(3), False, True),
        (True, False, False),
        ("3", False, False),
        (None, False, False),
        (3j, False, False),
    ],
)
def test_kinds_of_numbers(value: object, int_: bool, real: bool) -> None:
    assert (is_int(value), is_real(value)) == (int_, real)


def test_a_bool_is_one_of_python_or_numpy() -> None:
    check_bool("compile", True)
    check_bool("compile", np.bool_(False))
    for value, text in ((1, "1"), (None, "None"), ("yes", "'yes'")):
        with raises_error(ParameterError, f"compile is {text}, expected True or False"):
            check_bool("compile", value)


def test_a_value_is_shown_in_one_short_line() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert shown(np.ones((2, 2))) == "array([[1., 1.], [1., 1.]])"
    assert shown("x" * 100) == "'" + "x" * (MAX_SHOWN_CHARACTERS - 1)
    assert shown(10**5000) == "too long (int)"
