"""Allocation at the beginning of a cache line, and on large pages."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gptx.process import ForkSafeLock

Array = np.ndarray

CACHE_LINE_BYTES = 64  # also the size of a vector of AVX-512
POOL_CHUNK_BYTES = 2**26  # allocated by a pool at once
MIN_RECYCLED_BYTES = 2**18  # smaller arrays come from the C library, which keeps their pages
KEPT_PASSES = 3  # calls of `next_pass` that keep free memory; a step of training has two


def allocate_aligned(
    shape: tuple[int, ...], dtype: Any, allocate: Callable[..., Array] = np.empty
) -> Array:
    """Allocate an array at the beginning of a cache line, so that no vector spans two lines.

    Parameters
    ----------
    allocate
        `np.empty` or `np.zeros`.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = allocate(n_bytes + CACHE_LINE_BYTES, np.uint8)
    first = -memory.ctypes.data % CACHE_LINE_BYTES
    return memory[first : first + n_bytes].view(dtype).reshape(shape)


_pool_lock = ForkSafeLock()  # of all pools


class Pool:
    """Arrays in large chunks of memory.

    For large chunks NumPy requests pages of 2 MB from Linux. With pages of 4 KB a GEMV spends a
    quarter of its time on address translation. A chunk is freed with the last of its arrays, except
    the newest chunk, which the pool keeps.
    """

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Allocate an array at the beginning of a cache line."""
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        padded = -(-n_bytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES
        if padded >= POOL_CHUNK_BYTES:  # large enough for a separate chunk
            return allocate_aligned(shape, dtype)
        with _pool_lock:
            if padded > self._free.size:
                self._free = allocate_aligned((POOL_CHUNK_BYTES,), np.uint8)
            memory, self._free = self._free[:n_bytes], self._free[padded:]
        return memory.view(dtype).reshape(shape)


class Recycler:
    """Large arrays whose memory is used again when no reference to them is left.

    A step of training needs arrays of the same sizes as the step before. New memory from the system
    costs more time than most ops: each page is cleared first. It comes from a `Pool`, so that small
    pages cost no time. `next_pass` frees the memory that was not used since the calls of it before;
    the system gets it back a chunk at a time.
    """

    def __init__(self) -> None:
        self.passes = 0
        self._pool = Pool()
        self._free: dict[int, deque[_Memory]] = {}  # number of bytes -> memory, oldest first

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an array with any content."""
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if n_bytes < MIN_RECYCLED_BYTES:
            return np.empty(shape, dtype)
        free = self._free.setdefault(n_bytes, deque())
        try:
            memory = free.pop().array
        except IndexError:
            memory = self._pool.allocate((n_bytes,), np.uint8)
        return np.asarray(_Lease(self, memory, shape, np.dtype(dtype)))

    def give_back(self, memory: Array) -> None:
        """Keep memory for the next array of its size."""
        self._free.setdefault(memory.size, deque()).append(_Memory(memory, self.passes))

    def next_pass(self) -> None:
        """Note that a forward pass begins."""
        self.passes += 1
        for n_bytes, free in list(self._free.items()):  # other threads may allocate
            while free and free[0].last_pass < self.passes - KEPT_PASSES:
                free.popleft()
            if not free:  # texts of many lengths need many sizes
                self._free.pop(n_bytes, None)


class _Memory(NamedTuple):
    """Free memory, and the number of the pass that used it last."""

    array: Array
    last_pass: int


class _Lease:
    """The owner of an array's memory: deleted with the last view of the array."""

    def __init__(
        self, recycler: Recycler, memory: Array, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._recycler, self._memory = recycler, memory
        self.__array_interface__ = {**memory.__array_interface__, "shape": shape}
        self.__array_interface__["typestr"] = dtype.str
        del self.__array_interface__["descr"]

    def __del__(self) -> None:
        self._recycler.give_back(self._memory)
