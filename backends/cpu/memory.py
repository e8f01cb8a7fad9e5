"""Where the NumPy backend's arrays lie: at the beginning of a cache line, and on large pages."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray

CACHE_LINE = 64  # bytes, of all the processors that have vectors of so many
PIECE = 2**26  # bytes that a pool asks for at once


def aligned(shape: tuple[int, ...], dtype: Any, make: Callable[..., Array] = np.empty) -> Array:
    """A new array that begins where a cache line does, so that no vector lies across two."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    room = make(n_bytes + CACHE_LINE, np.uint8)
    first = -room.ctypes.data % CACHE_LINE
    return room[first : first + n_bytes].view(dtype).reshape(shape)


class Pool:
    """Many arrays in a few large pieces of memory.

    For large pieces NumPy asks Linux for pages of 2 MB. With those of 4 KB a product that reads its
    weights once spends a quarter of its time on finding out where the next page is. A piece goes
    back when the last of its arrays does, but for the newest, which the pool holds.
    """

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def array(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array that begins where a cache line does."""
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        taken = -(-n_bytes // CACHE_LINE) * CACHE_LINE
        if taken >= PIECE:  # large enough by itself
            return aligned(shape, dtype)
        with self._lock:
            if taken > self._left.size:
                self._left = aligned((PIECE,), np.uint8)
            here, self._left = self._left[:n_bytes], self._left[taken:]
        return here.view(dtype).reshape(shape)
