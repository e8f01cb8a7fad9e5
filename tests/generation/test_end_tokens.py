"""Tokens that end a sequence: those of the model, `stop_token_ids`, `min_tokens`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptx.errors import ParameterError
from gptx.generation.text_model import Model
from tests.support.backends import make_backend
from tests.support.cli import raises_error
from tests.support.models import make_model
from tests.support.random_models import CASES

CONFIG = replace(CASES["124M"], n_layer=1, n_head=3, eos_token_id=(200, 201))
PROMPT = [5, 6, 7]


@pytest.fixture(params=["numpy", "mlx", "strict"], scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    """A small model on each array library."""
    return make_model(CONFIG, make_backend(request.param))


def bias(*ids: int) -> Any:
    """Return the options of an output of the first id, and of the second one if that is banned."""
    return {"logit_bias": {id: 1000.0 / 2**i for i, id in enumerate(ids)}, "max_tokens": 6}


@pytest.mark.parametrize("end", [200, 201, 3])
def test_a_result_has_the_token_that_ended_it(model: Model, end: int) -> None:
    result = model.generate(PROMPT, stop_token_ids=[3, 4], logprobs=True, **bias(end))
    assert (result.tokens, result.finish_reason, result.stopped_by) == ([], "stop", end)
    assert result.tokens_with_end == [end]
    assert result.logprobs is not None
    assert len(result.logprobs) == 1


def test_a_result_without_an_end(model: Model) -> None:
    result = model.generate(PROMPT, **bias(9))
    assert (result.tokens, result.finish_reason, result.stopped_by) == ([9] * 6, "length", None)
    assert result.tokens_with_end == [9] * 6


def test_ignore_eos_keeps_the_ends_of_the_request(model: Model) -> None:
    result = model.generate(PROMPT, stop_token_ids=[3], ignore_eos=True, **bias(200))
    assert (result.tokens, result.stopped_by) == ([200] * 6, None)
    result = model.generate(PROMPT, stop_token_ids=[3], ignore_eos=True, **bias(3, 200))
    assert (result.tokens, result.stopped_by) == ([], 3)


def test_a_stop_string_that_ended_a_result(shakespeare: Model) -> None:
    for stop in ("banish", ["zzz", " a", "\nI"]):
        result = shakespeare.generate("ROMEO:", max_tokens=20, stop=stop)
        assert result.finish_reason == "stop"
        assert result.stopped_by == (stop if isinstance(stop, str) else "\nI")


@pytest.mark.parametrize("min_tokens", [0, 1, 4, 6])
def test_no_end_comes_before_the_least_number_of_tokens(model: Model, min_tokens: int) -> None:
    """200, 201 and 3 are the most probable tokens; 9 comes after them."""
    options = bias(200, 201, 3, 9)
    result = model.generate(PROMPT, stop_token_ids=[3], min_tokens=min_tokens, **options)
    assert result.tokens == [9] * min_tokens
    assert result.stopped_by == (200 if min_tokens < 6 else None)


def test_the_least_number_counts_the_output_of_each_sequence(model: Model) -> None:
    prompts = [PROMPT, [1], [200] * 9]
    results = model.generate(prompts, min_tokens=3, **bias(200, 9))
    assert [result.tokens for result in results] == [[9] * 3] * 3


def test_ids_of_a_config_beyond_the_vocabulary(model: Model) -> None:
    config = replace(CONFIG, eos_token_id=50256)
    other = make_model(config, make_backend("numpy"))
    assert len(other.generate(PROMPT, min_tokens=2, max_tokens=3).tokens) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": 7}, "min_tokens is 7, max_tokens is 6: give a smaller min_tokens"),
        ({"min_tokens": -1}, "min_tokens is -1, expected a whole number of at least 0"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5, expected a list of token ids"),
        ({"stop_token_ids": "5"}, "stop_token_ids is '5', expected a list of token ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids is [True], expected a list of token ids"),
        ({"stop_token_ids": [211]}, "stop_token_ids has token 211, expected 0 to 210"),
        ({"stop_token_ids": [-1]}, "stop_token_ids has token -1, expected 0 to 210"),
        (
            {"stop_token_ids": list(range(211)), "min_tokens": 1},
            "no token is left after the tokens so far: logit_bias, sequence_bias, ban,",
        ),
    ],
)
def test_invalid_ends_leave_the_model_usable(model: Model, options: Any, message: str) -> None:
    with raises_error(ParameterError, message):
        model.generate(PROMPT, **({"max_tokens": 6} | options))
    assert len(model.generate(PROMPT, max_tokens=2).tokens) == 2
