"""The forward pass: against the logits of transformers, and in one pass against several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.backends import get_backend
from gptx.generation.text_model import Model
from gptx.kv_cache import KVCache
from gptx.logits import pad
from gptx.model import forward
from tests.support.backends import BACKENDS, make_backend
from tests.support.models import drawn_weights, float32_logits, make_model
from tests.support.random_models import CASES, checksum, random_ids

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden() -> Any:
    with np.load(GOLDEN / "logits.npz") as data:
        return {name: data[name] for name in data.files}


def run(model: Model, prompts: list[list[int]], cache: KVCache, last_only: bool = False) -> Any:
    """Return the logits of the new tokens of ragged prompts, on the host."""
    backend = model.backend
    with backend.scope():
        positions = cache.extend([len(ids) for ids in prompts])
        ids = backend.asarray(pad(prompts))
        return backend.to_numpy(forward(model.gpt2, ids, positions, cache, last_only=last_only))


# Every case in each library, the larger sizes only in the fast ones; `test_backends_agree` compares
# the other ways to run the model with NumPy's.
GOLDEN_RUNS = [(case, name) for case in CASES for name in ("numpy", "mlx", "cupy")]
GOLDEN_RUNS += [(case, name) for case in list(CASES)[3:] for name in ("cupy-cpu", "strict")]


@pytest.mark.parametrize(("case", "name"), GOLDEN_RUNS)
def test_logits_equal_those_of_transformers(case: str, name: str, golden: Any) -> None:
    config, backend = CASES[case], make_backend(name)
    assert checksum(drawn_weights(config)) == int(golden[f"{case}.crc"])
    model = make_model(config, backend)
    ids, expected = golden[f"{case}.ids"].tolist(), golden[case]
    cache = KVCache(config, backend, len(ids), len(ids[0]))
    np.testing.assert_allclose(run(model, ids, cache), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["124M", "untied", "tiny"])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "numpy"])
def test_backends_agree(name: str, case: str) -> None:
    """The bound is 1e-5, and one unit in the last place of logits as large as 13."""
    config = CASES[case]
    ids = random_ids(config, 1, 20, 3)[0].tolist()
    logits = float32_logits(config, tuple(ids))
    other = make_model(config, make_backend(name)).logits(ids)
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(other, logits, rtol=2**-23, atol=1e-5)


def test_cached_equals_uncached(small: Model) -> None:
    ids = random_ids(small.config, 1, 16, 1)[0].tolist()
    whole = small.logits(ids)
    cache = KVCache(small.config, small.backend, 1, 16)
    steps = [run(small, [ids[:7]], cache), run(small, [ids[7:9]], cache)]
    steps += [run(small, [[i]], cache) for i in ids[9:]]
    np.testing.assert_allclose(np.concatenate(steps, axis=1)[0], whole, rtol=0, atol=2e-5)


def test_a_ragged_batch_equals_single_runs(small: Model) -> None:
    lengths = [1, 5, 12, 3]
    prompts = [random_ids(small.config, 1, n, seed)[0].tolist() for seed, n in enumerate(lengths)]
    cache = KVCache(small.config, small.backend, 4, 20)
    batch = [run(small, prompts, cache, last_only=True)]
    more = [random_ids(small.config, 1, n % 3 + 1, n)[0].tolist() for n in lengths]
    batch.append(run(small, more, cache, last_only=True))  # ragged again, on ragged lengths
    batch.append(run(small, [[i] for i in range(4)], cache, last_only=True))
    for b, prompt in enumerate(prompts):
        single_cache = KVCache(small.config, small.backend, 1, 20)
        for step, ids in zip(batch, (prompt, more[b], [b]), strict=True):
            single = run(small, [ids], single_cache)
            np.testing.assert_allclose(step[b, 0], single[0, -1], rtol=0, atol=2e-5)


def test_later_tokens_do_not_change_the_logits(small: Model) -> None:
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
def test_16_bit_dtypes_are_close(dtype: str, name: str) -> None:
    config = replace(CASES["124M"], n_layer=2, n_head=3)
    ids = random_ids(config, 1, 10, 3)[0].tolist()
    exact = make_model(config, get_backend("numpy", dtype="float64")).logits(ids)
    found = make_model(config, make_backend(name, dtype=dtype)).logits(ids)
    assert found.dtype == np.float32
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < {"float16": 0.01, "bfloat16": 0.08}[dtype]


@pytest.fixture(scope="module")
def greedy() -> Any:
    """Prompts, and their greedy continuations by transformers."""
    return json.loads((GOLDEN / "shakespeare_greedy.json").read_text())["prompts"]


def test_greedy_text_equals_that_of_transformers(shakespeare: Model, greedy: Any) -> None:
    assert len(greedy) == 20
    assert [shakespeare.encode(g["prompt"]) for g in greedy] == [g["ids"] for g in greedy]
    options: Any = {"max_tokens": 100, "ignore_eos": True}
    results = [shakespeare.generate(g["prompt"], **options) for g in greedy[:3]]
    results += shakespeare.generate([g["prompt"] for g in greedy[3:]], batch_size=17, **options)
    assert [r.tokens for r in results] == [g["tokens"] for g in greedy]
    assert [r.text for r in results] == [g["text"] for g in greedy]


@pytest.mark.parametrize(
    ("name", "n"), [("numpy-generic", 10), ("mlx", 30), ("strict", 10), ("cupy", 30)]
)
def test_greedy_text_is_the_same_on_every_backend(name: str, n: int, greedy: Any) -> None:
    model = gptx.load("shakespeare", backend=make_backend(name))
    results = model.generate([g["ids"] for g in greedy[:2]], max_tokens=n, ignore_eos=True)
    assert [r.tokens for r in results] == [g["tokens"][:n] for g in greedy[:2]]
