"""A tiny model and data for runs of some steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptx.backends.backward import Batch
from gptx.config import GPT2Config
from gptx.errors import DataError
from gptx.training.callbacks import Callback, EvaluationRecord, StepRecord
from gptx.training.settings import TrainingSettings
from gptx.training.trainer import Trainer

V, T = 31, 8
CONFIG = GPT2Config(
    vocab_size=V,
    n_positions=T,
    n_embd=16,
    n_layer=2,
    n_head=2,
    bos_token_id=None,
    eos_token_id=None,
)


class TinyData:
    """Sequences that count in steps of 1 to 4, so that a tiny model learns them.

    Parameters
    ----------
    sequences
        Number of sequences of a batch.
    seed
        Key of the batches.
    validation
        Number of batches for validation.
    """

    tokenizer = None
    context = T

    def __init__(self, sequences: int = 4, seed: int = 0, validation: int = 1) -> None:
        self.batch_size, self.seed, self.validation = sequences, seed, validation
        self.steps: list[int] = []  # of the batches that were taken

    @property
    def sequences_per_epoch(self) -> int:
        return 100

    @property
    def has_validation(self) -> bool:
        return self.validation > 0

    def batch(self, step: int) -> Batch:
        self.steps.append(step)
        return self._batch(step)

    def _batch(self, number: int) -> Batch:
        philox = np.random.Philox(key=[self.seed, 1], counter=[0, 0, 0, number])
        draws = np.random.Generator(philox).integers(0, V, (2, self.batch_size, 1))
        ids = (draws[0] + np.arange(T + 1) * (1 + draws[1] % 4)) % V
        return Batch(ids[:, :-1], ids[:, 1:], np.ones((self.batch_size, T), np.float32))

    def validation_batches(self, n: int | None = None) -> Iterator[Batch]:
        for number in range(self.validation if n is None else min(n, self.validation)):
            yield self._batch(10**6 + number)

    def check(self, config: GPT2Config, tokenizer: Any = None) -> None:
        if config.vocab_size < V:
            raise DataError(f"the data have {V} ids")

    def describe(self) -> dict[str, Any]:
        return {"sequences": self.batch_size, "seed": self.seed}


class Records(Callback):
    """A callback that keeps all records."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvaluationRecord] = []
        self.saved: list[Path] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self.evaluations.append(record)

    def on_checkpoint(self, folder: Path) -> None:
        self.saved.append(folder)


def tiny_settings(**changes: Any) -> TrainingSettings:
    """Return settings for a run of 20 steps."""
    values: dict[str, Any] = {
        "steps": 20,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup": 3,
        "eval_every": 5,
        "schedule": "constant",
    }
    return TrainingSettings(**(values | changes))


def arrays_of(trainer: Trainer) -> dict[str, np.ndarray]:
    """Return copies of all weights and moments of a run, on the host."""
    ops = trainer.backend
    found = dict(trainer.parameters.weights)
    for kind, arrays in trainer.parameters.moments.items():
        found |= {
            f"{kind}.{n}": x
            for n, x in zip(trainer.parameters.trainable, arrays, strict=bool(arrays))
        }
    with ops.scope():
        return {name: np.array(ops.to_numpy(x)) for name, x in found.items()}


def assert_same_arrays(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Compare all arrays, bit for bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].tobytes() != b[name].tobytes()]
    assert not different
