"""Allocation at the beginning of a cache line, and on large pages."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray

CACHE_LINE_BYTES = 64  # also the size of a vector of AVX-512
POOL_CHUNK_BYTES = 2**26  # allocated by a pool at once


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


_pool_lock = threading.Lock()  # of all pools


def _renew_lock() -> None:
    """Make a new lock in a forked child, where no thread would release the old one."""
    global _pool_lock
    _pool_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


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
