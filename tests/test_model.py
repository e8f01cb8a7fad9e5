"""The forward pass: against transformers' numbers, and against itself taken in other steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.backends import Backend, get_backend
from gptx.generation.text_model import Model
from gptx.kv_cache import KVCache
from gptx.logits import pad
from gptx.model import forward
from gptx.random_weights import random_weights
from tests.support.backends import BACKENDS, make_backend
from tests.support.models import make_model
from tests.support.random_models import CASES, checksum, random_ids

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden() -> Any:
    with np.load(GOLDEN / "logits.npz") as data:
        return {name: data[name] for name in data.files}


def run(model: Model, prompts: list[list[int]], cache: KVCache, last_only: bool = False) -> Any:
    """Logits of the new tokens of ragged prompts, on the host."""
    backend = model.backend
    with backend.scope():
        positions = cache.extend([len(ids) for ids in prompts])
        ids = backend.asarray(pad(prompts))
        return backend.to_numpy(forward(model.gpt2, ids, positions, cache, last_only=last_only))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, backend: Backend, golden: Any) -> None:
    config = CASES[case]
    weights = random_weights(config)
    assert checksum(weights) == int(golden[f"{case}.crc"])
    model = make_model(config, backend, weights)
    ids, expected = golden[f"{case}.ids"].tolist(), golden[case]
    cache = KVCache(config, backend, len(ids), len(ids[0]))
    np.testing.assert_allclose(run(model, ids, cache), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["124M", "untied", "tiny"])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "numpy"])
def test_backends_agree(name: str, case: str) -> None:
    """To 1e-5, and one unit in the last place of logits that are as large as 13."""
    config = CASES[case]
    ids = random_ids(config, 1, 40, 3)[0].tolist()
    logits = make_model(config, get_backend("numpy")).logits(ids)
    other = make_model(config, make_backend(name)).logits(ids)
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(other, logits, rtol=2**-23, atol=1e-5)


def test_cached_equals_uncached(small: Model) -> None:
    ids = random_ids(small.config, 1, 30, 1)[0].tolist()
    whole = small.logits(ids)
    cache = KVCache(small.config, small.backend, 1, 30)
    steps = [run(small, [ids[:7]], cache), run(small, [ids[7:9]], cache)]
    steps += [run(small, [[i]], cache) for i in ids[9:]]
    np.testing.assert_allclose(np.concatenate(steps, axis=1)[0], whole, rtol=0, atol=2e-5)


def test_a_ragged_batch_equals_single_runs(small: Model) -> None:
    lengths = [1, 5, 12, 3, 9, 12, 2, 7]
    prompts = [random_ids(small.config, 1, n, seed)[0].tolist() for seed, n in enumerate(lengths)]
    cache = KVCache(small.config, small.backend, 8, 20)
    batch = [run(small, prompts, cache, last_only=True)]
    more = [random_ids(small.config, 1, n % 3 + 1, n)[0].tolist() for n in lengths]
    batch.append(run(small, more, cache, last_only=True))  # ragged again, on ragged lengths
    batch.append(run(small, [[i] for i in range(8)], cache, last_only=True))
    for b, prompt in enumerate(prompts):
        alone = KVCache(small.config, small.backend, 1, 20)
        for step, ids in zip(batch, (prompt, more[b], [b]), strict=True):
            single = run(small, [ids], alone)
            np.testing.assert_allclose(step[b, 0], single[0, -1], rtol=0, atol=2e-5)


def test_a_token_does_not_see_those_after_it(small: Model) -> None:
    ids = random_ids(small.config, 1, 20, 5)[0].tolist()
    other = [*ids[:12], *[(i + 1) % 200 for i in ids[12:]]]
    one, two = small.logits(ids), small.logits(other)
    np.testing.assert_allclose(one[:12], two[:12], rtol=0, atol=1e-5)
    assert np.abs(one[12:] - two[12:]).max() > 0.1


def test_last_only_is_the_last_row(small: Model) -> None:
    ids = random_ids(small.config, 2, 9, 2).tolist()
    cache = [KVCache(small.config, small.backend, 2, 9) for _ in range(2)]
    whole, last = run(small, ids, cache[0]), run(small, ids, cache[1], last_only=True)
    assert last.shape == (2, 1, small.config.vocab_size)
    np.testing.assert_allclose(last[:, 0], whole[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mlx", "cupy", "cupy-cpu"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_come_close(dtype: str, name: str) -> None:
    config = CASES["124M"]
    ids = random_ids(config, 1, 40, 3)[0].tolist()
    exact = make_model(config, get_backend("numpy", dtype="float64")).logits(ids)
    ours = make_model(config, make_backend(name, dtype=dtype)).logits(ids)
    assert ours.dtype == np.float32
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert error < {"float16": 0.01, "bfloat16": 0.08}[dtype]


def test_greedy_text_is_that_of_transformers(shakespeare: Model) -> None:
    prompts = json.loads((GOLDEN / "shakespeare_greedy.json").read_text())["prompts"]
    assert len(prompts) == 20
    for golden in prompts:
        assert shakespeare.encode(golden["prompt"]) == golden["ids"]
        result = shakespeare.generate(golden["prompt"], max_tokens=100, ignore_eos=True)
        assert result.tokens == golden["tokens"]
        assert result.text == golden["text"]


@pytest.mark.parametrize("name", ["numpy-generic", "mlx", "strict", "cupy"])
def test_greedy_text_is_the_same_on_every_backend(name: str) -> None:
    prompts = json.loads((GOLDEN / "shakespeare_greedy.json").read_text())["prompts"]
    model = gptx.load("shakespeare", backend=make_backend(name))
    results = model.generate([g["ids"] for g in prompts[:8]], max_tokens=30, ignore_eos=True)
    assert [r.tokens for r in results] == [g["tokens"][:30] for g in prompts[:8]]
