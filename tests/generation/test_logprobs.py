"""Log-probabilities: of each token and the most probable ones, of the output and the prompt."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptx.errors import NonFiniteError, ParameterError
from gptx.generation.text_model import Model
from gptx.random_weights import random_weights
from tests.support.backends import make_backend
from tests.support.cli import raises_error
from tests.support.models import make_model
from tests.support.random_models import CASES

CONFIG = replace(CASES["124M"], n_layer=1, n_head=3, eos_token_id=200)
PROMPT = [5, 6, 7, 8]
WARM: Any = {"temperature": 1.0, "seed": 5, "max_tokens": 6}


@pytest.fixture(params=["numpy", "mlx", "strict"], scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    """A small model on each array library."""
    return make_model(CONFIG, make_backend(request.param))


def expected_logprobs(model: Model, ids: list[int]) -> np.ndarray:
    """Return the log-probabilities after each token in float64, [T, V]."""
    logits = model.logits(ids).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("n", [1, 5, 211])
def test_the_most_probable_tokens(model: Model, n: int) -> None:
    result = model.generate(PROMPT, logprobs=n, **WARM)
    assert result.logprobs is not None
    assert result.top_logprobs is not None
    assert [len(top) for top in result.top_logprobs] == [n] * 6
    rows = expected_logprobs(model, [*PROMPT, *result.tokens])[len(PROMPT) - 1 :]
    for id, logprob, top, row in zip(
        result.tokens, result.logprobs, result.top_logprobs, rows, strict=False
    ):
        assert list(top.values()) == sorted(top.values(), reverse=True)
        np.testing.assert_allclose(list(top.values()), np.sort(row)[::-1][:n], atol=1e-4)
        np.testing.assert_allclose(list(top.values()), row[list(top)], atol=1e-4)
        assert logprob == pytest.approx(row[id], abs=1e-4)
        if n == 211:
            assert top[id] == logprob  # the very float


@pytest.mark.parametrize("request_logprobs", [True, 0])
def test_the_token_only(model: Model, request_logprobs: Any) -> None:
    result = model.generate(PROMPT, logprobs=request_logprobs, **WARM)
    assert result.logprobs is not None
    assert len(result.logprobs) == 6
    assert result.top_logprobs is None
    top = model.generate(PROMPT, logprobs=2, **WARM)
    assert top.logprobs == result.logprobs


@pytest.mark.parametrize("off", [False, None])
def test_no_logprobs(model: Model, off: Any) -> None:
    result = model.generate(PROMPT, logprobs=off, prompt_logprobs=off, **WARM)
    fields = (result.logprobs, result.top_logprobs, result.prompt_logprobs)
    assert (*fields, result.prompt_top_logprobs) == (None,) * 4


def test_a_greedy_token_is_the_first_of_the_most_probable_ones(model: Model) -> None:
    result = model.generate(PROMPT, logprobs=3, max_tokens=6)
    assert result.logprobs is not None
    assert result.top_logprobs is not None
    for id, logprob, top in zip(result.tokens, result.logprobs, result.top_logprobs, strict=True):
        assert next(iter(top.items())) == (id, logprob)


def test_the_end_token_has_its_place(model: Model) -> None:
    """Also in the chunks of a stream."""
    options: Any = {"logprobs": 2, "stop_token_ids": [9], "seed": 5, "max_tokens": 6}
    plain = model.generate(PROMPT, logprobs=2, max_tokens=1)
    result = model.generate(PROMPT, logit_bias={9: 1000.0}, **options)
    assert (result.tokens, result.tokens_with_end) == ([], [9])
    assert result.logprobs is not None
    assert result.top_logprobs is not None
    row = expected_logprobs(model, PROMPT)[-1]
    assert result.logprobs == [pytest.approx(row[9], abs=1e-4)]
    assert result.top_logprobs == plain.top_logprobs
    [chunk] = model.stream(PROMPT, logit_bias={9: 1000.0}, **options)
    assert (chunk.token, chunk.logprob) == (None, result.logprobs[0])
    assert chunk.top_logprobs == result.top_logprobs[0]


def test_logprobs_are_those_before_penalties(model: Model) -> None:
    def write(ids: list[int], x: Any) -> Any:
        return x * 0.0

    plain = model.generate(PROMPT, max_tokens=1, logprobs=5)
    for options in (
        {"logit_bias": {3: 99.0}},
        {"ban": [[plain.tokens[0]]]},
        {"logits_processor": write},
        {"repetition_penalty": 3.0, "temperature": 2.0, "seed": 1},
    ):
        other = model.generate(PROMPT, max_tokens=1, logprobs=5, **options)
        assert other.top_logprobs == plain.top_logprobs


def test_a_stream_equals_a_generation(model: Model) -> None:
    options = WARM | {"logprobs": 3, "prompt_logprobs": 2, "n": 2}
    results = model.generate(PROMPT, **options)
    chunks = list(model.stream(PROMPT, **options))
    for i, result in enumerate(results):
        own = [chunk for chunk in chunks if chunk.sequence == i]
        assert [chunk.logprob for chunk in own] == result.logprobs
        assert [chunk.top_logprobs for chunk in own] == result.top_logprobs
        streamed = own[-1].result
        assert streamed is not None
        assert streamed.prompt_logprobs == result.prompt_logprobs
        assert streamed.prompt_top_logprobs == result.prompt_top_logprobs


@pytest.mark.parametrize("n", [True, 0, 2])
def test_logprobs_of_the_prompt_are_its_score(model: Model, n: Any) -> None:
    prompts = [PROMPT, [1, 2], [9], list(range(20))]
    plain = model.generate(prompts, **WARM)
    results = model.generate(prompts, prompt_logprobs=n, **WARM)
    assert [r.tokens for r in results] == [r.tokens for r in plain]
    for prompt, result in zip(prompts, results, strict=True):
        assert result.prompt_ids == prompt
        assert result.prompt_logprobs is not None
        assert result.prompt_logprobs[0] is None
        if len(prompt) > 1:
            score = model.score(prompt, top_logprobs=int(n) if n is not True else 0)
            np.testing.assert_allclose(result.prompt_logprobs[1:], score.logprobs[1:], atol=1e-5)
        else:
            assert result.prompt_logprobs == [None]
        if n == 2 and n is not True:
            assert result.prompt_top_logprobs is not None
            lengths = [len(top or ()) for top in result.prompt_top_logprobs]
            assert lengths == [0] + [2] * (len(prompt) - 1)
        else:
            assert result.prompt_top_logprobs is None


def test_a_cache_does_not_hide_the_logprobs_of_a_prompt(model: Model) -> None:
    cache = model.prefill(PROMPT[:3])
    options = WARM | {"prompt_logprobs": 1}
    found = model.generate(PROMPT, cache=cache, **options)
    assert found.prompt_logprobs == model.generate(PROMPT, **options).prompt_logprobs
    assert len(found.prompt_logprobs or []) == len(PROMPT)


def test_a_truncated_prompt_has_the_logprobs_of_its_rest(model: Model) -> None:
    prompt = [i % 200 for i in range(100)]
    options: Any = {"overflow": "slide", "max_tokens": 5, "prompt_logprobs": True}
    result = model.generate(prompt, **options)
    assert result.prompt_ids == prompt[-len(result.prompt_ids) :]
    assert len(result.prompt_logprobs or []) == result.prompt_tokens < 64


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, 1.5, "5", [1], math.nan])
def test_invalid_numbers_of_logprobs(model: Model, name: str, value: Any) -> None:
    options: Any = {name: value}
    with raises_error(ParameterError, f"{name} is {value!r}, expected True, False, or the number"):
        model.generate(PROMPT, **options)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_more_logprobs_than_tokens(model: Model, name: str) -> None:
    options: Any = {name: 212}
    with raises_error(ParameterError, f"{name} is 212, expected at most 211 (the vocabulary)"):
        model.generate(PROMPT, **options)


def test_logprobs_of_damaged_weights_are_an_error() -> None:
    weights = random_weights(CASES["tiny"])
    weights["ln_f.bias"][0] = np.nan
    model = make_model(CASES["tiny"], make_backend("numpy"), weights)
    with pytest.raises(NonFiniteError):
        model.generate([1, 2, 3], prompt_logprobs=2, max_tokens=2)
