"""Options that depend on the tokens so far, in requests: texts, bans, the caller's function."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptx.errors import ParameterError, TokenizerError
from gptx.generation.params import SamplingParams
from gptx.generation.text_model import Model
from tests.support.backends import make_backend
from tests.support.cli import raises_error
from tests.support.models import make_model
from tests.support.random_models import CASES

CONFIG = replace(CASES["124M"], n_layer=1, n_head=3)
PROMPT = [5, 6, 7]
INF = math.inf
WARM: Any = {"temperature": 1.0, "seed": 5, "max_tokens": 12}


@pytest.fixture(params=["numpy", "mlx", "strict"], scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    """A small model on each array library."""
    return make_model(CONFIG, make_backend(request.param))


def ngrams(ids: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_appears_twice(model: Model, n: int) -> None:
    options: Any = {"logit_bias": {1: 20.0, 2: 20.0, 3: 20.0}, "no_repeat_ngram_size": n}
    results = model.generate([PROMPT, [1, 2]], **options, **WARM)
    for result in results:
        found = ngrams([*result.prompt_ids, *result.tokens], n)
        assert len(set(found)) == len(found)


def test_a_sequence_that_is_banned_does_not_appear(model: Model) -> None:
    options: Any = {"logit_bias": {1: 50.0, 2: 50.0}, "max_tokens": 30, "seed": 5, "temperature": 1}
    free = model.generate(PROMPT, **options).tokens
    assert (1, 2) in ngrams(free, 2)
    banned = model.generate(PROMPT, ban=[[1, 2], [2, 2, 2]], **options).tokens
    assert (1, 2) not in ngrams(banned, 2)
    assert (2, 2, 2) not in ngrams(banned, 3)
    assert set(banned) <= {1, 2}


def test_a_bias_completes_a_sequence(model: Model) -> None:
    result = model.generate(
        [1, 2], sequence_bias={(1, 2, 3): 99.0, (3, 4): 99.0, (2, 4): -99.0}, max_tokens=2
    )
    assert result.tokens == [3, 4]


def test_rows_keep_their_history_when_others_leave(model: Model) -> None:
    """With copies, an end token for some of them, and a context that slides."""
    options: Any = WARM | {"no_repeat_ngram_size": 2, "dry_multiplier": 2.0, "max_tokens": 20}
    options |= {"stop_token_ids": list(range(60)), "overflow": "slide", "min_tokens": 3}
    prompts = [list(range(55)), PROMPT, [9, 9, 9, 9]]
    together = model.generate(prompts, n=2, **options)
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt, n=2, **options)
        assert [r.tokens for r in alone] == [r.tokens for r in together[2 * i : 2 * i + 2]]
    assert len({len(result.tokens) for result in together}) > 1


def test_a_function_of_the_caller_gets_the_tokens_and_the_logits(model: Model) -> None:
    seen: list[tuple[list[int], tuple[int, ...]]] = []

    def choose(ids: list[int], logits: Any) -> Any:
        seen.append((list(ids), tuple(logits.shape)))
        ids.clear()  # a copy
        return logits + model.backend.asarray(np.eye(211, dtype=np.float32)[len(seen)] * 1e4)

    result = model.generate(PROMPT, logits_processor=choose, max_tokens=3)
    assert result.tokens == [1, 2, 3]
    assert seen == [(PROMPT, (211,)), ([*PROMPT, 1], (211,)), ([*PROMPT, 1, 2], (211,))]


@pytest.mark.parametrize("name", ["numpy", "mlx"])
def test_a_function_may_write_to_its_logits(name: str) -> None:
    """And return NumPy's arrays; the model's logits do not change."""
    model = make_model(CONFIG, make_backend(name))

    def write(ids: list[int], logits: Any) -> Any:
        logits[:] = -math.inf
        logits[len(ids)] = 1.0
        return np.asarray(logits) if len(ids) % 2 else logits

    result = model.generate(PROMPT, logits_processor=write, logprobs=True, max_tokens=3)
    assert result.tokens == [3, 4, 5]
    assert result.logprobs is not None
    assert all(map(math.isfinite, result.logprobs))


def test_a_function_is_of_its_call_only(model: Model) -> None:
    plain = model.generate(PROMPT, **WARM).tokens
    model.generate(PROMPT, logits_processor=lambda ids, x: x * 0.0, **WARM)
    assert model.generate(PROMPT, **WARM).tokens == plain
    identity = model.generate(PROMPT, logits_processor=lambda ids, x: x, **WARM)
    assert identity.tokens == plain


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda ids, x: None, "logits_processor returned None, expected an array of 211 logits"),
        (lambda ids, x: x[:5], "expected an array of 211 logits"),
        (lambda ids, x: x * math.nan, "no token is left after the tokens so far"),
        (lambda ids, x: x - math.inf, "no token is left after the tokens so far"),
    ],
)
def test_a_result_of_a_function_that_is_invalid(model: Model, function: Any, message: str) -> None:
    with raises_error(ParameterError, message):
        model.generate(PROMPT, logits_processor=function, max_tokens=3)
    assert len(model.generate(PROMPT, max_tokens=2).tokens) == 2


def test_an_error_of_the_function_is_its_own(model: Model) -> None:
    def fail(ids: list[int], x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(PROMPT, logits_processor=fail, max_tokens=3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bans", "message"),
    [
        (
            {"ban": [[i] for i in range(100)], "logit_bias": dict.fromkeys(range(99, 211), -INF)},
            "ban bans every token",
        ),
        (
            {"ban": [[PROMPT[-1], i] for i in range(211)]},
            "no token is left after the tokens so far",
        ),
    ],
    ids=["always", "after the prompt"],
)
def test_bans_that_leave_no_token(
    model: Model, temperature: float, bans: Any, message: str
) -> None:
    options: Any = {"temperature": temperature, "seed": 1, "max_tokens": 3}
    with raises_error(ParameterError, message):
        model.generate(PROMPT, **bans, **options)
    assert len(model.generate(PROMPT, **options).tokens) == 3


# Texts


def test_a_text_that_is_banned(shakespeare: Model) -> None:
    plain = str(shakespeare.generate("ROMEO:", max_tokens=20))
    assert " my" in plain
    banned = str(shakespeare.generate("ROMEO:", max_tokens=20, ban="my"))
    assert " my" not in banned
    ids = [shakespeare.encode("my"), shakespeare.encode(" my")]
    assert str(shakespeare.generate("ROMEO:", max_tokens=20, ban=ids)) == banned


def test_a_bias_of_a_text(shakespeare: Model) -> None:
    ids = tuple(shakespeare.encode(" banished"))
    options: Any = {"max_tokens": 20}
    found = shakespeare.generate("ROMEO:", sequence_bias={" banished": 4.0}, **options)
    assert (
        found.tokens == shakespeare.generate("ROMEO:", sequence_bias={ids: 4.0}, **options).tokens
    )
    both: Any = {" banished": 1.0, ids: 2.0}
    with raises_error(ParameterError, "sequence_bias has", "give them once"):
        shakespeare.generate("ROMEO:", sequence_bias=both)


def test_breakers_of_dry(shakespeare: Model) -> None:
    """A string is every token with it; by default llama.cpp's."""
    options: Any = {"dry_multiplier": 4.0, "dry_allowed_length": 1, "max_tokens": 60}
    found = shakespeare.generate("ROMEO:", **options).tokens
    ids = [i for i in range(1024) if set('\n:"*') & set(shakespeare.decode([i]))]
    same = shakespeare.generate("ROMEO:", dry_sequence_breakers=ids, **options)
    assert same.tokens == found
    none = shakespeare.generate("ROMEO:", dry_sequence_breakers=[], **options)
    assert none.tokens != found
    with raises_error(ParameterError, "dry_sequence_breakers has 'zzzzzz', expected a string that"):
        shakespeare.generate("ROMEO:", dry_sequence_breakers=["zzzzzz"], **options)


