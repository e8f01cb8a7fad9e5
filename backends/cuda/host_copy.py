"""What the device is about to write to the host's memory."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

import cupy
import numpy as np


class HostCopy(NamedTuple):
    """An array on its way to the host, and the event that says when it is there."""

    host: np.ndarray
    arrived: Any


class HostCopies:
    """Arrays on their way: their memory must not be used again before they are there, even if
    nobody waits for them."""

    def __init__(self) -> None:
        self._expected: deque[HostCopy] = deque()
        self._lock = threading.Lock()

    def expect(self, host: np.ndarray) -> HostCopy:
        """An array of pinned memory, which what the current stream was given so far writes."""
        event = cupy.cuda.Event(disable_timing=True)
        event.record()
        arriving = HostCopy(host, event)
        with self._lock:
            while self._expected and self._expected[0].arrived.done:
                self._expected.popleft()
            self._expected.append(arriving)
        return arriving
