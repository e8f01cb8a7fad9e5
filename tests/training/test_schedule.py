"""gptx.training.schedule: the learning rate of each step."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from gptx.training.schedule import Schedule, learning_rate
from gptx.training.settings import TrainingSettings


def rates(schedule: Schedule, **changes: float) -> list[float]:
    settings = TrainingSettings(
        schedule=schedule, **{"steps": 100, "warmup": 10, "learning_rate": 2.0} | changes
    )  # type: ignore[arg-type]
    return [learning_rate(settings, step) for step in range(settings.steps)]


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_the_warm_up_rises_in_a_line(schedule: Schedule) -> None:
    found = rates(schedule)
    assert found[:11] == pytest.approx([0.2 * (i + 1) for i in range(10)] + [2.0])
    assert rates(schedule, warmup=0)[0] == 2.0


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_the_rate_falls_to_the_final_fraction(schedule: Schedule) -> None:
    settings = TrainingSettings(
        schedule=schedule, steps=100, warmup=10, learning_rate=2.0, final_fraction=0.25
    )
    found = [learning_rate(settings, step) for step in range(10, 130)]
    assert found == sorted(found, reverse=True)
    end = 2.0 if schedule == "constant" else 0.5
    assert found[90] == pytest.approx(end)  # step 100, after the last
    assert found[-1] == pytest.approx(end)


def test_values_in_the_middle() -> None:
    """Formulas of llm.c's schedulers, at step 64 of 100 after a warm-up of 10."""
    part = 54 / 90
    final = 0.1
    expected = {
        "cosine": final + (1 - final) * 0.5 * (1 + math.cos(math.pi * part)),
        "linear": final + (1 - final) * (1 - part),
        "constant": 1.0,
        "wsd": 1.0,
    }
    for schedule in get_args(Schedule):
        assert rates(schedule)[64] == pytest.approx(2 * expected[schedule])
    decayed = final + (1 - final) * (1 - math.sqrt(10 / 20))
    assert rates("wsd")[90] == pytest.approx(2 * decayed)


def test_a_warm_up_longer_than_the_run() -> None:
    assert rates("cosine", steps=5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
