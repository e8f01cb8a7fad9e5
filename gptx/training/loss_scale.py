"""The scale of the loss in float16, whose smallest number is too large for many gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST = 2.0**16
LEAST = 1.0
GROWTH_STEPS = 2000  # finite steps in a row after which the scale is doubled


@dataclass(frozen=True)
class LossScale:
    """A scale that follows the range of the gradients.

    A step whose gradients overflow halves it; `GROWTH_STEPS` finite steps in a row double it
    (https://arxiv.org/abs/1710.03740, section 3.2).

    Attributes
    ----------
    value
        Factor of the loss, a power of two.
    finite_steps
        Number of finite steps since the last change.
    is_dynamic
        False for the types that need no scale, bfloat16 among them: the value stays 1.
    """

    value: float = 1.0
    finite_steps: int = 0
    is_dynamic: bool = False

    @classmethod
    def of(cls, dtype: str) -> LossScale:
        """Return the first scale for a type of activations."""
        return cls(FIRST, 0, True) if dtype == "float16" else cls()

    @property
    def can_fall(self) -> bool:
        """True if a smaller scale may avoid an overflow."""
        return self.is_dynamic and self.value > LEAST

    def after_step(self, *, is_finite: bool) -> LossScale:
        """Return the scale after a step with finite gradients, or without."""
        if not self.is_dynamic:
            return self
        if not is_finite:
            return replace(self, value=max(LEAST, self.value / 2), finite_steps=0)
        if self.finite_steps + 1 < GROWTH_STEPS:
            return replace(self, finite_steps=self.finite_steps + 1)
        return replace(self, value=self.value * 2, finite_steps=0)
