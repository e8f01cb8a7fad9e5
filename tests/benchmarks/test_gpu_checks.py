"""The checks of the GPU benchmark, and its models."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import checks, models
from gptx.backends import get_backend
from gptx.backends.base import OPS
from gptx.bench import sources
from gptx.config import GPT2Config
from gptx.stored_weights import check_weights

# Models


@pytest.mark.parametrize("quantize", [None, "int4", "int8"])
def test_random_models_and_their_bytes(
    quantize: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for module in (models, sources):
        monkeypatch.setitem(module.SIZES, "tiny", (2, 2, 64))
    config, weights = models.load_model("tiny", quantize)
    check_weights(weights, config)
    del weights["wpe.weight"]  # a step reads one row of it
    assert models.step_bytes(config, 4) == sum(x.nbytes for x in weights.values())
    assert [path.name for path in tmp_path.iterdir()] == ["random-tiny"]


@pytest.mark.parametrize(
    ("size", "step", "cache", "prompt"),
    [("124M", 57.5, 8.8, 0.25), ("355M", 165, 23, 0.85), ("1558M", 724, 73, 4.0)],
)
def test_floors_of_an_h200(size: str, step: float, cache: float, prompt: float) -> None:
    """bfloat16: µs for a token, µs for 1,024 keys and values, ms for a prompt."""
    config = GPT2Config.of_size(size)
    assert models.step_bytes(config, 2) / 4.3e6 == pytest.approx(step, rel=0.01)
    assert 1024 * models.token_cache_bytes(config, 2) / 4.3e6 == pytest.approx(cache, rel=0.02)
    assert models.prompt_flops(config, 1024) / 790e9 == pytest.approx(prompt, rel=0.03)


# Checks

SMALL = replace(checks.NARROW, vocab_size=101, n_embd=24, n_head=3, n_layer=1)


def findings(groups: Any) -> list[dict[str, Any]]:
    return list(checks.run_groups(groups, math.inf))


def test_every_op_is_checked() -> None:
    here = checks.Target("numpy")
    found = findings([("ops", lambda: checks.check_ops(here, "float32"))])
    assert sorted(r["check"] for r in found) == sorted(f"{op} float32" for op in OPS)
    assert all(record["ok"] for record in found)


@pytest.mark.parametrize("wrong", [lambda y: y * 1.01, lambda y: y * np.nan])
def test_a_wrong_kernel_is_found(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_backend("numpy", generic=True, threads=1)
    right = backend.gelu_new
    monkeypatch.setattr(backend, "gelu_new", lambda x: wrong(right(x)))
    monkeypatch.setattr(checks.Target, "make", lambda *_, **__: backend)
    x = np.linspace(-4, 4, 100)
    monkeypatch.setattr(checks, "_cases", lambda _: {"relu": [(x,)], "gelu_new": [(x,)]})
    target = checks.Target("numpy")
    found = findings([("ops", lambda: checks.check_ops(target, "float32"))])
    assert [r["check"] for r in found if not r["ok"]] == ["gelu_new float32"]
    found = findings([("pass", lambda: checks.check_forward(target, "float32", config=SMALL))])
    assert found
    assert not any(r["ok"] for r in found)


def test_an_exception_is_a_failed_check() -> None:
    def broken() -> Iterator[Any]:
        yield "this", 0.5, 1.0
        raise RuntimeError("an illegal memory access\nwas encountered")

    found = findings([("first", broken), ("second", lambda: iter([("that", 2.0, 1.0)]))])
    assert [(r["group"], r["ok"]) for r in found] == [
        ("first", True),
        ("first", False),
        ("second", False),
    ]
    assert found[1]["error"] == "RuntimeError: an illegal memory access"
    assert list(checks.run_groups([("late", broken)], 0)) == []


def test_the_forward_pass_is_checked_in_batches() -> None:
    here = checks.Target("numpy")
    found = list(checks.check_forward(here, "float32", config=SMALL, compile=False))
    assert len(found) == len(checks.BATCHES)
    assert max(error / limit for _, error, limit in found) < 1


def test_memory_that_runs_out_is_checked() -> None:
    found = list(checks.check_memory(checks.Target("numpy")))
    assert "out of memory on the numpy backend" in found[0][0]
    assert [error for _, error, _ in found] == [0, 0]
