"""Texts that the model generates while it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gptx.errors import GptxError, NonFiniteError
from gptx.generation.text_model import Model
from gptx.training.callbacks import Callback, StepRecord

MAX_TOKENS = 200
TEMPERATURE = 0.8


class Samples(Callback):
    """Generate a text now and then, and at the end of the run.

    Parameters
    ----------
    show
        Function that is called with a step and a text.
    every
        Number of steps between two texts; 0 generates none. None: a quarter of the run.
    prompt
        Text that the model continues. None: the end-of-text token, or a newline if there is none.
    """

    def __init__(
        self,
        show: Callable[[int, str], None],
        *,
        every: int | None = None,
        prompt: str | None = None,
    ) -> None:
        self._show, self._every, self._prompt = show, every, prompt
        self._trainer: Any = None

    def on_start(self, trainer: Any) -> None:
        self._trainer = trainer
        if self._every is None:
            self._every = math.ceil(trainer.settings.steps / 4)

    def on_step(self, record: StepRecord) -> None:
        last = record.step == self._trainer.settings.steps
        if self._every and (last or record.step % self._every == 0):
            self._show(record.step, self._sample())

    def _sample(self) -> str:
        """Return the prompt and its continuation, or the error: a sample ends no run."""
        model: Model = self._trainer.model()
        try:
            prompt = _beginning(model) if self._prompt is None else self._prompt
            text = model.generate(
                prompt,
                max_tokens=MAX_TOKENS,
                temperature=TEMPERATURE,
                seed=self._trainer.settings.seed,
                overflow="slide",
            )
        except NonFiniteError:
            return "no sample: the model computes a NaN or an infinity"
        except GptxError as error:
            return f"no sample: {error}"
        return f"{self._prompt or ''}{text}"


def _beginning(model: Model) -> str | list[int]:
    ends = model.config.eos_token_ids
    return [ends[0]] if ends else "\n"
