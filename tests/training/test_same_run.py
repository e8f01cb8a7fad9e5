"""The same run on every library: counters decide all random numbers, sums differ by rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gptx.backends import Backend
from gptx.training.trainer import Trainer
from tests.support.backends import make_backend
from tests.support.training import CONFIG, Records, TinyData, tiny_settings

STEPS = 50


def losses_of(backend: Backend) -> list[float]:
    """Return the losses of a run with dropout at all places, warm-up and clipping."""
    records = Records()
    settings = tiny_settings(steps=STEPS, dropout=0.1, schedule="cosine", eval_every=STEPS)
    config = replace(CONFIG, n_layer=1)
    Trainer(config, TinyData(), settings, backend=backend, callbacks=[records]).run()
    assert not any(record.skipped for record in records.steps)
    return [
        *(record.loss for record in records.steps),
        *(record.validation_loss for record in records.evaluations),
    ]


@pytest.fixture(scope="module")
def exact() -> list[float]:
    return losses_of(make_backend("numpy", dtype="float64", generic=True))


@pytest.mark.parametrize(
    "name",
    ["numpy", "mlx", pytest.param("strict", marks=pytest.mark.soak)],  # 5 seconds
)
def test_fifty_steps_have_the_same_losses(name: str, exact: list[float]) -> None:
    """Each within half of 1e-4 of float64, so within 1e-4 of each other."""
    losses = losses_of(make_backend(name))
    assert len(losses) == STEPS + 2
    assert losses[STEPS - 1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses, exact, rtol=0, atol=5e-5)
