"""Copies of arrays that end where no memory is, so that a step too far is a fault."""

from __future__ import annotations

import ctypes
import mmap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

PAGE = mmap.PAGESIZE
NO_ACCESS = 0  # PROT_NONE
GARBAGE = 0xFF  # as bytes: a NaN in each of the float types


class Room:
    """Pages of memory between two that nobody may touch."""

    def __init__(self, n_pages: int) -> None:
        self.memory = mmap.mmap(-1, (n_pages + 2) * PAGE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + PAGE
        self.stop = self.start + n_pages * PAGE
        for page in (self.start - PAGE, self.stop):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, NO_ACCESS) == 0


free: defaultdict[int, list[Room]] = defaultdict(list)  # by their numbers of pages


class Copy:
    """A copy of the memory [start, stop).

    Its address leaves the same rest when it is divided by 16, and that is all that it has in
    common with the original's.
    """

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.n_bytes = stop - start
        self.n_pages = -(-(self.n_bytes + 16) // PAGE)
        self.room = free[self.n_pages].pop() if free[self.n_pages] else Room(self.n_pages)
        self.address = self.room.stop - self.n_bytes
        self.address -= (self.address - start) % 16
        self._around = (
            (self.room.start, self.address),
            (self.address + self.n_bytes, self.room.stop),
        )
        for first, last in self._around:
            ctypes.memset(first, GARBAGE, last - first)
        ctypes.memmove(self.address, start, self.n_bytes)

    def is_clean_around(self) -> bool:
        """Whether nothing was written between the copy and those pages."""
        strips = (ctypes.string_at(first, last - first) for first, last in self._around)
        return not any(strip.strip(bytes([GARBAGE])) for strip in strips)

    def copy_back(self) -> None:
        """Put what is there now where it came from."""
        ctypes.memmove(self.start, self.address, self.n_bytes)


@contextmanager
def guarded(arrays: Iterable[np.ndarray]) -> Iterator[list[Copy]]:
    """Copies of all these arrays; arrays that overlap lie in one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        elif (start, stop) not in merged[-1:]:  # an empty array, twice
            merged.append((start, stop))
    copies = [Copy(*span) for span in merged]
    yield copies
    for copy in copies:
        free[copy.n_pages].append(copy.room)


def find(copies: Sequence[Copy], array: np.ndarray) -> Copy:
    """The copy that an array lies in."""
    start, stop = array.ctypes.data, array.ctypes.data + array.nbytes
    return next(copy for copy in copies if copy.start <= start and stop <= copy.stop)
