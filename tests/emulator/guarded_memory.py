"""Copies of arrays between inaccessible pages, so that an access past an end is a fault."""

from __future__ import annotations

import ctypes
import mmap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

PAGE_BYTES = mmap.PAGESIZE
PROT_NONE = 0
GARBAGE = 0xFF  # a byte; four or two of them are a NaN in each float type


class GuardedPages:
    """Pages of memory between two inaccessible pages."""

    def __init__(self, n_pages: int) -> None:
        self.memory = mmap.mmap(-1, (n_pages + 2) * PAGE_BYTES)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + PAGE_BYTES
        self.stop = self.start + n_pages * PAGE_BYTES
        for page in (self.start - PAGE_BYTES, self.stop):
            failed = ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE_BYTES, PROT_NONE)
            assert not failed


free_pages: defaultdict[int, list[GuardedPages]] = defaultdict(list)  # by number of pages


class Copy:
    """A copy of the memory [start, stop) that ends at an inaccessible page.

    The addresses of copy and original are equal modulo 16, and differ otherwise.
    """

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.n_bytes = stop - start
        self.n_pages = -(-(self.n_bytes + 16) // PAGE_BYTES)
        unused = free_pages[self.n_pages]
        self.pages = unused.pop() if unused else GuardedPages(self.n_pages)
        self.address = self.pages.stop - self.n_bytes
        self.address -= (self.address - start) % 16
        self._margins = (
            (self.pages.start, self.address),
            (self.address + self.n_bytes, self.pages.stop),
        )
        for first, last in self._margins:
            ctypes.memset(first, GARBAGE, last - first)
        ctypes.memmove(self.address, start, self.n_bytes)

    def is_clean_around(self) -> bool:
        """Return False if the kernel wrote between the copy and the inaccessible pages."""
        margins = (ctypes.string_at(first, last - first) for first, last in self._margins)
        return not any(margin.strip(bytes([GARBAGE])) for margin in margins)

    def copy_back(self) -> None:
        """Write the copy's content to the original."""
        ctypes.memmove(self.start, self.address, self.n_bytes)


@contextmanager
def guarded(arrays: Iterable[np.ndarray]) -> Iterator[list[Copy]]:
    """Yield copies that contain all the arrays; arrays that overlap share a copy."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        elif (start, stop) not in merged[-1:]:  # a duplicate empty array
            merged.append((start, stop))
    copies = [Copy(*span) for span in merged]
    yield copies
    for copy in copies:
        free_pages[copy.n_pages].append(copy.pages)


def find_copy(copies: Sequence[Copy], array: np.ndarray) -> Copy:
    """Return the copy that contains an array."""
    start, stop = array.ctypes.data, array.ctypes.data + array.nbytes
    return next(copy for copy in copies if copy.start <= start and stop <= copy.stop)
