"""The floor of a decode step: the time to read the weights once, as `cpu.py` measures it."""

from __future__ import annotations

from pathlib import Path

import gptx
from benchmarks.compare.peers.base import Measured
from benchmarks.cpu import reader


class Reading(Measured):
    """No engine: it only reads."""

    def __init__(self, folder: Path, threads: int, work: Path) -> None:
        model = gptx.load(folder, threads=threads)
        self.n_bytes = sum(path.stat().st_size for path in model.files.weights)
        self.measure = reader(model)

    def read(self) -> float:
        """Seconds to read all weights once."""
        return self.measure()
