"""The engine: batches, finish reasons, the end of the context, equal tokens on all backends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gptx.generation.batching
import gptx.generation.engine
from gptx.backends import Backend, get_backend
from gptx.config import GPT2Config
from gptx.errors import NonFiniteError, PromptError
from gptx.generation.batching import Batch
from gptx.generation.engine import TokenGenerator
from gptx.generation.params import SamplingParams
from gptx.generation.prompts import check_ids
from gptx.generation.results import Token
from gptx.generation.sequences import streams_of
from gptx.generation.text_model import Model
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits, pad
from gptx.model import Transformer
from gptx.random_weights import random_weights
from tests.support.backends import BACKENDS, make_backend
from tests.support.models import make_model
from tests.support.random_models import CASES, random_ids

GREEDY = SamplingParams()
HISTORY = SamplingParams(
    temperature=1.0, seed=3, no_repeat_ngram_size=2, dry_multiplier=1.0, min_tokens=3
)
WARM = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, seed=11)


def tokens_of(run: TokenGenerator) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in run.sequences]
    for step in run:
        for token in step:
            if token.id is not None:
                out[token.sequence].append(token.id)
    return out


def prompts_of(run: TokenGenerator) -> list[list[int]]:
    return [sequence.prompt for sequence in run.sequences]


@pytest.fixture
def counting() -> Transformer:
    """A model whose next token is the last one plus one, modulo 97."""
    model = make_model(CASES["untied"], get_backend("numpy")).gpt2

    def forward(ids: Any, positions: Any, cache: Any, last_only: bool = False) -> Any:
        assert positions.stop <= model.config.n_positions
        return 10.0 * np.eye(97, dtype=np.float32)[(ids[:, -1:] + 1) % 97]

    vars(model)["forward"] = forward  # in place of the compiled pass
    return model


def test_each_step_continues_from_its_last_tokens(counting: Transformer) -> None:
    assert tokens_of(TokenGenerator(counting, [[3], [90]], GREEDY, max_tokens=9)) == [
        list(range(4, 13)),
        [91, 92, 93, 94, 95, 96, 0, 1, 2],
    ]


def test_finish_reasons(counting: Transformer) -> None:
    run = TokenGenerator(counting, [[3], [7], [1]], GREEDY, max_tokens=5, eos_ids=(10,))
    steps = list(run)
    assert [len(step) for step in steps] == [3, 3, 3, 2, 2]
    assert steps[2][1] == Token(1, None, None, "stop", end_id=10)
    assert steps[4] == [Token(0, 8, None, "length"), Token(2, 6, None, "length")]


def test_each_of_several_ids_ends_a_sequence(counting: Transformer) -> None:
    run = TokenGenerator(counting, [[3], [7], [1]], GREEDY, max_tokens=5, eos_ids=[9, 6])
    steps = list(run)
    assert steps[1][1] == Token(1, None, None, "stop", end_id=9)
    assert steps[2][0] == Token(0, None, None, "stop", end_id=6)
    assert steps[4] == [Token(2, None, None, "stop", end_id=6)]


def test_a_finished_sequence_leaves_the_batch(counting: Transformer) -> None:
    run = TokenGenerator(counting, [[3], [7], [1]], GREEDY, max_tokens=6)
    seen = []
    for n, step in enumerate(run):
        seen.append([token.sequence for token in step])
        if n == 1:
            run.finish(0)
        if n == 3:
            run.finish(2)
    assert seen == [[0, 1, 2], [0, 1, 2], [1, 2], [1, 2], [1], [1]]


def test_slide_continues_with_the_newer_half(
    counting: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefills = []

    def spy(prompts: list[list[int]]) -> Any:
        prefills.append([list(ids) for ids in prompts])
        return pad(prompts)

    monkeypatch.setattr(gptx.generation.batching, "pad", spy)
    run = TokenGenerator(counting, [[0, 1, 2], [50]], GREEDY, max_tokens=100, overflow="slide")
    out = tokens_of(run)
    assert out == [[i % 97 for i in range(3, 103)], [i % 97 for i in range(51, 151)]]
    # The newer half of a context of 64, at the 65th token of each.
    assert prefills[1] == [list(range(33, 65))]
    assert prefills[2] == [[i % 97 for i in range(50 + 33, 50 + 65)]]


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "overflow", "expected"),
    [
        ([[1, 2, 3], [4]], 5, "error", [7]),  # the last token of the output takes no position
        ([[4], [1, 2, 3]], 1, "error", [3]),
        ([[1, 2, 3]], None, "error", [64]),
        ([[0, 1, 2]], 80, "slide", [64]),
        ([[1] * 200], 10, "truncate", [64]),
    ],
)
def test_a_cache_has_the_positions_that_a_run_fills(
    counting: Transformer,
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[list[int]],
    max_tokens: int | None,
    overflow: Any,
    expected: list[int],
) -> None:
    capacities = []

    def spy(config: GPT2Config, backend: Backend, n_slots: int, capacity: int) -> KVCache:
        capacities.append(capacity)
        return KVCache(config, backend, n_slots, capacity)

    monkeypatch.setattr(gptx.generation.batching, "KVCache", spy)
    tokens_of(TokenGenerator(counting, prompts, GREEDY, max_tokens=max_tokens, overflow=overflow))
    assert capacities == expected


@pytest.mark.parametrize("overflow", ["truncate", "slide"])
def test_a_long_prompt_keeps_its_newest_tokens(counting: Transformer, overflow: Any) -> None:
    prompt = [i % 97 for i in range(200)]
    run = TokenGenerator(counting, [prompt], GREEDY, max_tokens=10, overflow=overflow)
    assert prompts_of(run) == [prompt[-55:]]
    assert tokens_of(run)[0][:3] == [i % 97 for i in range(200, 203)]
    run = TokenGenerator(counting, [prompt], GREEDY, max_tokens=60, overflow=overflow)
    assert prompts_of(run) == [prompt[-32:]]


def test_a_long_prompt_without_a_limit_leaves_half_a_context(counting: Transformer) -> None:
    prompt = [i % 97 for i in range(200)]
    run = TokenGenerator(counting, [prompt], GREEDY, max_tokens=None, overflow="truncate")
    assert prompts_of(run) == [prompt[-32:]]
    assert len(tokens_of(run)[0]) == 33


def test_truncate_ends_with_the_context(counting: Transformer) -> None:
    run = TokenGenerator(counting, [[1, 2, 3]], GREEDY, max_tokens=500, overflow="truncate")
    assert prompts_of(run) == [[1, 2, 3]]
    assert len(tokens_of(run)[0]) == 62  # 61 positions after the prompt, and a token without one


def test_without_a_limit_the_context_ends_the_output(counting: Transformer) -> None:
    out = tokens_of(TokenGenerator(counting, [[1], [1, 2, 3]], GREEDY, max_tokens=None))
    assert [len(ids) for ids in out] == [64, 62]


def test_overflow_is_an_error_before_the_first_step(counting: Transformer) -> None:
    for limit in (1, None):
        TokenGenerator(counting, [[1] * 64], GREEDY, max_tokens=limit)
    with pytest.raises(PromptError, match="prompt has 65 tokens, the context holds 64"):
        TokenGenerator(counting, [[1] * 65], GREEDY, max_tokens=1)
    with pytest.raises(
        PromptError, match="60 prompt tokens and 6 new tokens exceed the context of 64"
    ):
        TokenGenerator(counting, [[1] * 60], GREEDY, max_tokens=6)


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_ragged_batch_equals_single_runs(small: Model, params: SamplingParams) -> None:
    lengths = [1, 5, 18, 5]
    prompts = [random_ids(small.config, 1, n, seed)[0].tolist() for seed, n in enumerate(lengths)]
    run = TokenGenerator(small.gpt2, prompts, params, max_tokens=5, logprobs=True)
    batch: list[list[int]] = [[] for _ in prompts]
    for step in run:
        for token in step:
            assert token.id is not None
            batch[token.sequence].append(token.id)
        if len(batch[1]) == 3:
            run.finish(1)  # the others continue without it
    assert [len(ids) for ids in batch] == [5, 3, 5, 5]
    for prompt, ids in zip(prompts, batch, strict=True):
        single = TokenGenerator(small.gpt2, [prompt], params, max_tokens=len(ids))
        assert tokens_of(single) == [ids]


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "numpy"])
def test_the_same_seed_gives_the_same_tokens_on_every_backend(name: str) -> None:
    config = replace(CASES["124M"], n_layer=2, n_head=3)
    prompt = random_ids(config, 1, 10, 0)[0].tolist()
    expected, other = (
        tokens_of(TokenGenerator(make_model(config, b).gpt2, [prompt], WARM, max_tokens=12))
        for b in (get_backend("numpy"), make_backend(name))
    )
    assert other == expected
    assert len(set(expected[0])) > 6


def test_copies_of_a_prompt_differ_and_the_first_equals_a_single_run(small: Model) -> None:
    prompt, other = [5, 6, 7], [8, 9]
    run = TokenGenerator(small.gpt2, [prompt, other, prompt, prompt], WARM, max_tokens=6)
    a, b, c, d = tokens_of(run)
    assert len({tuple(a), tuple(c), tuple(d)}) == 3
    assert tokens_of(TokenGenerator(small.gpt2, [prompt], WARM, max_tokens=6)) == [a]
    assert tokens_of(TokenGenerator(small.gpt2, [other], WARM, max_tokens=6)) == [b]
    single = TokenGenerator(small.gpt2, [prompt], WARM, max_tokens=6, streams=[2])
    assert tokens_of(single) == [d]


def test_streams_number_the_copies() -> None:
    assert streams_of([[1], [2], [1], [1, 2], [1], [2]]) == [0, 0, 1, 0, 2, 1]


def test_logprobs_are_those_of_the_model(small: Model) -> None:
    prompt = random_ids(small.config, 1, 6, 0)[0].tolist()
    run = TokenGenerator(small.gpt2, [prompt], WARM, max_tokens=8, logprobs=True)
    steps = [step[0] for step in run]
    ids = [token.id for token in steps]
    logits = small.logits([*prompt, *ids]).astype(np.float64)[len(prompt) - 1 :]
    for row, token in zip(logits, steps, strict=False):
        expected = row[token.id] - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert token.logprob == pytest.approx(expected, abs=1e-4)


def test_penalties_reach_across_steps(small: Model) -> None:
    prompt = random_ids(small.config, 1, 6, 0)[0].tolist()
    params = SamplingParams(presence_penalty=1000.0)
    ids = tokens_of(TokenGenerator(small.gpt2, [prompt], params, max_tokens=10))[0]
    assert len(set(ids)) == 10
    params = SamplingParams(repetition_penalty=1e6, logit_bias=dict.fromkeys(range(211), 100.0))
    ids = tokens_of(TokenGenerator(small.gpt2, [prompt], params, max_tokens=10))[0]
    assert len({*ids, *prompt}) == 10 + len(set(prompt))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_an_error(backend: Backend, value: float) -> None:
    weights = {name: x.copy() for name, x in random_weights(CASES["untied"]).items()}
    weights["h.2.mlp.c_proj.bias"][3] = value
    model = make_model(CASES["untied"], backend, weights)
    with pytest.raises(NonFiniteError, match="NaN or an infinity"):
        next(iter(TokenGenerator(model.gpt2, [[1, 2]], GREEDY, max_tokens=5)))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "empty"),
        ([1, 97], "97, expected 0 to 96"),
        ([-1], "-1, expected 0 to 96"),
        ([1.5], "whole numbers"),
        ([[1], [2]], "one list"),
        ([True, False], "whole numbers"),
    ],
)
def test_bad_ids(ids: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        check_ids(ids, 97)


def test_only_token_ids_are_copied_to_the_host(
    small: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = small.backend.to_numpy

    def to_numpy(x: Any) -> np.ndarray:
        sizes.append(real(x).shape)
        return real(x)

    monkeypatch.setattr(small.backend, "to_numpy", to_numpy)
    tokens_of(TokenGenerator(small.gpt2, [[1, 2], [3]], WARM, max_tokens=5))
    assert sizes == [(2,)] * 5


@pytest.mark.parametrize("name", ["numpy", "mlx", "cupy", "cupy-cpu"])
@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("params", [WARM, HISTORY], ids=["sampled", "history"])
def test_a_decode_step_is_two_calls_to_the_backend(
    name: str, logprobs: bool, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Counted:
        """The backend as a batch calls it."""

        def __init__(self, backend: Backend) -> None:
            self.backend = backend

        def __getattr__(self, method: str) -> Any:
            calls.append(method)
            return getattr(self.backend, method)

    class CountedBatch(Batch):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._backend: Any = Counted(self._backend)

    monkeypatch.setattr(gptx.generation.engine, "Batch", CountedBatch)
    model = make_model(CASES["tiny"], make_backend(name))
    run = TokenGenerator(model.gpt2, [[1, 2], [3]], params, max_tokens=6, logprobs=logprobs)
    list(run)
    computing = {"decode", "sample", "read_tokens", "to_numpy", "keep_tokens"}
    found = sorted(call for call in calls if call in computing)
    assert found == ["decode"] * 5 + ["read_tokens"] * 6 + ["sample"]


def test_the_cache_of_a_run_has_what_the_model_has_read(backend: Backend) -> None:
    """At each step; the newest token is not in it."""
    model = make_model(CASES["tiny"], backend)
    tokens = [3, 1, 2]
    run = TokenGenerator(model.gpt2, [tokens], SamplingParams(), max_tokens=4)
    assert run.cache() is None
    for [token] in run:
        cache = run.cache()
        assert cache is not None
        assert cache.tokens == [tokens]
        again = KVCache(model.config, backend, 1, len(tokens))
        with backend.scope():
            next_token_logits(model.gpt2, [tokens], again)
        for x, y in zip(cache.keys + cache.values, again.keys + again.values, strict=True):
            found, expected = backend.to_numpy(x), backend.to_numpy(y)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert token.id is not None
        tokens = [*tokens, token.id]
    assert len(tokens) == 7


def test_the_cache_after_a_slide_has_the_newer_half(counting: Transformer) -> None:
    run = TokenGenerator(counting, [[0] * 60], SamplingParams(), max_tokens=80, overflow="slide")
    ids = [0] * 60 + [step[0].id for step in run]
    cache = run.cache()
    assert cache is not None
    assert cache.tokens is not None
    n = len(cache.tokens[0])
    assert cache.tokens[0] == ids[-n - 1 : -1]
    assert n < len(ids) - 1


@pytest.mark.parametrize("prefills", [1, 2], ids=["first", "slide"])
def test_an_interrupt_while_a_prompt_is_read_leaves_no_cache(
    counting: Transformer, monkeypatch: pytest.MonkeyPatch, prefills: int
) -> None:
    """The new cache has positions whose keys are not computed."""
    read = Batch._read_chunk
    calls: list[Batch] = []

    def interrupted(self: Batch) -> Any:
        calls.append(self)
        if len(calls) == prefills:
            raise KeyboardInterrupt
        return read(self)

    monkeypatch.setattr(Batch, "_read_chunk", interrupted)
    run = TokenGenerator(counting, [[0] * 60], SamplingParams(), max_tokens=80, overflow="slide")
    with pytest.raises(KeyboardInterrupt):
        list(run)
    assert run.cache() is None
