"""What benchmarks/gpu.py checks, and the models that it does it with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import models as gpu_models
from gptx.backends import get_backend
from gptx.backends.base import OPS
from gptx.config import GPT2Config
from gptx.quantization import Quantization
from gptx.stored_weights import check_weights, should_quantize
from tests.support.random_models import CASES

# Models


@pytest.mark.parametrize("how", [None, Quantization(64, 4), Quantization(64, 8)])
def test_random_weights_are_a_model_and_their_bytes_are_counted(how: Quantization | None) -> None:
    config = replace(CASES["355M"], quantization=how)
    weights = gpu_models.random_weights(config, how)
    check_weights(weights, config)
    del weights["wpe.weight"]  # of which a step reads a row
    parts = [(x.weight, x.scales, x.offsets) if should_quantize(n) and how else (x,)
             for n, x in weights.items()]  # fmt: skip
    assert gpu_models.read_bytes(config, 4) == sum(x.nbytes for part in parts for x in part)


@pytest.mark.parametrize(
    ("size", "step", "cache", "prompt"),
    [("124M", 57.5, 8.8, 0.25), ("355M", 165, 23, 0.85), ("1558M", 724, 73, 4.0)],
)
def test_floors_are_those_that_are_known(
    size: str, step: float, cache: float, prompt: float
) -> None:
    """Of an H200 in bfloat16: µs a token, µs for its 1,024 keys and values, ms for a prompt."""
    config = GPT2Config.of_size(size)
    assert gpu_models.read_bytes(config, 2) / 4.3e6 == pytest.approx(step, rel=0.01)
    assert 1024 * gpu_models.cache_bytes(config, 2) / 4.3e6 == pytest.approx(cache, rel=0.02)
    assert gpu_models.prompt_flops(config, 1024) / 790e9 == pytest.approx(prompt, rel=0.03)


# Checks


def findings(groups: Any) -> list[dict[str, Any]]:
    return list(gpu_checks.run(groups, lambda: True))


def test_every_op_is_checked() -> None:
    here = gpu_checks.Where("numpy")
    found = findings([("ops", lambda: gpu_checks.ops(here, "float32"))])
    assert sorted(r["check"] for r in found) == sorted(f"{op} float32" for op in OPS)
    assert all(record["ok"] for record in found)


@pytest.mark.parametrize("wrong", [lambda y: y * 1.01, lambda y: y * np.nan])
def test_a_wrong_kernel_is_found(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_backend("numpy", generic=True)
    right = backend.gelu_new
    monkeypatch.setattr(backend, "gelu_new", lambda x: wrong(right(x)))
    monkeypatch.setattr(gpu_checks.Where, "make", lambda *_, **__: backend)
    where = gpu_checks.Where("numpy")
    found = findings([("ops", lambda: gpu_checks.ops(where, "float32"))])
    assert [r["check"] for r in found if not r["ok"]] == ["gelu_new float32"]
    found = findings(
        [("pass", lambda: gpu_checks.forward(where, "float32", config=gpu_checks.NARROW))]
    )
    assert found
    assert not any(r["ok"] for r in found)


def test_a_check_that_raises_is_one_that_failed() -> None:
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
    assert list(gpu_checks.run([("late", broken)], lambda: False)) == []


def test_the_forward_pass_is_checked_in_batches() -> None:
    here = gpu_checks.Where("numpy")
    found = list(gpu_checks.forward(here, "float32", config=gpu_checks.NARROW, compile=False))
    assert len(found) == len(gpu_checks.BATCHES)
    assert max(error / limit for _, error, limit in found) < 1


def test_memory_that_runs_out_is_checked() -> None:
    found = list(gpu_checks.memory(gpu_checks.Where("numpy")))
    assert "memory ran out" in found[0][0]
    assert [error for _, error, _ in found] == [0, 0]
