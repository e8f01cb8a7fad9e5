"""Asynchronous copies from the device to page-locked host memory."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

import cupy
import numpy as np


class HostCopy(NamedTuple):
    """A copy of an array to the host.

    Attributes
    ----------
    host
        The target; it is valid after `event`.
    event
        The CUDA event after the copy.
    """

    host: np.ndarray
    event: Any


class PendingCopies:
    """References to the targets of pending copies.

    They keep the memory from being freed before the device has written it, even if no thread waits
    for the copy.
    """

    def __init__(self) -> None:
        self._pending: deque[HostCopy] = deque()
        self._lock = threading.Lock()

    def track(self, host: np.ndarray) -> HostCopy:
        """Track memory `host` that the current stream's work writes; record an event after it."""
        event = cupy.cuda.Event(disable_timing=True)
        event.record()
        copy = HostCopy(host, event)
        with self._lock:
            while self._pending and self._pending[0].event.done:
                self._pending.popleft()
            self._pending.append(copy)
        return copy
