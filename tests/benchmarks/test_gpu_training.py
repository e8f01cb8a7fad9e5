"""Training in the GPU benchmark: its checks, its times and its table."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import training
from benchmarks.gpu.checks import Target
from benchmarks.gpu.report import render_tables
from gptx.backends import get_backend
from tests.support.bench import parse_table

SMALL = replace(training.SMALL, vocab_size=31, n_embd=24, n_positions=8, n_layer=1)
HERE = {"size": "shakespeare", "dtype": "float32", "backend": "numpy", "device": "cpu"}
Random = np.random.Generator


def small_cases(random: Random) -> dict[str, tuple[str, list[Any], dict[str, Any]]]:
    g, x = random.normal(size=(2, 3, 8)), random.normal(size=(2, 3, 8))
    return {"gelu_new_vjp": ("gelu_new_vjp", [g, x], {"wanted": (True,)})}


def test_a_small_model_passes_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_cases", small_cases)
    monkeypatch.setattr(training.check_model, "__defaults__", (SMALL,))
    found = list(training.run_checks(math.inf, "numpy"))
    assert [r["check"] for r in found] == [
        "gelu_new_vjp float32",
        "gelu_new_vjp float32, the same bits again",
        "loss and gradients",
        "loss and gradients, dropout",
        "an update",
    ]
    assert all(r["ok"] for r in found)


@pytest.mark.parametrize("wrong", [lambda dx: dx * 1.001, lambda dx: dx * np.nan])
def test_a_wrong_gradient_is_found(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_backend("numpy", threads=1)
    right = training.gradients.function(backend, "gelu_new_vjp")
    monkeypatch.setattr(
        backend, "gelu_new_vjp", lambda *a, **k: (wrong(right(*a, **k)[0]),), raising=False
    )
    monkeypatch.setattr(Target, "make", lambda *_, **__: backend)
    monkeypatch.setattr(training, "_cases", small_cases)
    here = Target("numpy")
    (_, error, limit), *_ = training.check_gradients(here, "float32")
    assert not error <= limit
    (_, error, limit), *_ = training.check_model(here, "float32", SMALL)
    assert not error <= limit


def test_sums_in_another_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    backend = get_backend("numpy", threads=1)
    monkeypatch.setattr(
        backend, "gelu_new_vjp", lambda g, x, wanted: (g * random.random(),), raising=False
    )
    monkeypatch.setattr(Target, "make", lambda *_, **__: backend)
    monkeypatch.setattr(training, "_cases", small_cases)
    _, (text, error, limit) = training.check_gradients(Target("numpy"), "float32")
    assert (text, error, limit) == ("gelu_new_vjp float32, the same bits again", 1, 0)


def test_updates_are_timed_beside_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherEngine(training.TrainingEngine):
        def step(self) -> float:
            time.sleep(0.01)
            return 12.0

    make = training.make_engine
    monkeypatch.setattr(
        training,
        "make_engine",
        lambda name, *a: make(name, *a) if name == "gptx" else OtherEngine(),
    )
    for name, value in {"ROUNDS": 2, "STEPS": 1, "WARM_UP": 2}.items():
        monkeypatch.setattr(training, name, value)
    records = list(training.run_times(math.inf, HERE, ("gptx", "torch eager"), 1, 8))
    check, ours, theirs = records
    assert check["section"] == "checks"
    assert not check["ok"]  # the losses differ
    assert ours["losses"][1] < ours["losses"][0]
    text = render_tables({"job": "training", **record} for record in records)
    rows = parse_table(text.split("\n\n")[-1])
    assert [row["engine"] for row in rows] == ["gptx", "torch eager"]
    speedup = np.median(theirs["seconds"]) / np.median(ours["seconds"])
    assert float(rows[0]["× PyTorch"]) == pytest.approx(speedup, abs=0.01)
    assert rows[1]["sequences × tokens"] == "1 × 8"


def test_an_engine_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_engine(*_: Any) -> Any:
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(training, "make_engine", make_engine)
    (record,) = training.run_times(math.inf, HERE, ("gptx",), 1, 8)
    assert record["error"] == "RuntimeError: out of memory"
    assert "out of memory" in render_tables([{"job": "training", **record}])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within PyTorch
def test_pytorch_has_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUNDS": 1, "STEPS": 1}.items():
        monkeypatch.setattr(training, name, value)
    check, *_ = training.run_times(math.inf, HERE, ("gptx", "torch eager"), 2, 16)
    assert check["ok"], check
