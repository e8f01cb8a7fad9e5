"""A plain NumPy loop, with cached keys and values or without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import threadpoolctl

import gptx
from benchmarks.compare.peers.base import Engine, Tick
from benchmarks.compare.peers.plain_numpy import PlainGPT2


class NumpyEngine(Engine):
    """One sequence at a time."""

    version = np.__version__

    def __init__(self, folder: Path, threads: int, work: Path, cache: bool = True) -> None:
        model = gptx.load(folder, generic=True)  # plain arrays
        config = model.config
        self.model = PlainGPT2(model.gpt2.weights, config.n_head, config.n_positions)
        self.cache = cache
        self.known: list[int] = []
        self.n_bytes = 4 * config.n_parameters
        threadpoolctl.threadpool_limits(threads, user_api="blas")

    def generate(
        self, prompts: list[list[int]], n_tokens: int, tick: Tick, known: bool = False
    ) -> None:
        (ids,) = prompts
        if known and ids != self.known:
            self.model.logits(ids)
        self.known = ids if known else []  # the next prompt overwrites it
        start = len(ids) - 1 if known else 0
        for _ in range(n_tokens):
            token = int(np.argmax(self.model.logits(ids[start:], start)))
            tick([token])
            ids = [*ids, token]
            start = len(ids) - 1 if self.cache else 0

    def logits(self, ids: list[int]) -> list[float]:
        self.known = []
        return [float(x) for x in self.model.logits(ids)]
