"""What the device is about to write to the host's memory."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import cupy
import numpy as np


class Arriving(NamedTuple):
    """An array on its way to the host, and the event that says when it is there."""

    host: np.ndarray
    arrived: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.host.shape


class Arrivals:
    """Arrays on their way: their memory must not be used again before they are there, even if
    nobody waits for them."""

    def __init__(self) -> None:
        self._expected: deque[Arriving] = deque()

    def expect(self, host: np.ndarray) -> Arriving:
        """An array of pinned memory, which what the current stream was given so far writes."""
        while self._expected and self._expected[0].arrived.done:
            self._expected.popleft()
        event = cupy.cuda.Event(disable_timing=True)
        event.record()
        self._expected.append(Arriving(host, event))
        return self._expected[-1]
