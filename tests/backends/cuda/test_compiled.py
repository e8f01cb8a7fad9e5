"""Compiled passes of the CuPy backend: graphs compute the same as separate launches."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptx.backends import get_backend
from gptx.generation.engine import TokenGenerator
from gptx.generation.params import SamplingParams
from gptx.generation.results import Token
from gptx.generation.sampling import make_sampler
from gptx.generation.text_model import Model
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits, pad
from gptx.quantization import Quantization
from tests.support.backends import make_backend
from tests.support.models import make_model
from tests.support.random_models import CASES, random_ids

CONFIG = replace(CASES["124M"], n_layer=2, n_head=2, n_embd=64, vocab_size=83, n_positions=100)
NAMES = pytest.mark.parametrize("name", ["cupy", "cupy-cpu"])
PROMPTS = [random_ids(CONFIG, 1, n, n)[0].tolist() for n in (2, 9, 30)]


def module(name: str) -> Any:
    """Import a module of the backend, in the version for CuPy or for the stand-in."""
    return importlib.import_module(f"gptx.backends.cuda.{name}")


def read(model: Model, prompts: list[list[int]]) -> np.ndarray:
    """Logits [B, V] after prompts, with a new cache."""
    backend = model.backend
    with backend.scope():
        cache = KVCache(CONFIG, backend, len(prompts), 100)
        return backend.to_numpy(next_token_logits(model.gpt2, prompts, cache))


def texts(steps: list[list[Token]]) -> list[list[int | None]]:
    return [[token.id for token in step] for step in steps]


# Prompts


@NAMES
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", None), ("bfloat16", None), ("float16", Quantization(32, 4))],
    ids=["float32", "bfloat16", "float16-int4"],
)
@pytest.mark.parametrize(
    "prompts",
    [PROMPTS[:1], PROMPTS[1:2], [*PROMPTS[:2], PROMPTS[2][:13]]],
    ids=["2", "9", "ragged"],
)
def test_a_prompt_is_the_same_in_a_graph(
    prompts: list[list[int]], dtype: str, quantization: Quantization | None, name: str
) -> None:
    exact = read(
        make_model(CONFIG, get_backend("numpy", dtype="float64"), quantization=quantization),
        prompts,
    )
    model = make_model(CONFIG, make_backend(name, dtype=dtype), quantization=quantization)
    others = [ids[::-1] for ids in prompts]
    first, captured, other, again = (read(model, x) for x in (prompts, prompts, others, prompts))
    assert first.tolist() == captured.tolist() == again.tolist()
    assert other.tolist() != first.tolist()
    assert len(model.gpt2.forward._prompt._passes) == 1
    error = np.linalg.norm(first - exact) / np.linalg.norm(exact)
    assert error < {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.08}[dtype]


@NAMES
def test_prompts_of_similar_lengths_share_a_graph(name: str) -> None:
    model = make_model(CONFIG, make_backend(name, dtype="float16"))
    ids = random_ids(CONFIG, 1, 100, 1)[0].tolist()
    used = []
    for n in (3, 8, 9, 16, 65, 70):
        read(model, [ids[:n]])
        used += [key for key in model.gpt2.forward._prompt._passes if key not in used]
    assert used == [(1, length) for length in (8, 16, 128)]


@NAMES
def test_the_oldest_graphs_are_deleted_when_workspaces_exceed_the_limit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(CONFIG, make_backend(name, dtype="float16"))
    passes = model.gpt2.forward._prompt._passes
    texts = [random_ids(CONFIG, 1, n, 1)[0].tolist() for n in (8, 16, 32)]
    for ids in texts * 2:
        read(model, [ids])
    sizes = [workspace.nbytes for workspace, _ in passes.values()]
    assert sizes == sorted(sizes)
    read(model, [texts[0]])
    assert [length for _, length in passes] == [16, 32, 8]
    monkeypatch.setattr(module("compiled"), "MAX_GRAPH_WORKSPACE_BYTES", sum(sizes[1:]) - 1)
    read(model, [texts[2]])
    assert [length for _, length in passes] == [8, 32]
    monkeypatch.setattr(module("compiled"), "MAX_GRAPH_WORKSPACE_BYTES", 0)
    expected = read(model, [texts[1]])
    assert [length for _, length in passes] == [8, 32]  # deleted, and not captured again yet
    assert read(model, [texts[1]]).tolist() == expected.tolist()
    assert [length for _, length in passes] == [16]


@NAMES
def test_a_prompt_may_fill_the_cache(name: str) -> None:
    model = make_model(CONFIG, make_backend(name, dtype="float16"))
    ids = random_ids(CONFIG, 1, CONFIG.n_positions, 1)[0].tolist()
    exact = make_model(CONFIG, get_backend("numpy", dtype="float64"))
    for n in (40, CONFIG.n_positions):
        with model.backend.scope(), exact.backend.scope():
            found, expected = (
                m.backend.to_numpy(
                    next_token_logits(m.gpt2, [ids[:n]], KVCache(CONFIG, m.backend, 1, n))
                )
                for m in (model, exact)
            )
        assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@NAMES
def test_a_prompt_continues_a_cache(name: str) -> None:
    model = make_model(CONFIG, make_backend(name, dtype="float16"))
    ids, backend = PROMPTS[2], model.backend
    whole = read(model, [ids])
    for _ in range(3):  # kernel by kernel, captured, as a graph
        with backend.scope():
            cache = KVCache(CONFIG, backend, 1, 100)
            next_token_logits(model.gpt2, [ids[:17]], cache)
            rest = backend.to_numpy(next_token_logits(model.gpt2, [ids[17:]], cache))
        assert np.linalg.norm(rest - whole) < 0.005 * np.linalg.norm(whole)


@NAMES
def test_long_prompts_use_cublas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIG, make_backend(name, dtype="float16"))
    in_graph = read(model, PROMPTS)
    monkeypatch.setattr(model.backend, "max_graph_macs", 0)
    monkeypatch.setattr(module("linear"), "MAX_GEMM_ROWS", 8)
    model.gpt2.forward._prompt._passes.clear()
    with_cublas = read(model, PROMPTS)
    assert not model.gpt2.forward._prompt._passes
    assert np.linalg.norm(with_cublas - in_graph) < 0.005 * np.linalg.norm(in_graph)


# Decode steps


def interleave(runs: list[TokenGenerator]) -> list[list[list[Token]]]:
    """Execute the runs step by step in rotation; return the steps of each run."""
    steps = zip(*runs, strict=True)
    return [list(each) for each in zip(*steps, strict=True)]


@NAMES
def test_interleaved_generations_are_independent(name: str) -> None:
    model = make_model(CONFIG, make_backend(name, dtype="float16"))
    settings = (
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.2),
        SamplingParams(temperature=0.7, top_k=40, seed=4, frequency_penalty=0.1),
    )

    def run(i: int) -> TokenGenerator:
        # Two runs have two sequences each, and share a graph.
        prompts = PROMPTS[:2] if i < 2 else PROMPTS[2:]
        return TokenGenerator(model.gpt2, prompts, settings[i], max_tokens=9)

    separate = [texts(list(run(i))) for i in range(3)]
    assert [texts(steps) for steps in interleave([run(i) for i in range(3)])] == separate
    assert separate[0] != separate[1]


@NAMES
def test_threads_are_independent(name: str) -> None:
    model = make_model(CONFIG, make_backend(name, dtype="float16"))

    def run(i: int) -> Any:
        params = SamplingParams(temperature=1.0, seed=i)
        return texts(list(TokenGenerator(model.gpt2, PROMPTS[:2], params, max_tokens=7)))

    separate = [run(i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == separate
    assert len({str(steps) for steps in separate}) == 3


@NAMES
def test_a_repeated_step_transfers_nothing_between_host_and_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(CONFIG, make_backend(name, dtype="float16"))
    steps = iter(TokenGenerator(model.gpt2, PROMPTS, SamplingParams(), max_tokens=12))
    for _ in range(4):  # the prompt's token, two steps before the graph, the first step with it
        next(steps)
    if name == "cupy-cpu":
        ndarray = importlib.import_module("cupy").ndarray

        def reject(*_: Any, **__: Any) -> None:
            raise AssertionError("a transfer in a step")

        for method in ("__setitem__", "set", "get", "copy"):
            monkeypatch.setattr(ndarray, method, reject)
        for function in ("array", "asarray", "asnumpy"):
            monkeypatch.setattr(module("compiled").cupy, function, reject)
        monkeypatch.setattr(model.backend, "asarray", reject)
    found = texts([next(steps) for _ in range(5)])
    monkeypatch.undo()
    whole = texts(list(TokenGenerator(model.gpt2, PROMPTS, SamplingParams(), max_tokens=12)))
    assert found == whole[4:9]


def decoding(model: Model, *texts: list[int]) -> tuple[KVCache, Callable[[Any], Any]]:
    """Return a cache with all but the last token of each text, and a function that adds a token."""
    cache = KVCache(CONFIG, model.backend, len(texts), 100)
    next_token_logits(model.gpt2, [ids[:-1] for ids in texts], cache)

    def feed(tokens: Any) -> Any:
        return model.gpt2.forward(tokens, cache.extend([1] * len(texts)), cache)

    return cache, feed


@NAMES
def test_logits_are_valid_after_the_next_step(name: str) -> None:
    model, ids = make_model(CONFIG, make_backend(name)), PROMPTS[2]
    backend, other = model.backend, ids[::-1]
    with backend.scope():
        _, feed = decoding(model, ids[:20], other[:20])
        # Columns of a matrix are not contiguous.
        columns = backend.asarray(np.array([ids[19:], other[19:]]))
        logits = [feed(columns[:, i : i + 1]) for i in range(5)]
        found = [backend.to_numpy(x)[:, 0] for x in logits]
    expected = [read(model, [ids[:n], other[:n]]) for n in range(20, 25)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@NAMES
def test_a_failed_step_can_be_repeated(name: str) -> None:
    model, ids = make_model(CONFIG, make_backend(name)), PROMPTS[2]
    backend = model.backend

    def fail(logits: Any) -> Any:
        raise MemoryError

    with backend.scope():
        cache, feed = decoding(model, ids[:20])
        tokens = backend.asarray(np.array(pad([ids[19:]])))
        for i in range(4):  # before and after the capture
            with pytest.raises(MemoryError):
                backend.decode(model.gpt2, tokens[:, i], cache.extend([1]), cache, fail)
            cache.lengths = cache.lengths - 1
            logits = backend.to_numpy(feed(tokens[:, i : i + 1]))[0, 0]
            expected = read(model, [ids[: 20 + i]])[0]
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@NAMES
def test_tokens_of_several_steps_may_be_unread(name: str) -> None:
    backend = make_backend(name)
    with backend.scope():
        sampler = make_sampler(SamplingParams(), backend, [[0], [0]], [0, 1], 7)
        logits = np.eye(7, dtype=np.float32)

        def sample(rows: list[int]) -> Any:
            return backend.sample(backend.asarray(logits[rows], "float32"), sampler)

        steps = [sample([i, i + 1]) for i in range(3)]
        assert [backend.read_tokens(x).ids for x in steps] == [[0, 1], [1, 2], [2, 3]]
        assert backend.to_numpy(steps[-1].ids).tolist() == [2, 3]
        sampler.keep([1])
        assert backend.read_tokens(sample([5])).ids == [5]
