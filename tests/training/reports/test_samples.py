"""Texts that the model generates during a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from gptx.errors import GptxError, NonFiniteError, PromptError
from gptx.training.callbacks import StepRecord
from gptx.training.reports.samples import Samples


def run(model: Any, steps: int, **options: Any) -> list[tuple[int, str]]:
    """Return the samples of a run."""
    shown: list[tuple[int, str]] = []
    samples = Samples(lambda step, text: shown.append((step, text)), **options)
    settings = SimpleNamespace(steps=steps, seed=7)
    samples.on_start(SimpleNamespace(settings=settings, model=lambda: model))
    for step in range(1, steps + 1):
        samples.on_step(StepRecord(step, 2.0, 1.0, 1e-3, 8, 0.1))
    return shown


class Echo:
    """A model that returns its prompt and its options."""

    def __init__(self, end: int | None) -> None:
        self.config = SimpleNamespace(eos_token_ids=() if end is None else (end,))

    def generate(self, prompt: Any, **options: Any) -> str:
        return f"{prompt!r} {options['seed']}"


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, [3, 6, 9]), ({"every": 4}, [4, 8, 9]), ({"every": 0}, []), ({"every": 99}, [9])],
    ids=["a quarter", "4", "none", "the end only"],
)
def test_the_steps_that_have_a_sample(options: dict[str, Any], steps: list[int]) -> None:
    assert [step for step, _ in run(Echo(None), 9, **options)] == steps


def test_the_prompt_and_the_beginning() -> None:
    assert run(Echo(None), 1, prompt="To ") == [(1, "To 'To ' 7")]
    assert run(Echo(None), 1) == [(1, r"'\n' 7")]
    assert run(Echo(3), 1) == [(1, "[3] 7")]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NonFiniteError("NaN: fetch the model again"), "the model computes a NaN or an infinity"),
        (PromptError("the prompt is empty"), "the prompt is empty"),
    ],
    ids=["not finite", "prompt"],
)
def test_an_error_ends_no_run(monkeypatch: pytest.MonkeyPatch, error: GptxError, text: str) -> None:
    monkeypatch.setattr(Echo, "generate", mock.Mock(side_effect=error))
    assert run(Echo(None), 1) == [(1, f"no sample: {text}")]
