"""Capture CUDA graphs, and autotune between graphs of the same pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cupy
import numpy as np

TIMED_LAUNCHES = 3  # of each candidate


def capture(launch: Callable[[], None]) -> Any:
    """Return a CUDA graph of the kernels that `launch` launches on the current stream."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            launch()
        finally:
            graph = stream.end_capture()
    return graph


class AutotunedGraph:
    """One of several graphs that compute the same: the fastest.

    The first launches alternate between the candidates and are timed on the device. Later launches
    use the candidate with the lowest median time.

    Parameters
    ----------
    candidates
        Graphs by key: True if the graph uses programmatic dependent launch.

    Attributes
    ----------
    chosen
        Key of the selected candidate; None until it is selected.
    """

    def __init__(self, candidates: Mapping[bool, Any]) -> None:
        self._graphs = dict(candidates)
        self._timed: list[tuple[bool, Any, Any]] = []  # key, events before and after each launch
        self.chosen = next(iter(candidates)) if len(candidates) == 1 else None

    def launch(self) -> None:
        """Launch a candidate on the current stream."""
        if self.chosen is not None:
            self._graphs[self.chosen].launch()
            return
        # The order reverses every round (a b b a a b), in case other work alternates, too.
        keys, n = list(self._graphs), len(self._timed)
        key = keys[(n + n // len(keys)) % len(keys)]
        before, after = cupy.cuda.Event(), cupy.cuda.Event()
        before.record()
        self._graphs[key].launch()
        after.record()
        self._timed.append((key, before, after))
        if len(self._timed) == TIMED_LAUNCHES * len(keys):
            self._choose()

    def _choose(self) -> None:
        times: dict[bool, list[float]] = {key: [] for key in self._graphs}
        for key, before, after in self._timed:
            after.synchronize()
            times[key].append(cupy.cuda.get_elapsed_time(before, after))
        self.chosen = min(times, key=lambda key: float(np.median(times[key])))
        self._graphs = {self.chosen: self._graphs[self.chosen]}
        self._timed.clear()
