"""Where new tokens stand: what an op needs to know besides the arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Array = Any


@dataclass(frozen=True)
class Positions:
    """Where the new tokens of each sequence stand.

    All of it is known on the host: a backend may take a shorter way without asking the device.

    Attributes
    ----------
    host
        NumPy integers [B, T], rising by one along T (in a trace, what stands for them). A sequence
        with fewer than T new tokens repeats its last token at its last position: the same values
        are computed and written again, so padding needs no mask, and column T-1 is every sequence's
        last token.
    stop
        S: how many positions the longest sequence fills, these tokens included.
    aligned
        True if all sequences are equally long, so that a row is stop-T ... stop-1.
    bring
        What brings `host` to the device, when it is asked for there: `Backend.asarray`.
    """

    host: Array
    stop: int
    aligned: bool
    bring: Callable[[Array], Array]

    @cached_property
    def index(self) -> Array:
        """`host` on the device, in its default integers."""
        return self.bring(self.host)
