"""`n` and `best_of`: several continuations of one prompt, which is read once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

import gptx
from gptx.backends import get_backend
from gptx.errors import Interrupted, ParameterError
from gptx.generation.engine import TokenGenerator
from gptx.generation.params import SamplingParams
from gptx.generation.results import Result
from gptx.generation.text_model import Model
from tests.support.backends import make_backend
from tests.support.cli import raises_error
from tests.support.models import make_model
from tests.support.random_models import CASES

CONFIG = replace(CASES["124M"], n_layer=1, n_head=3)
WARM: Any = {"temperature": 1.0, "seed": 5, "max_tokens": 7}
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(params=["numpy", "mlx"], scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    """A small model on two array libraries."""
    return make_model(CONFIG, make_backend(request.param))


def tokens_of(results: list[Result]) -> list[list[int]]:
    return [result.tokens for result in results]


def test_copies_are_those_of_a_list_of_prompts(model: Model) -> None:
    copies = model.generate(PROMPT, n=3, **WARM)
    assert tokens_of(copies) == tokens_of(model.generate([PROMPT] * 3, **WARM))
    assert len({tuple(ids) for ids in tokens_of(copies)}) == 3
    assert tokens_of(model.generate(PROMPT, n=3, **WARM)) == tokens_of(copies)
    assert tokens_of(model.generate(PROMPT, n=2, **WARM)) == tokens_of(copies)[:2]


def test_copies_of_several_prompts_are_in_order(model: Model) -> None:
    other = [1, 2]
    results = model.generate([PROMPT, other, PROMPT], n=2, **WARM)
    assert [result.prompt for result in results] == [PROMPT, PROMPT, other, other, PROMPT, PROMPT]
    expected = model.generate([PROMPT] * 4, **WARM)
    assert tokens_of(results[:2] + results[4:]) == tokens_of(expected)
    assert tokens_of(results[2:4]) == tokens_of(model.generate([other] * 2, **WARM))


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> tuple[Model, list[tuple[int, ...]]]:
    """A model that runs op by op, and the shapes of all inputs of its linear layers so far."""
    backend = get_backend("numpy", compile=False)
    shapes: list[tuple[int, ...]] = []
    real = backend.linear

    def linear(x: Any, weight: Any, bias: Any) -> Any:
        shapes.append(tuple(x.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(backend, "linear", linear)
    return make_model(CONFIG, backend), shapes


@pytest.mark.parametrize("batch_size", [8, 3])
def test_a_prompt_is_read_once(ops: tuple[Model, list[tuple[int, ...]]], batch_size: int) -> None:
    """Ops of the prefill: those of one sequence; of each decode step: those of eight."""
    model, shapes = ops
    model.generate(PROMPT, **WARM)
    single = list(shapes)
    shapes.clear()
    model.generate(PROMPT, n=8, batch_size=batch_size, **WARM)
    n_ops = 4 * CONFIG.n_layer
    assert shapes[:n_ops] == single[:n_ops] == [(1, len(PROMPT), n) for _, _, n in single[:n_ops]]
    assert shapes[n_ops:] == [(8, 1, n) for _, _, n in single[n_ops:]]


def test_batches_have_whole_prompts(ops: tuple[Model, list[tuple[int, ...]]]) -> None:
    model, shapes = ops
    prompts = [[i, i + 1] for i in range(5)]
    results = model.generate(prompts, n=2, batch_size=4, **WARM)
    prefills = [shape[0] for shape in shapes if shape[1] > 1]
    assert prefills[:: 4 * CONFIG.n_layer] == [2, 2, 1]
    for prompt, first in zip(prompts, results[::2], strict=True):
        assert first.tokens == model.generate(prompt, **WARM).tokens


def test_with_n_the_result_is_a_list(model: Model) -> None:
    [one] = model.generate(PROMPT, n=1, **WARM)
    assert one.tokens == model.generate(PROMPT, **WARM).tokens
    assert isinstance(model.generate(PROMPT, best_of=2, **WARM), Result)


def test_the_functions_of_the_package(model: Model) -> None:
    found = gptx.generate(PROMPT, model=model, n=2, **WARM)
    assert tokens_of(found) == tokens_of(model.generate(PROMPT, n=2, **WARM))
    chunks = list(gptx.stream(PROMPT, model=model, n=2, **WARM))
    assert {chunk.sequence for chunk in chunks} == {0, 1}
    with raises_error(ParameterError, "best_of is 3, above n"):  # before the search for a model
        gptx.stream("O", model="./nowhere", best_of=3)


def test_a_cache_and_copies(model: Model) -> None:
    cache = model.prefill(PROMPT[:4])
    found = model.generate(PROMPT, n=3, cache=cache, **WARM)
    assert tokens_of(found) == tokens_of(model.generate(PROMPT, n=3, **WARM))


def test_copies_that_end_or_slide_continue_as_alone(model: Model) -> None:
    params = SamplingParams(temperature=1.0, seed=5)
    prompt = list(range(60))  # of a context of 64
    options: Any = {"max_tokens": 16, "overflow": "slide", "eos_ids": list(range(100, 108))}
    runs = [
        TokenGenerator(model.gpt2, [prompt], params, copies=4, **options),
        TokenGenerator(model.gpt2, [prompt] * 4, params, **options),
    ]
    found, expected = ([[(t.sequence, t.id) for t in step] for step in run] for run in runs)
    assert found == expected
    assert len(found[-1]) < 4  # some have ended before


def test_best_of_returns_the_most_probable_ones(model: Model) -> None:
    made = model.generate(PROMPT, n=6, logprobs=True, **WARM)

    def mean(result: Result) -> float:
        assert result.logprobs is not None
        return math.fsum(result.logprobs) / len(result.logprobs)

    expected = sorted(made, key=mean, reverse=True)
    best = model.generate(PROMPT, n=2, best_of=6, **WARM)
    assert tokens_of(best) == tokens_of(expected[:2])
    assert [result.logprobs for result in best] == [None, None]
    one = model.generate(PROMPT, best_of=6, logprobs=True, **WARM)
    assert one.tokens == best[0].tokens
    assert one.logprobs == expected[0].logprobs


def test_best_of_counts_the_end_token(model: Model) -> None:
    """A sequence that only has an end token has the mean of one token."""
    ends = model.generate(PROMPT, n=4, **WARM)
    first = [result.tokens[0] for result in ends]
    options = WARM | {"stop_token_ids": first}
    results = model.generate(PROMPT, n=4, logprobs=True, **options)
    assert [len(result.logprobs or []) for result in results] == [1] * 4
    best = model.generate(PROMPT, best_of=4, **options)
    assert best.stopped_by == max(results, key=lambda x: (x.logprobs or [0])[0]).stopped_by


def test_a_stream_of_copies_alternates(model: Model) -> None:
    chunks = list(model.stream(PROMPT, n=2, **WARM))
    assert [chunk.sequence for chunk in chunks] == [0, 1] * 7
    results = [chunk.result for chunk in chunks if chunk.result is not None]
    assert tokens_of(results) == tokens_of(model.generate(PROMPT, n=2, **WARM))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0, expected a whole number of at least 1"),
        ({"n": 1.5}, "n is 1.5, expected a whole number"),
        ({"n": True}, "n is True, expected a whole number"),
        ({"best_of": 0}, "best_of is 0, expected a whole number of at least 1"),
        ({"n": 3, "best_of": 2}, "best_of is 2, expected at least n, which is 3"),
    ],
)
def test_invalid_numbers_of_copies(model: Model, options: Any, message: str) -> None:
    with raises_error(ParameterError, message):
        model.generate(PROMPT, **(WARM | options))


def test_a_stream_has_no_best_ones(model: Model) -> None:
    with raises_error(ParameterError, "best_of is 3, above n: the best ones are known at the end"):
        model.stream(PROMPT, best_of=3, **WARM)


def test_an_interrupt_keeps_the_best_ones_so_far(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TokenGenerator.__iter__

    def steps(self: TokenGenerator) -> Any:
        for i, step in enumerate(real(self)):
            if i == 3:
                raise KeyboardInterrupt
            yield step

    whole = model.generate(PROMPT, n=2, best_of=4, **(WARM | {"max_tokens": 3}))
    monkeypatch.setattr(TokenGenerator, "__iter__", steps)
    with pytest.raises(Interrupted) as caught:
        model.generate(PROMPT, n=2, best_of=4, **WARM)
    assert tokens_of(caught.value.results) == tokens_of(whole)