def test_a_model_without_a_tokenizer(model: Model) -> None:
    for options in ({"ban": "a"}, {"sequence_bias": {"a": 1.0}}):
        with pytest.raises(TokenizerError, match="no tokenizer"):
            model.generate(PROMPT, **options)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="no tokenizer"):
        model.generate(PROMPT, dry_multiplier=1.0, dry_sequence_breakers=["a"])
    found = model.generate(PROMPT, dry_multiplier=1.0, max_tokens=3)  # without breakers
    assert len(found.tokens) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"typical_p": 1.1}, "typical_p is 1.1, expected a number from 0 to 1"),
        ({"typical_p": True}, "typical_p is True, expected a number from 0 to 1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1, expected a whole number of at"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size is 1.5, expected a whole number"),
        ({"dry_multiplier": -1}, "dry_multiplier is -1, expected a number from 0 to 1e+06"),
        ({"dry_base": 0.5}, "dry_base is 0.5, expected a number from 1 to 1e+06"),
        (
            {"dry_allowed_length": 0},
            "dry_allowed_length is 0, expected a whole number of at least 1",
        ),
        ({"dry_range": -1}, "dry_range is -1, expected a whole number of at least 0"),
        ({"dry_sequence_breakers": 5}, "dry_sequence_breakers is 5, expected a list of texts"),
        ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers has '', expected texts of at"),
        ({"dry_sequence_breakers": [1.5]}, "dry_sequence_breakers has 1.5, expected texts"),
        ({"ban": 5}, "ban is 5, expected a text, or a list of texts and lists of token ids"),
        ({"ban": ""}, "ban has '', expected a text of at least one character, or a list of token"),
        ({"ban": [[]]}, "ban has [], expected a text"),
        ({"ban": [5]}, "ban has 5, expected a text"),
        ({"ban": [[1.5]]}, "ban has [1.5], expected a text"),
        ({"ban": [[211]]}, "ban has token 211, expected 0 to 210"),
        ({"ban": [[i] for i in range(211)]}, "ban bans every token: leave at least one"),
        ({"sequence_bias": [1]}, "sequence_bias is [1], expected a dict of text or tuple of token"),
        ({"sequence_bias": {5: 1.0}}, "sequence_bias has 5: 1.0, expected text or tuple of ids"),
        ({"sequence_bias": {(): 1.0}}, "sequence_bias has (): 1.0, expected text or tuple of ids"),
        ({"sequence_bias": {"": 1.0}}, "sequence_bias has '': 1.0, expected text or tuple of ids"),
        ({"sequence_bias": {(1,): "x"}}, "sequence_bias has (1,): 'x', expected text or tuple"),
        ({"sequence_bias": {(1,): math.inf}}, "sequence_bias of (1,) is inf, expected -inf, or"),
        ({"sequence_bias": {(1, 211): 1.0}}, "sequence_bias has token 211, expected 0 to 210"),
        ({"logits_processor": 5}, "logits_processor is 5, expected a function f(ids, logits)"),
        ({"min_tokens": 1.5}, "min_tokens is 1.5, expected a whole number of at least 0"),
    ],
)
def test_invalid_options(options: Any, message: str) -> None:
    model = make_model(CONFIG, make_backend("numpy-ops"))
    with raises_error(ParameterError, message):
        model.generate(PROMPT, **options)


def test_values_of_numpy() -> None:
    params = SamplingParams(
        ban=[np.array([1, 2]), np.array([3])],  # type: ignore[arg-type]
        no_repeat_ngram_size=np.int64(2),  # type: ignore[arg-type]
        typical_p=np.float32(0.5),
        sequence_bias={(np.int64(1), 2): np.float32(0.5)},
    )
    assert params.ban == ((1, 2), (3,))
    assert params.sequence_bias == {(1, 2): 0.5}
    assert type(params.no_repeat_ngram_size) is int
