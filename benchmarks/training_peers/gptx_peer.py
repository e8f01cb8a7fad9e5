"""gptx on its NumPy backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import gptx
from benchmarks.training_peers.base import (
    BETAS,
    CLIP,
    EPSILON,
    LEARNING_RATE,
    WEIGHT_DECAY,
    TrainingEngine,
)
from gptx.backends import get_backend
from gptx.backends.backward import Batch
from gptx.bench.machine import blas_version
from gptx.config import GPT2Config
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.training.settings import TrainingSettings
from gptx.training.trainer import Trainer


class OneBatch:
    """Training data of one batch, which comes again in each step."""

    tokenizer: PipelineTokenizer | None = None
    has_validation = False
    sequences_per_epoch = 1_000_000

    def __init__(self, tokens: np.ndarray) -> None:
        ids, targets = tokens[:, :-1], tokens[:, 1:]
        self.batch_size, self.context = ids.shape
        self._batch = Batch(ids, targets, np.ones(ids.shape, np.float32))

    def batch(self, step: int) -> Batch:
        return self._batch

    def validation_batches(self, n: int | None = None) -> Iterator[Batch]:
        return iter(())

    def check(self, config: GPT2Config, tokenizer: Any = None) -> None:
        """Accept any model: its vocabulary is that of the batch."""

    def describe(self) -> dict[str, Any]:
        return {}


class GptxTraining(TrainingEngine):
    """The steps of `gptx train`."""

    def __init__(self, folder: Path, threads: int, tokens: np.ndarray) -> None:
        settings = TrainingSettings(
            steps=1_000_000,
            batch_size=len(tokens),
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup=0,
            weight_decay=WEIGHT_DECAY,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPSILON,
            clip=CLIP,
        )
        backend = get_backend("numpy", threads=threads)
        self.trainer = Trainer(folder, OneBatch(tokens), settings, backend=backend)
        self.version = f"gptx {gptx.__version__}, numpy {np.__version__}, {blas_version()}"

    def step(self) -> float:
        return self.trainer.step().loss
