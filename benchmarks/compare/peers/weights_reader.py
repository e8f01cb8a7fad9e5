"""The floor of a decode step: the time to read the weights once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import gptx
from benchmarks.compare.peers.base import Measured
from gptx.safetensors_file import read_safetensors

N_READS = 16


class WeightsReader(Measured):
    """No engine: it reads the weights."""

    def __init__(self, folder: Path, threads: int, work: Path) -> None:
        model = gptx.load(folder, threads=threads)
        self.n_bytes = sum(path.stat().st_size for path in model.files.weights)
        self.read = make_reader(model)


def make_reader(model: gptx.Model) -> Callable[[], float]:
    """Return a function that measures the seconds to read the weights of a model once.

    Each file is one matrix and is multiplied by a vector: one product of the same BLAS with the
    same threads and next to no arithmetic. Two Python threads with a `np.dot` each are no faster.
    """
    width = model.config.n_embd
    matrices = []
    for path in model.files.weights:
        tensors = sorted(read_safetensors(path)[0].values(), key=lambda x: x.ctypes.data)
        if any(x.dtype != np.float32 for x in tensors):
            raise SystemExit(f"{path} is not float32 throughout, which this benchmark reads")
        n = sum(x.size for x in tensors) // width  # tensors are stored one after the other
        matrices.append(np.lib.stride_tricks.as_strided(tensors[0], (n, width), (4 * width, 4)))
    vector = np.ones(width, np.float32)

    def read() -> float:
        times = []
        with model.backend.scope():
            for _ in range(N_READS):
                start = time.perf_counter()
                for matrix in matrices:
                    matrix @ vector
                times.append(time.perf_counter() - start)
        return float(np.median(times))

    return read
