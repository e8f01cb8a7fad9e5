"""The presets `budget` and `total`, and the registry of presets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptx import bench
from gptx.backends import get_backend
from gptx.bench import budget, presets, total
from gptx.bench.setups import Settings
from gptx.errors import DeviceOutOfMemory, GptxError, WeightsError
from tests.support.bench import Clock, records, run_in_process
from tests.support.cli import raises_error
from tests.support.models import make_model
from tests.support.random_models import CASES


@given(limit=st.integers(1, 2000), answer=st.integers(0, 3000))
def test_the_largest_that_fits(limit: int, answer: int) -> None:
    tried: list[int] = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= answer

    assert budget.largest(fits, limit) == min(answer, limit)
    assert len(tried) <= limit.bit_length() + 1
    assert all(1 <= n <= limit for n in tried)


def test_the_tokens_are_the_same_without_a_cache() -> None:
    model = make_model(CASES["124M"], get_backend("numpy", generic=True, threads=1))
    ids = [3, 1, 4, 1, 5]
    *_, last = budget._uncached_steps(model, ids, 8)
    assert last == [*ids, *model.generate(ids, max_tokens=8, ignore_eos=True).tokens]


def test_calls_count_the_tokens_in_time() -> None:
    model = make_model(CASES["124M"], get_backend("numpy", generic=True, threads=1))
    calls = budget.Calls(model)
    try:
        assert calls.count([5, 6], 4, 500.0) == 4
        assert calls.count([5, 6], 4, 1e-9) == 0
    finally:
        calls.close()


class FakeMachine(Clock):
    """A machine that takes a second for each token that it computes."""

    def calls(self, model: Any) -> Any:
        def count(ids: list[int], n: int, limit: float) -> int:
            works = itertools.accumulate([len(ids), *itertools.repeat(1, n - 1)])
            return sum(work <= limit for work in works)

        return SimpleNamespace(count=count, close=lambda: None)

    def uncached_steps(self, model: Any, ids: list[int], n: int) -> Iterator[None]:
        for length in range(len(ids), len(ids) + n):
            self.now += length
            yield


def test_the_budget_on_a_fake_machine(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    machine = FakeMachine()
    monkeypatch.setattr(budget, "time", machine)
    monkeypatch.setattr(budget, "Calls", machine.calls)
    monkeypatch.setattr(budget, "_uncached_steps", machine.uncached_steps)
    setup = {"model": "m", "path": str(folder("124M")), "threads": 1, "generic": True}
    events = budget.measure(setup, prompts=[5, 30, 50], budget=45.0, repetitions=3)
    with_cache, without = records(events)
    assert (with_cache["cache"], without["cache"]) == (True, False)
    assert with_cache["inputs"] == without["inputs"] == 45
    assert with_cache["outputs"] == {"5": 41, "30": 16, "50": 0}
    assert without["outputs"] == {"5": 6, "30": 1, "50": 0}  # 5 + 6 + ... + 10 = 45


def test_the_preset_budget(monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]) -> None:
    run_in_process(monkeypatch)
    path = str(folder())
    monkeypatch.setattr(budget, "largest", lambda fits, limit: limit if fits(1) else 0)
    settings = Settings(
        models=(path,), dtypes=("float64",), threads=(1,), prompts=(60, 64), budget=500.0,
        repetitions=1,
    )  # fmt: skip
    found = records(budget.run(settings))
    rows = [(r["generic"], r["cache"]) for r in found]
    assert rows == [(False, True), (False, False), (True, True), (True, False)]
    for record in found:
        assert record["inputs"] == record["context"] == 64
        assert record["outputs"] == {"60": 5, "64": 1}


def test_the_preset_total(folder: Callable[..., Path]) -> None:
    settings = Settings(
        models=(str(folder()),), threads=(1,), prompts=(3,), outputs=(2,), repetitions=1,
        generic=True,
    )  # fmt: skip
    [record] = records(total.run(settings))
    assert len(record["samples"]) == 1
    assert record["median"] == record["fastest"] == record["slowest"] == record["samples"][0]
    parts = [record[name] for name in total.PARTS[:-1]]
    assert min(parts) > 0
    assert sum(parts) < record["median"]
    assert record["peak_memory"] >= 0


def test_the_first_run_is_kept_apart_and_setups_take_turns(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    ran: list[str] = []

    def run_once(setup: Any, prompt: list[int], output: int) -> dict[str, float]:
        assert (len(prompt), output) == (19, 20)
        ran.append(setup.dtype)
        seconds = {1: 9.0, 2: 3.0, 3: 1.0, 4: 2.0}[ran.count(setup.dtype)]
        return {"total": seconds} | dict.fromkeys(total.PARTS, seconds)

    monkeypatch.setattr(total, "run_once", run_once)
    settings = Settings(
        models=(str(folder()),), dtypes=("float32", "float64"), threads=(1,), repetitions=3
    )
    found = records(total.run(settings))
    assert ran == ["float32", "float64"] * 4
    for record in found:
        assert (record["first"], record["median"]) == (9, 2)
        assert (record["fastest"], record["slowest"]) == (1, 3)
        assert record["load_time"] == 2


@pytest.mark.parametrize(
    ("code", "err", "kind", "message"),
    [
        (1, "Traceback\ngptx.errors.WeightsError: h.0 is damaged", WeightsError, "h.0 is damaged"),
        (1, "ZeroDivisionError: division by zero", GptxError, "division by zero"),
        (-9, "", DeviceOutOfMemory, "probably out of memory"),
    ],
)
def test_a_process_that_fails(
    monkeypatch: pytest.MonkeyPatch, code: int, err: str, kind: Any, message: str
) -> None:
    done = SimpleNamespace(returncode=code, stdout="", stderr=err)
    monkeypatch.setattr(total.worker, "time_process", lambda *_: (1.0, done))
    with raises_error(kind, message):
        total.run_once(total.Setup("m", "f"), [1], 1)


def test_the_registry_is_complete() -> None:
    assert tuple(presets.TABLE) == bench.PRESETS
    known = {field.name for field in fields(Settings)} | {"plot"}
    for preset in (presets.GRID, *presets.TABLE.values()):
        assert preset.takes <= known
