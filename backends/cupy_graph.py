"""CUDA graphs of the same pass, captured in several ways, of which the fastest stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

TURNS = 3  # of each way


class Fastest:
    """Graphs that compute the same. The first launches take turns, by the device's clock; what was
    faster then is launched from there on."""

    def __init__(self, graphs: Sequence[Any]) -> None:
        self._graphs = list(graphs)
        self._timed: list[tuple[Any, Any]] = []  # events before and after each launch

    def launch(self) -> None:
        """Launch one of them on the current stream."""
        n = len(self._graphs)
        if n == 1:
            self._graphs[0].launch()
            return
        before, after = cupy.cuda.Event(), cupy.cuda.Event()
        before.record()
        self._graphs[len(self._timed) % n].launch()
        after.record()
        self._timed.append((before, after))
        if len(self._timed) == n * TURNS:
            after.synchronize()
            times = [cupy.cuda.get_elapsed_time(*events) for events in self._timed]
            medians = [np.median(times[way::n]) for way in range(n)]
            self._graphs = [self._graphs[int(np.argmin(medians))]]
            self._timed.clear()
