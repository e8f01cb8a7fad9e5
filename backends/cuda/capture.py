"""CUDA graphs of the same pass, captured in several ways, of which the fastest stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cupy
import numpy as np

TURNS = 3  # of each way


class Fastest:
    """Graphs that compute the same, by the way in which they were captured. The first launches take
    turns, by the device's clock; what was faster then is launched from there on.

    Attributes
    ----------
    winner
        The way that is; None until it is known.
    """

    def __init__(self, graphs: Mapping[bool, Any]) -> None:
        self._graphs = dict(graphs)
        self._timed: list[tuple[bool, Any, Any]] = []  # way, events before and after each launch
        self.winner = next(iter(graphs)) if len(graphs) == 1 else None

    def launch(self) -> None:
        """Launch one of them on the current stream."""
        if self.winner is not None:
            self._graphs[self.winner].launch()
            return
        # Forth and back, so that whatever else takes turns does not always meet the same one.
        ways, turn = list(self._graphs), len(self._timed)
        way = ways[(turn + turn // len(ways)) % len(ways)]
        before, after = cupy.cuda.Event(), cupy.cuda.Event()
        before.record()
        self._graphs[way].launch()
        after.record()
        self._timed.append((way, before, after))
        if len(self._timed) == TURNS * len(ways):
            self._decide()

    def _decide(self) -> None:
        times: dict[bool, list[float]] = {way: [] for way in self._graphs}
        for way, before, after in self._timed:
            after.synchronize()
            times[way].append(cupy.cuda.get_elapsed_time(before, after))
        self.winner = min(times, key=lambda way: float(np.median(times[way])))
        self._graphs = {self.winner: self._graphs[self.winner]}
        self._timed.clear()
