"""Copies of arrays that end where no memory is, so that a step too far is a fault."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence

import numpy as np

PAGE = mmap.PAGESIZE
NO_ACCESS = 0  # PROT_NONE
GARBAGE = 0xFF  # as bytes: a NaN in each of the float types


class Copy:
    """A copy of the memory [start, stop) between two pages that nobody may touch.

    Its address leaves the same rest when it is divided by 16, and that is all that it has in
    common with the original's.
    """

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.n_bytes = stop - start
        pages = -(-(self.n_bytes + 16) // PAGE) * PAGE
        self._memory = mmap.mmap(-1, pages + 2 * PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + PAGE
        self.address = first + pages - self.n_bytes
        self.address -= (self.address - start) % 16
        ctypes.memset(first, GARBAGE, pages)
        ctypes.memmove(self.address, start, self.n_bytes)
        self._around = [(first, self.address), (self.address + self.n_bytes, first + pages)]
        for page in (first - PAGE, first + pages):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, NO_ACCESS) == 0

    def is_clean_around(self) -> bool:
        """Whether nothing was written between the copy and those pages."""
        strips = (ctypes.string_at(start, stop - start) for start, stop in self._around)
        return not any(strip.strip(bytes([GARBAGE])) for strip in strips)

    def copy_back(self) -> None:
        """Put what is there now where it came from."""
        ctypes.memmove(self.start, self.address, self.n_bytes)


def guard(arrays: Iterable[np.ndarray]) -> list[Copy]:
    """Copies of all these arrays; arrays that overlap lie in one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        elif (start, stop) not in merged[-1:]:  # an empty array, twice
            merged.append((start, stop))
    return [Copy(*span) for span in merged]


def find(copies: Sequence[Copy], array: np.ndarray) -> Copy:
    """The copy that an array lies in."""
    start, stop = array.ctypes.data, array.ctypes.data + array.nbytes
    return next(copy for copy in copies if copy.start <= start and stop <= copy.stop)
