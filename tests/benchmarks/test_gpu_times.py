"""Times of engines: figures, failures, and gptx's engine on the backends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import engines, times
from gptx.bench.sources import random_ids
from gptx.random_weights import random_weights
from tests.emulator import cupy_stand_in
from tests.support.bench import Clock
from tests.support.random_models import CASES


class FakeEngine(engines.Engine):
    """An engine that takes 1 second for the first token and `step` seconds for the others."""

    weights_bytes = 100
    kernels = 63

    def __init__(self, clock: Clock, step: float, fails_at: int = 99, tokens: str = "abcd") -> None:
        self.name = f"every {step} s"
        self.clock, self.step, self.fails_at, self.letters = clock, step, fails_at, tokens
        self.runs = 0

    def prepare(self, batch: int, capacity: int, n_tokens: int) -> None:
        self.clock.now += 10

    def tokens(self, prompts: np.ndarray, n: int) -> Iterator[list[int]]:
        self.runs += 1
        if self.runs == self.fails_at:
            raise RuntimeError("out of luck")
        self.clock.now += 1
        for k in range(n):
            self.clock.now += self.step * (k > 0)
            yield [ord(self.letters[k])]

    def device_seconds(self, prompts: np.ndarray, n: int) -> tuple[float, float]:
        return 0.5, self.step / 2

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.zeros(1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(times, "time", found)
    return found


def measure(
    row: tuple[int, int, int], *fakes: FakeEngine, until: float = 1e9
) -> list[dict[str, Any]]:
    loaded: Any = SimpleNamespace(engines=fakes, config=CASES["tiny"])
    return list(times.measure(times.Row(*row), loaded, until))


def test_figures_of_arrivals(clock: Clock) -> None:
    fast, slow = measure((3, 2, 4), FakeEngine(clock, 0.25), FakeEngine(clock, 2.0, tokens="abXd"))
    # Both engines take longer than ROW_SECONDS.
    assert fast["first"] == slow["first"] == [1.0] * times.MIN_ROUNDS
    assert (fast["step_p50"], fast["step_p99"], slow["step_p50"]) == (0.25, 0.25, 2.0)
    assert fast["rate"] == [3 / 0.25] * 2
    assert fast["whole_rate"] == [3 * 4 / 1.75] * 2
    assert (fast["first_run"], fast["compile_time"]) == (11.75, 10)
    assert (fast["first_device"], fast["step_device"]) == (0.5, 0.125)
    assert (fast["memory"], fast["kernels"]) == (100, 63)
    assert (fast["same_tokens"], slow["same_tokens"]) == (4, 2)


def test_a_prompt_without_steps(clock: Clock) -> None:
    [record] = measure((1, 64, 1), FakeEngine(clock, 1.0))
    assert record["first"] == [1.0] * times.ROUNDS
    assert "rate" not in record


@pytest.mark.parametrize("fails_at", [1, 3])
def test_an_engine_that_fails_is_left_out(clock: Clock, fails_at: int) -> None:
    failed, record = measure((1, 2, 4), FakeEngine(clock, 2.0, fails_at), FakeEngine(clock, 1.0))
    assert failed == {"engine": "every 2.0 s", "error": "RuntimeError: out of luck"}
    assert record["engine"] == "every 1.0 s"
    assert record["same_tokens"] == 4


def test_the_time_limit_ends_the_rounds(clock: Clock) -> None:
    """The first runs of two engines take 14 seconds each, a round of both 8."""
    found = measure((1, 2, 4), FakeEngine(clock, 1.0), FakeEngine(clock, 1.0), until=29)
    assert [len(record["first"]) for record in found] == [1, 1]


@pytest.mark.parametrize("backend", ["numpy", "cupy"])
def test_gptx_runs_its_token_generator(backend: str) -> None:
    config = replace(CASES["tiny"], n_embd=64)
    weights = random_weights(config)
    prompts = np.array(random_ids(config, 2, 3))
    exact = engines.GptxEngine("exact", config, weights, backend="numpy", generic=True)
    with cupy_stand_in.installed():
        engine = engines.GptxEngine("here", config, weights, backend=backend, compile=False)
        engine.prepare(2, 6, 4)
        assert list(engine.tokens(prompts, 4)) == list(exact.tokens(prompts, 4))
        np.testing.assert_allclose(engine.logits([1, 2, 3]), exact.logits([1, 2, 3]), atol=1e-4)
        assert min(engine.device_seconds(prompts, 4)) > 0
        engine.release()
        held, most = engine.memory()
        assert held <= most
    assert engine.weights_bytes == 4 * config.n_parameters
