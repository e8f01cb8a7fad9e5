"""Positions of the new tokens: the argument of an op besides arrays and numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Array = Any


@dataclass(frozen=True)
class Positions:
    """Positions of the T new tokens of each of B sequences.

    All values are on the host, so a backend selects a faster path without a read from the device.

    Attributes
    ----------
    host
        NumPy integers [B, T], increasing by one along T; in a trace, a `Node`. A sequence with
        fewer than T new tokens repeats its last token at its last position. Repeats compute and
        write the same values, so padding needs no mask; column T - 1 has the last token of every
        sequence.
    stop
        S: number of positions that the longest sequence fills, the new tokens included.
    aligned
        True if all sequences have the same length; then each row is stop - T, ..., stop - 1.
    asarray
        `Backend.asarray`, which copies `host` to the device on demand.
    slots
        Slot of each sequence in the cache, NumPy integers [B]; None if sequence b has slot b.
    counts
        Number of new tokens of each sequence, NumPy integers [B]; None if all have T.
    """

    host: Array
    stop: int
    aligned: bool
    asarray: Callable[[Array], Array]
    slots: Array | None = field(default=None, kw_only=True)
    counts: Array | None = field(default=None, kw_only=True)

    @cached_property
    def index(self) -> Array:
        """`host` on the device, in its default integers."""
        return self.asarray(self.host)

    @cached_property
    def rows(self) -> Any:
        """`slots` as an index of the first axis of a buffer: a slice if they are a range."""
        if self.slots is None:
            return slice(None)
        first, n = int(self.slots[0]), len(self.slots)
        if np.array_equal(self.slots, np.arange(first, first + n)):
            return slice(first, first + n)
        return self.asarray(self.slots)

    def has_only_new(self, k: Array) -> bool:
        """Test for keys k [B, H, S, D] of the new tokens only, the same number in each sequence."""
        return self.aligned and bool(self.stop == self.host.shape[1] == k.shape[2])
