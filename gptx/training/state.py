"""The numbers of a run beside its weights and moments: a checkpoint holds them as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gptx.training.loss_scale import LossScale

WINDOW_STEPS = 128  # of the last steps, with which a loss and a norm are compared


@dataclass(frozen=True)
class TrainingState:
    """The state of a run after a step.

    Attributes
    ----------
    step
        Number of steps so far: the next step takes batch `step` of the data.
    updates
        Number of steps that changed the weights.
    skipped
        Number of steps that did not.
    failures
        Number of steps in a row, up to now, whose gradients were not finite.
    loss
        Loss of the last step; None before the first.
    losses, norms
        Finite losses and norms of the last `WINDOW_STEPS` steps.
    scale
        Scale of the loss.
    evaluated_step
        Step of the last evaluation; None before the first.
    validation_loss, best_loss, best_step
        Loss of the last evaluation; the lowest so far and its step.
    evaluations_since_best
        Number of evaluations after that of the lowest loss.
    """

    step: int = 0
    updates: int = 0
    skipped: int = 0
    failures: int = 0
    loss: float | None = None
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    scale: LossScale = field(default_factory=LossScale)
    evaluated_step: int | None = None
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON has it; a float is read back with the same bits."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingState:
        """Make a state of the contents of `to_dict`."""
        windows = {name: tuple(data[name]) for name in ("losses", "norms")}
        return cls(**{**data, **windows, "scale": LossScale(**data["scale"])})


def appended(window: tuple[float, ...], value: float) -> tuple[float, ...]:
    """Return a window with one more value, and without the oldest if it is full."""
    return (*window, value)[-WINDOW_STEPS:] if math.isfinite(value) else window


def z_score(window: Sequence[float], value: float) -> float:
    """Return the distance of a value from the mean of a window, in standard deviations.

    It is 0 for a window that is not full, or whose values are equal.
    """
    if len(window) < WINDOW_STEPS:
        return 0.0
    mean = math.fsum(window) / len(window)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / len(window))
    return (value - mean) / deviation if deviation > 0 else 0.0
