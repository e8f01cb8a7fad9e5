"""The base class of engines that train, and the tasks that run one in a worker."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.training_peers import TABLE, engine_class
from gptx.backends.base import peak_resident_memory
from gptx.bench.worker import Events

# AdamW of every engine. llm.c does not clip, and decays all weights; it starts with the same loss.
LEARNING_RATE = 1e-4
BETAS = 0.9, 0.99
EPSILON = 1e-8
WEIGHT_DECAY = 0.1
CLIP = 1.0


class Step(NamedTuple):
    """The loss of a batch before an update, in nats, and the seconds of the update."""

    loss: float
    seconds: float


class TrainingEngine(ABC):
    """A library with a loaded model and one batch, in a worker.

    Parameters
    ----------
    folder
        Folder of the model in the Hub's format: config.json and model.safetensors in float32.
    threads
        Number of threads of the computation.
    tokens
        Token ids [B, T + 1]: each predicts the next one.

    Attributes
    ----------
    version
        Versions of the library and its kernels.
    """

    version = ""

    @abstractmethod
    def step(self) -> float:
        """Make one update with the batch; return its loss before the update."""

    def steps(self, n: int) -> list[Step]:
        """Make n updates, and time each."""
        found = []
        for _ in range(n):
            start = time.perf_counter()
            loss = self.step()
            found.append(Step(loss, time.perf_counter() - start))
        return found

    def peak_memory(self) -> int:
        """Return the peak memory of the process that computes, in bytes."""
        return peak_resident_memory()


# In the worker

_engine: Any = None


def load_engine(name: str, folder: str, threads: int, tokens: list[list[int]]) -> Events:
    """Load an engine; the task below uses it."""
    global _engine
    batch = np.array(tokens, np.int64)
    _engine = engine_class(name)(Path(folder), threads, batch, **TABLE[name].options)
    yield {"version": _engine.version}


def run_steps(n: int) -> Events:
    """Yield loss and seconds of n updates, and the peak memory so far."""
    found = _engine.steps(n)
    yield {
        "losses": [step.loss for step in found],
        "seconds": [step.seconds for step in found],
        "peak_memory": _engine.peak_memory(),
    }
