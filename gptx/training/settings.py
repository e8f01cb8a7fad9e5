"""The settings of a training run, checked once, when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, get_args

from gptx.backends.backward import RECOMPUTE, Dropout
from gptx.errors import ParameterError, argument, shown
from gptx.generation.checks import check_count, is_real
from gptx.generation.names import check_names
from gptx.training.optimizers import OptimizerName
from gptx.training.schedule import Schedule

# A resumed run may change these: they do not change the weights of a step.
CHANGEABLE = ("eval_every", "eval_batches", "patience", "save_every")


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a run; the defaults train a small model of characters on a CPU.

    They are those of nanoGPT for its small Shakespeare: 2,000 steps of 12 sequences.

    Attributes
    ----------
    steps
        Number of updates of the weights.
    batch_size
        Number of sequences in one pass.
    accumulate
        Number of passes of a step, whose gradients are added.
    optimizer
        "adamw" or "sgd".
    learning_rate
        The largest learning rate.
    schedule
        "cosine", "linear", "constant" or "wsd": see `gptx.training.schedule`.
    warmup
        Number of steps in which the learning rate rises.
    final_fraction
        Learning rate of the last step, as a fraction of the largest.
    weight_decay
        Decay of the matrices; biases and norms do not decay.
    beta1, beta2, eps
        Constants of AdamW: decay of the mean of gradients and of their squares; a small number that
        is added to the root.
    momentum
        Decay of SGD's mean of gradients; 0 for none.
    clip
        Largest norm of all gradients; None for no limit.
    dropout
        Probability of dropout at each of GPT-2's places.
    recompute
        "none"; "cheap" or "block", which take less memory and more time: see
        `gptx.backends.backward.loss_function`.
    trainable
        Patterns of the names of weights to train, such as "h.11.*"; None for all.
    seed
        Key of all random numbers: first weights, order of the data, dropout.
    skip_z
        Skip a step whose loss or norm is more than this number of standard deviations above the
        mean of the last steps; None for never.
    eval_every
        Number of steps between two evaluations.
    eval_batches
        Number of batches of an evaluation; None for the whole validation split.
    patience
        Stop after this number of evaluations without a new best loss; None for never.
    save_every
        Number of steps between two checkpoints; None for one at each evaluation.

    Raises
    ------
    ParameterError
        A value is out of range.
    """

    steps: int = 2000
    batch_size: int = 12
    accumulate: int = 1
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    warmup: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    clip: float | None = 1.0
    dropout: float = 0.0
    recompute: str = "none"
    trainable: tuple[str, ...] | None = None
    seed: int = 0
    skip_z: float | None = None
    eval_every: int = 250
    eval_batches: int | None = None
    patience: int | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every"):
            self._check_count(name)
        for name in ("eval_batches", "patience", "save_every"):
            if getattr(self, name) is not None:
                self._check_count(name)
        self._check_count("warmup", least=0)
        self._check_count("seed", least=0)
        self._check_number("learning_rate", "above 0", lambda x: x > 0)
        self._check_number("eps", "above 0", lambda x: x > 0)
        self._check_number("weight_decay", "of at least 0", lambda x: x >= 0)
        self._check_number("final_fraction", "from 0 to 1", lambda x: 0 <= x <= 1)
        for name in ("beta1", "beta2", "momentum", "dropout"):
            self._check_number(name, "of at least 0, less than 1", lambda x: 0 <= x < 1)
        for name in ("clip", "skip_z"):
            if getattr(self, name) is not None:
                self._check_number(name, "above 0, or None", lambda x: x > 0)
        self._check_choice("optimizer", get_args(OptimizerName))
        self._check_choice("schedule", get_args(Schedule))
        self._check_choice("recompute", RECOMPUTE)
        self._check_patterns()

    def _check_count(self, name: str, least: int = 1) -> None:
        object.__setattr__(self, name, check_count(name, getattr(self, name), least))

    def _check_number(self, name: str, limits: str, is_valid: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if not is_real(value) or not math.isfinite(value) or not is_valid(value):
            raise ParameterError(f"{argument(name)} is {shown(value)}, expected a number {limits}")
        object.__setattr__(self, name, float(value))

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ParameterError(
                f"{argument(name)} is {shown(getattr(self, name))}, expected one of "
                f"{', '.join(choices)}"
            )

    def _check_patterns(self) -> None:
        value = self.trainable
        if value is None:
            return
        patterns = list(value) if isinstance(value, list | tuple) else [None]
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise ParameterError(
                f"{argument('trainable')} is {shown(value)}, expected a list of patterns such as "
                "'h.11.*', or None for all weights"
            )
        object.__setattr__(self, "trainable", tuple(patterns))

    @property
    def sequences(self) -> int:
        """Number of sequences of a step."""
        return self.batch_size * self.accumulate

    @property
    def dropout_places(self) -> Dropout:
        """The setting of dropout as `gptx.backends.backward` takes it."""
        return Dropout(self.dropout, self.dropout, self.dropout, self.seed)

    def select_trainable(self, names: list[str]) -> list[str]:
        """Return the names that `trainable` matches, in the given order.

        Raises
        ------
        ParameterError
            A pattern matches no name.
        """
        if self.trainable is None:
            return names
        for pattern in self.trainable:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ParameterError(
                    f"{argument('trainable')} has {pattern!r}, which matches no weight: the names "
                    f"are {names[0]}, h.0.attn.c_attn.weight and the like"
                )
        return [name for name in names if any(fnmatchcase(name, p) for p in self.trainable)]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        data = asdict(self)
        return {**data, "trainable": None if self.trainable is None else list(self.trainable)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingSettings:
        """Make settings of the contents of `to_dict`, or of some of them.

        Raises
        ------
        ParameterError
            A name is unknown, or a value is out of range.
        """
        check_names(data, [f.name for f in fields(cls)])
        return cls(**data)
