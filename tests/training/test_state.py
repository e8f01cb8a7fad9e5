"""gptx.training.state: the numbers of a run, and the test for outliers."""

from __future__ import annotations

import json
import statistics

import pytest

from gptx.training.loss_scale import LossScale
from gptx.training.state import WINDOW_STEPS, TrainingState, appended, z_score


def test_json_and_back_is_exact() -> None:
    state = TrainingState(
        step=7, losses=(0.1 + 0.2, 1 / 3), scale=LossScale(2.0, 3, True), best_loss=1e-300
    )
    assert TrainingState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_a_window_keeps_the_last_finite_values() -> None:
    window: tuple[float, ...] = ()
    for i in range(WINDOW_STEPS + 3):
        window = appended(window, float(i))
    window = appended(appended(window, float("nan")), float("inf"))
    assert window == tuple(map(float, range(3, WINDOW_STEPS + 3)))


def test_the_z_score_needs_a_full_window() -> None:
    window = [float(i % 5) for i in range(WINDOW_STEPS)]
    deviation = statistics.pstdev(window)
    assert z_score(window, 10.0) == pytest.approx((10 - statistics.fmean(window)) / deviation)
    assert z_score(window[1:], 10.0) == 0
    assert z_score([1.0] * WINDOW_STEPS, 10.0) == 0
