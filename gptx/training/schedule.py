"""The learning rate as a function of the step: no state, so a resumed run has the same one."""

from __future__ import annotations

import math
from typing import Literal, Protocol

Schedule = Literal["cosine", "linear", "constant", "wsd"]
WSD_DECAY = 0.2  # last part of the steps, in which "wsd" (warm-up, stable, decay) decays


class ScheduleSettings(Protocol):
    """The settings that decide the learning rate, see `gptx.training.settings`."""

    @property
    def schedule(self) -> Schedule:
        """Shape of the decay."""

    @property
    def steps(self) -> int:
        """Number of steps."""

    @property
    def warmup(self) -> int:
        """Number of steps of the warm-up."""

    @property
    def learning_rate(self) -> float:
        """Largest learning rate."""

    @property
    def final_fraction(self) -> float:
        """Fraction at the end."""


def learning_rate(settings: ScheduleSettings, step: int) -> float:
    """Return the learning rate of a step, which is counted from 0.

    It rises in a line during the warm-up. Then "cosine" and "linear" fall to the final fraction,
    which they would reach at step `steps`. "constant" stays. "wsd" stays, and falls in the last
    fifth of the steps, as 1 - sqrt(part) (https://arxiv.org/abs/2405.18392).
    """
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    fraction = settings.final_fraction
    return settings.learning_rate * (fraction + (1 - fraction) * _decay(settings, step))


def _decay(settings: ScheduleSettings, step: int) -> float:
    """Return the height of the schedule above its end, from 1 to 0."""
    first = settings.warmup
    if settings.schedule == "wsd":
        first = max(first, round(settings.steps * (1 - WSD_DECAY)))
    part = min(1.0, max(0.0, (step - first) / max(1, settings.steps - first)))
    match settings.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * part))
        case "linear":
            return 1 - part
        case "wsd":
            return 1 - math.sqrt(part)
        case "constant":
            return 1.0
