"""The ablation: every rung generates the same tokens with less work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.backends import Backend, get_backend
from gptx.bench import ablation
from gptx.bench.ablation import ENGINE, make_rungs
from gptx.bench.reuse import (
    GELU,
    KEYS,
    LAST,
    LINEAR,
    NORMS,
    RESIDUALS,
    REUSES,
    ReuseBackend,
    generate_greedy,
)
from gptx.bench.setups import Settings
from gptx.generation.text_model import Model
from gptx.model import Transformer
from tests.support.bench import records, run_in_process
from tests.support.models import make_model
from tests.support.random_models import CASES, random_ids

P, N = 5, 4  # numbers of tokens to read and to generate


def model_of(case: str) -> Model:
    return make_model(CASES[case], get_backend("numpy", generic=True, threads=1))


def prompt_of(model: Transformer, length: int = P) -> list[int]:
    return random_ids(model.config, 1, length)[0].tolist()


@pytest.mark.parametrize(
    ("case", "length"),
    [("124M", 1), ("124M", P), ("untied", P), ("relu", 1), ("gelu-erf", P), ("layer-scaled", P)],
)
def test_every_rung_gives_the_engine_s_tokens(case: str, length: int) -> None:
    model = model_of(case).gpt2
    rungs = make_rungs(model, prompt_of(model, length), N)
    expected = rungs[ENGINE]()
    assert len(expected) == N
    assert any("table" in name for name in rungs) == (case != "relu")
    for name, generate in rungs.items():
        if "table" not in name:
            assert generate() == expected, name
            if case == "untied":  # the memory is of another text
                assert generate() == expected, f"{name}, again"


def test_every_single_reuse_gives_the_same_tokens() -> None:
    model = model_of("124M").gpt2
    ids = prompt_of(model)
    expected = generate_greedy(model, ReuseBackend(model), ids, N)
    for reuse in REUSES:
        assert generate_greedy(model, ReuseBackend(model, [reuse]), ids, N) == expected, reuse


# The op that shows that a reuse is on.
WITNESSES = {
    KEYS: "attention",
    LINEAR: "linear",
    GELU: "gelu_new",
    RESIDUALS: "embed",
    NORMS: "layer_norm",
    LAST: "unembed",
}
ALL = list(range(P, P + N))  # rows of each pass: the whole text
NEWEST = [P, *[1] * (N - 1)]
ONE = [1] * N


@pytest.mark.parametrize("rung", range(len(REUSES) + 1))
def test_a_rung_computes_what_it_does_not_reuse(rung: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the rows that reach the generic ops: all of the text, or the new ones only."""
    model = model_of("124M").gpt2
    reused = REUSES[:rung]
    rows: dict[str, list[int]] = defaultdict(list)
    for op in WITNESSES.values():
        real = getattr(Backend, op)

        def spied(self: Any, x: Any, *rest: Any, op: str = op, real: Any = real) -> Any:
            n = x.shape[2] if op == "attention" else x.shape[1]
            if op != "linear" or rest[0].shape == (384, 96):  # the MLP's second
                rows[op].append(n)
            return real(self, x, *rest)

        monkeypatch.setattr(Backend, op, spied)
    generate_greedy(model, ReuseBackend(model, reused), prompt_of(model), N)
    layers = model.config.n_layer
    for reuse, op in WITNESSES.items():
        if reuse == LAST:
            assert rows[op] == (ONE if reuse in reused else ALL)
            continue
        expected = NEWEST if reuse in reused else ALL
        calls = {"embed": 2, "layer_norm": 2 * layers + 1}.get(op, layers)
        seen = [rows[op][calls * i : calls * (i + 1)] for i in range(N)]
        last = ONE if LAST in reused else expected  # of the norm before the unembedding
        for n, final, counts in zip(expected, last, seen, strict=True):
            tail = 1 if op == "layer_norm" else 0
            assert counts == [n] * (calls - tail) + [final] * tail, op


def test_keys_and_values_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With this reuse only, the product of queries, keys and values is split."""
    model = model_of("124M").gpt2
    shapes: list[tuple[int, int]] = []
    real = Backend.linear

    def spied(self: Any, x: Any, weight: Any, bias: Any) -> Any:
        if weight.shape[1] in (96, 192, 288) and weight.shape[0] == 96:
            shapes.append((x.shape[1], weight.shape[1]))
        return real(self, x, weight, bias)

    monkeypatch.setattr(Backend, "linear", spied)
    generate_greedy(model, ReuseBackend(model, [KEYS]), prompt_of(model), 2)
    per_layer = shapes[-3:]  # keys and values, queries, and the product after the attention
    assert per_layer == [(1, 192), (P + 1, 96), (P + 1, 96)]
    assert (P + 1, 288) not in shapes


@pytest.mark.parametrize("case", ["124M", "gelu-erf"])
def test_the_gelu_table_has_16_bits(case: str) -> None:
    model = model_of(case).gpt2
    x = np.linspace(-12, 12, 10_001, dtype=np.float32)[None, :, None]
    name = model.config.activation_function
    exact = getattr(model.backend, name)(x)
    backend = ReuseBackend(model, gelu_table=True)
    looked_up = backend._look_up(x)
    assert looked_up.dtype == np.float32
    np.testing.assert_allclose(looked_up, exact, rtol=2e-3, atol=1e-3)
    assert not np.array_equal(looked_up, exact)
    halves = np.array([0.5, -1.0, 3.0], np.float32)[None, :, None]  # exact in 16 bits
    expected = getattr(model.backend, name)(halves).astype(np.float16)
    np.testing.assert_array_equal(backend._look_up(halves), expected)


def test_the_preset(monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]) -> None:
    run_in_process(monkeypatch)
    settings = Settings(
        models=(str(folder("124M")),), threads=(1,), prompts=(3,), outputs=(4,), repetitions=2
    )
    found = records(ablation.run(settings))
    assert [r["rung"] for r in found] == [
        "no cache",
        *(f"+ {reuse}" for reuse in REUSES),
        ENGINE,
        "no cache, GELU from a table",
        "all reused, GELU from a table",
    ]
    assert found[0]["speedup"] == 1
    for record in found:
        assert len(record["samples"]) == 2
        assert (record["prompt"], record["output"], record["generic"]) == (3, 4, True)
        assert record["same_tokens"] is True or "table" in record["rung"]
