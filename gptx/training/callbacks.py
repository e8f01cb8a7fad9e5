"""The events of a run, and the records that they carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Trainer = Any  # a `gptx.training.trainer.Trainer`, which imports this module
Skipped = Literal["non-finite", "loss scale", "z-score"]


@dataclass(frozen=True)
class StepRecord:
    """One step of a run.

    Attributes
    ----------
    step
        Number of steps so far, this one included.
    loss
        Mean of -log p over the tokens of the step, before the update.
    norm
        Norm of all gradients, before clipping.
    learning_rate
        Learning rate of the update.
    tokens
        Number of tokens in the loss.
    seconds
        Duration of the step.
    skipped
        Reason why the weights were not changed; None if they were.
    loss_scale
        Factor of the loss in float16; None in other types.
    """

    step: int
    loss: float
    norm: float
    learning_rate: float
    tokens: int
    seconds: float
    skipped: Skipped | None = None
    loss_scale: float | None = None


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation on the validation split.

    Attributes
    ----------
    step
        Number of steps so far.
    validation_loss
        Mean of -log p over all tokens of the evaluation.
    is_best
        True if no earlier evaluation of the run had a loss as low.
    seconds
        Duration of the evaluation.
    """

    step: int
    validation_loss: float
    is_best: bool
    seconds: float


class Callback:
    """Methods that the trainer calls; each does nothing here. An error in one ends the run."""

    def on_start(self, trainer: Trainer) -> None:
        """Begin a run, or continue one at `trainer.state.step`."""

    def on_step(self, record: StepRecord) -> None:
        """Take the record of a step."""

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Take the record of an evaluation."""

    def on_checkpoint(self, folder: Path) -> None:
        """Take the folder of a checkpoint that was written."""

    def on_end(self, trainer: Trainer) -> None:
        """End a run: after its last step, an interruption or an error."""
