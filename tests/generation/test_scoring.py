"""Scores of lists of texts, and of choices after one context."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptx.errors import ParameterError, PromptError
from gptx.generation import scoring
from gptx.generation.text_model import Model
from tests.support.backends import make_backend
from tests.support.cli import raises_error
from tests.support.models import make_model
from tests.support.random_models import CASES

CONFIG = replace(CASES["124M"], n_layer=1, n_head=3)  # a context of 64 tokens


@pytest.fixture(params=["numpy", "mlx"], scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    """A small model on two array libraries."""
    return make_model(CONFIG, make_backend(request.param))


def texts() -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(0, 211, n).tolist() for n in (5, 90, 2, 64, 65, 130)]


@pytest.mark.parametrize("options", [{}, {"stride": 20}, {"batch_size": 2}, {"batch_size": 1}])
def test_scores_of_a_list_are_those_of_each_text(model: Model, options: Any) -> None:
    stride = options.get("stride")
    scores = model.score(texts(), top_logprobs=3, **options)
    for ids, score in zip(texts(), scores, strict=True):
        alone = model.score(ids, stride=stride, top_logprobs=3)
        assert score.tokens == ids
        assert score.logprobs[0] is alone.logprobs[0] is None
        np.testing.assert_allclose(score.logprobs[1:], alone.logprobs[1:], atol=1e-5)
        assert score.top_logprobs is not None
        assert [len(top or ()) for top in score.top_logprobs] == [0] + [3] * (len(ids) - 1)


def test_a_list_of_one_text_gives_a_list(shakespeare: Model) -> None:
    [score] = shakespeare.score(["To be"])
    assert score.logprobs == shakespeare.score("To be").logprobs
    assert score.top_logprobs is None
    assert score.total == pytest.approx(-score.loss * score.n_scored)


def test_the_logits_of_a_batch_are_limited(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = scoring.prompt_logits

    def spy(*arguments: Any) -> Any:
        logits = real(*arguments)
        sizes.append(logits.shape)
        return logits

    monkeypatch.setattr(scoring, "prompt_logits", spy)
    monkeypatch.setattr(scoring, "MAX_BATCH_LOGITS", 211 * 40)
    model.score(texts())
    assert all(B == 1 or B * T <= 40 for B, T, _ in sizes)
    assert max(B for B, _, _ in sizes) > 1


CONTEXT = [7, 8, 9, 10, 11]
CHOICES = [[1], [2, 3, 4], [5, 6], [1, 2, 3, 4, 5, 6, 7], [9]]


@pytest.mark.parametrize("batch_size", [8, 2])
def test_scores_of_choices_are_those_after_the_context(model: Model, batch_size: int) -> None:
    scores = model.score_choices(CONTEXT, CHOICES, top_logprobs=2, batch_size=batch_size)
    for choice, score in zip(CHOICES, scores, strict=True):
        whole = model.score([*CONTEXT, *choice], top_logprobs=2)
        assert score.tokens == choice
        n = len(CONTEXT)
        np.testing.assert_allclose(score.logprobs, whole.logprobs[n:], atol=1e-5)  # type: ignore[arg-type]
        assert score.top_logprobs is not None
        assert whole.top_logprobs is not None
        assert [list(t or ()) for t in score.top_logprobs] == [
            list(t or ()) for t in whole.top_logprobs[n:]
        ]
        assert score.n_scored == len(choice)


def test_the_context_is_computed_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, ...]] = []
    real = model.gpt2.forward

    def forward(ids: Any, *arguments: Any, **options: Any) -> Any:
        passes.append(tuple(ids.shape))
        return real(ids, *arguments, **options)

    monkeypatch.setitem(vars(model.gpt2), "forward", forward)
    model.score_choices(CONTEXT, CHOICES)
    assert passes == [(1, 5), (3, 6)]  # choices of one token need no second pass
    passes.clear()
    model.score_choices(CONTEXT, CHOICES[:1])
    assert passes == [(1, 5)]


def test_a_context_and_choices_of_text(shakespeare: Model) -> None:
    context, choices = "To be, or not to", [" be", " bear", " be: that is"]
    scores = shakespeare.score_choices(context, choices)
    for choice, score in zip(choices, scores, strict=True):
        whole = shakespeare.score(context + choice)
        n = len(whole.tokens) - len(score.tokens)
        assert shakespeare.decode(whole.tokens[:n]) == context
        np.testing.assert_allclose(score.logprobs, whole.logprobs[n:], atol=1e-4)  # type: ignore[arg-type]
    assert scores[0].total == max(score.total for score in scores)


def test_a_token_that_joins_context_and_choice_belongs_to_the_choice(shakespeare: Model) -> None:
    """The space at the end of the context is the first letter of a token of the text."""
    scores = shakespeare.score_choices("To be, or not to ", ["be", "die"])
    without = shakespeare.score_choices("To be, or not to", [" be", " die"])
    assert [score.tokens for score in scores] == [score.tokens for score in without]
    for score, other in zip(scores, without, strict=True):
        np.testing.assert_allclose(score.logprobs, other.logprobs, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("context", "choices", "message"),
    [
        ("To be", [], "missing prompt: give at least one"),
        ("To be", [""], "the prompt is empty"),
        ("", ["a"], "the prompt is empty"),
        ("To be", "or not", "choices are 'or not', expected a list of texts"),
        ("To be", [[1]], "the context is a text and a choice is a list of token ids"),
        ([1, 2], ["a"], "the context is a text and a choice is a list of token ids"),
        ([1, 2], [[]], "the prompt is empty"),
        ([1, 2], [[2000]], "token id is 2000, expected 0 to 1023"),
        ([1] * 200, [[1] * 58], "context and choice have 258 tokens, expected at most 257"),
        ("T", ["o be"], "the context and a choice share no token"),
    ],
)
def test_invalid_choices(shakespeare: Model, context: Any, choices: Any, message: str) -> None:
    with raises_error(PromptError, message):
        shakespeare.score_choices(context, choices)


def test_a_choice_to_the_end_of_the_context(shakespeare: Model) -> None:
    [score] = shakespeare.score_choices([1] * 200, [[1] * 57])
    assert score.n_scored == 57


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_logprobs": -1}, "top_logprobs is -1, expected a whole number of at least 0"),
        ({"top_logprobs": 1025}, "top_logprobs is 1025, expected at most 1024 (the vocabulary)"),
        ({"batch_size": 0}, "batch_size is 0, expected a whole number of at least 1"),
        ({"allow_special": 1}, "allow_special is 1, expected True or False"),
    ],
)
def test_invalid_options(shakespeare: Model, options: Any, message: str) -> None:
    with raises_error(ParameterError, message):
        shakespeare.score(["To be"], **options)
    with raises_error(ParameterError, message):
        shakespeare.score_choices("To be", [" or"], **options)


def test_special_tokens_of_scores(shakespeare: Model) -> None:
    [score] = shakespeare.score(["<|endoftext|>O"], allow_special=True)
    assert score.tokens[0] == shakespeare.config.eos_token_id
    [choice] = shakespeare.score_choices("<|endoftext|>", ["O"], allow_special=True)
    assert choice.logprobs == [pytest.approx(score.logprobs[1], abs=1e-5)]
