"""The sampler: the order of its steps, penalties, equal tokens on all backends, parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gptx.backends import Backend
from gptx.errors import ParameterError
from gptx.generation import sampling
from gptx.generation.params import SamplingParams
from gptx.generation.sampling import uniform
from tests.support.backends import make_backend
from tests.support.sampling_reference import (
    INF,
    NUMPY,
    Floats,
    make_sampler,
    min_p,
    step,
    top_k,
    top_p,
)

GREEDY = SamplingParams()


def test_the_own_sampler_of_a_backend_has_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    own = object()
    arguments: Any = (GREEDY, NUMPY, [[1, 2], [3]], [0, 1], 5)
    assert isinstance(sampling.make_sampler(*arguments), sampling.Sampler)
    monkeypatch.setattr(NUMPY, "sampler", lambda params, *rest: (own, params, *rest))
    assert sampling.make_sampler(*arguments) == (own, GREEDY, [[1, 2], [3]], [0, 1], 5, None)


@pytest.mark.parametrize(
    "options",
    [
        {"typical_p": 0.5},
        {"sequence_bias": {(1, 2): 1.0}},
        {"ban": [[1]]},
        {"no_repeat_ngram_size": 2},
        {"dry_multiplier": 1.0},
        {"min_tokens": 1},
        {"logits_processor": lambda ids, x: x},
    ],
    ids=lambda options: next(iter(options)),
)
def test_steps_that_only_the_generic_sampler_has(library: Backend, options: dict[str, Any]) -> None:
    made = make_sampler(library, (1, 5), temperature=1.0, **options)
    assert isinstance(made.sampler, sampling.Sampler)


def test_greedy_takes_the_largest_logit(library: Backend, random: np.random.Generator) -> None:
    x = random.normal(0, 3, (20, 97)).astype(np.float32)
    assert step(make_sampler(library, x.shape), x) == np.argmax(x, axis=-1).tolist()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_a_filter_that_keeps_one_token_takes_the_largest_logit(
    library: Backend, random: np.random.Generator, options: dict[str, Any]
) -> None:
    x = random.normal(0, 3, (20, 97)).astype(np.float32)
    sampler = make_sampler(library, x.shape, temperature=1.5, seed=1, **options)
    assert step(sampler, x) == np.argmax(x, axis=-1).tolist()


def test_a_tiny_temperature_takes_the_largest_logit(library: Backend) -> None:
    x = np.array([[-101.0, -100.0, -90.0, -102.0], [3.0, 30.0, 20.0, 10.0]])
    for temperature in (1e-6, 1e-30, 1e-37, 1e-40, 1e-46, 5e-324):
        assert step(make_sampler(library, x.shape, temperature=temperature, seed=1), x) == [2, 1]


def test_logit_bias_favors_and_bans_tokens(library: Backend) -> None:
    x = [[3.0, 2.0, 1.0]]
    assert step(make_sampler(library, (1, 3), logit_bias={0: -1.5}), x) == [1]
    assert step(make_sampler(library, (1, 3), logit_bias={2: 2.5}), x) == [2]
    assert step(make_sampler(library, (1, 3), logit_bias={0: -INF, 1: -INF}), x) == [2]


def test_a_banned_token_is_never_drawn(library: Backend) -> None:
    sampler = make_sampler(
        library, (300, 4), temperature=1.0, seed=0, logit_bias={0: -INF, 2: -INF}
    )
    assert set(step(sampler, np.tile([9.0, 0.0, 9.0, 0.0], (300, 1)))) == {1, 3}


def test_repetition_penalty_of_prompt_tokens(library: Backend) -> None:
    for logits, penalty, expected in [
        ([2.0, 1.5], 1.3, 0),  # 2 / 1.3 = 1.538
        ([2.0, 1.5], 1.4, 1),  # 2 / 1.4 = 1.429
        ([-1.0, -1.4], 1.3, 0),  # -1 * 1.3
        ([-1.0, -1.4], 1.5, 1),  # -1 * 1.5
        ([1.0, 1.5], 0.5, 0),  # 1 / 0.5 = 2: a penalty below 1 favors
        ([0.0, -0.1], 9.0, 0),  # 0 stays 0
    ]:
        # The prompt has token 0 three times, which counts once.
        sampler = make_sampler(library, (1, 2), prompts=[[0, 0, 0]], repetition_penalty=penalty)
        assert step(sampler, [logits]) == [expected]


def test_repetition_penalty_of_output_tokens(library: Backend) -> None:
    sampler = make_sampler(library, (1, 3), prompts=[[2]], repetition_penalty=2.0)
    # Once drawn, 3 -> 1.5 and 1.6 -> 0.8; the prompt's 2.8 is 1.4 from the start.
    assert [step(sampler, [[3.0, 1.6, 2.8]])[0] for _ in range(4)] == [0, 1, 0, 0]


def test_presence_penalty_counts_an_output_token_once(library: Backend) -> None:
    sampler = make_sampler(library, (1, 3), prompts=[[0, 2]], presence_penalty=0.5)
    # The prompt does not count. 1 -> 0.5, then 0.6 -> 0.1.
    assert [step(sampler, [[1.0, 0.6, 0.0]])[0] for _ in range(5)] == [0, 1, 0, 0, 0]


def test_frequency_penalty_counts_each_output_token(library: Backend) -> None:
    sampler = make_sampler(library, (1, 3), prompts=[[0, 2]], frequency_penalty=0.15)
    # 1, 0.85, 0.7, 0.55 against 0.6, 0.45, 0.3
    found = [step(sampler, [[1.0, 0.6, 0.0]])[0] for _ in range(7)]
    assert found == [0, 0, 0, 1, 0, 1, 0]


def test_each_sequence_has_its_own_penalties(library: Backend) -> None:
    sampler = make_sampler(
        library, (3, 3), prompts=[[0], [1], []], repetition_penalty=4.0, presence_penalty=0.1
    )
    assert step(sampler, [[3.0, 2.0, 1.0]] * 3) == [1, 0, 0]


# Each step on float64 logits of one row; the prompt and the output have token 0.
STEPS: dict[str, Callable[[Floats, Any], Floats]] = {
    "logit_bias": lambda x, bias: x + np.array([bias.get(i, 0.0) for i in range(len(x))]),
    "repetition_penalty": lambda x, p: np.concatenate(
        [[x[0] / p if x[0] > 0 else x[0] * p], x[1:]]
    ),
    "frequency_penalty": lambda x, p: np.concatenate([[x[0] - p], x[1:]]),
    "temperature": lambda x, t: x / t,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
}


def support(logits: list[float], params: dict[str, Any], order: list[str]) -> set[int]:
    x = np.array(logits)
    for name in order:
        if name in params:
            x = STEPS[name](x, params[name])
    return {int(i) for i in np.flatnonzero(x > -INF)}


@pytest.mark.parametrize(
    ("first", "second", "params", "logits"),
    [
        # (2 + 2) / 2 = 2, not 2 / 2 + 2 = 3
        (
            "logit_bias",
            "repetition_penalty",
            {"logit_bias": {0: 2.0}, "repetition_penalty": 2.0, "min_p": 0.5},
            [2.0, 2.0],
        ),
        # 4 / 2 - 1 = 1, not (4 - 1) / 2 = 1.5
        (
            "repetition_penalty",
            "frequency_penalty",
            {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "min_p": 0.7},
            [4.0, 1.0, 1.6],
        ),
        # (2 - 0.9) / 0.5 = 2.2, not 2 / 0.5 - 0.9 = 3.1; against 2
        (
            "frequency_penalty",
            "temperature",
            {"frequency_penalty": 0.9, "temperature": 0.5, "min_p": 0.5},
            [2.0, 1.0],
        ),
        # top_k is off: it keeps the same tokens at any temperature
        ("temperature", "top_p", {"temperature": 3.0, "top_p": 0.7}, [3.0, 1.0, 0.0]),
        # 0.4 and 0.3 are 0.57 and 0.43 of the first two, 0.4 and 0.3 of all
        (
            "top_k",
            "top_p",
            {"top_k": 2, "top_p": 0.5},
            [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)],
        ),
        # without the last one, 0.5 is 0.71 of the rest
        (
            "top_p",
            "min_p",
            {"top_p": 0.65, "min_p": 0.35},
            [math.log(p) for p in (0.5, 0.2, 0.15, 0.15)],
        ),
    ],
)
def test_order_of_the_steps(
    library: Backend, first: str, second: str, params: dict[str, Any], logits: list[float]
) -> None:
    order = list(STEPS)
    swapped = order.copy()
    i, j = order.index(first), order.index(second)
    swapped[i], swapped[j] = second, first
    expected = support(logits, params, order)
    assert support(logits, params, swapped) != expected, "both orders give the same tokens"
    n, vocab_size = 200, len(logits)
    sampler = make_sampler(
        library, (n, vocab_size), prompts=[[0]] * n, **{"temperature": 1.0, "seed": 0} | params
    )
    sure = np.full((n, vocab_size), -1000.0)
    sure[:, 0] = 1000.0
    assert set(step(sampler, sure)) == {0}  # the output now has it, too
    assert set(step(sampler, np.tile(logits, (n, 1)))) == expected


ALL = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.02,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "logit_bias": {3: -INF, 5: 1.0},
}


@pytest.mark.parametrize("options", [{"temperature": 1.0}, ALL], ids=["plain", "everything"])
def test_same_tokens_on_every_backend(
    library: Backend, random: np.random.Generator, options: dict[str, Any]
) -> None:
    def continue_(on: Backend) -> list[list[int]]:
        sampler = make_sampler(on, (16, 97), prompts=[[i] for i in range(16)], seed=11, **options)
        return [step(sampler, x) for x in logits]

    logits = random.normal(0, 3, (6, 16, 97)).astype(np.float32)
    expected = continue_(make_backend("numpy-generic"))
    assert continue_(library) == expected
    assert len({tuple(tokens) for tokens in expected}) == 6


def test_rows_that_stay_get_the_tokens_of_a_separate_run(
    library: Backend, random: np.random.Generator
) -> None:
    logits = random.normal(0, 2, (6, 5, 31)).astype(np.float32)
    prompts, streams = [[i, i + 1] for i in range(5)], [0, 4, 1, 7, 2]
    sampler = make_sampler(library, (5, 31), prompts=prompts, streams=streams, seed=2, **ALL)
    found = [step(sampler, x) for x in logits[:3]]
    sampler.sampler.keep([3, 1])
    found += [step(sampler, x[[3, 1]]) for x in logits[3:]]
    for i, row in enumerate([3, 1]):
        single = make_sampler(
            library, (1, 31), prompts=[prompts[row]], streams=[streams[row]], seed=2, **ALL
        )
        expected = [step(single, x[[row]])[0] for x in logits]
        assert [tokens[row] for tokens in found[:3]] + [t[i] for t in found[3:]] == expected


def test_streams_differ_and_equal_streams_agree() -> None:
    x = np.zeros((4, 1000))
    sampler = make_sampler(NUMPY, x.shape, streams=[0, 1, 0, 2], temperature=1.0, seed=5)
    for _ in range(3):
        a, b, c, d = step(sampler, x)
        assert a == c
        assert len({a, b, d}) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_number_of_the_step_decides_the_draw(temperature: float) -> None:
    logits = np.zeros((2, 100))
    sampler = make_sampler(NUMPY, logits.shape, temperature=temperature, seed=5)
    assert sampler.sampler.steps == [0, 0]
    for n in range(3):
        expected = [int(100 * uniform(5, stream, n)) for stream in (0, 1)]
        assert step(sampler, logits) == (expected if temperature else [0, 0])
    assert sampler.sampler.steps == [3, 3]


BAD = [[1.0, math.nan, 2.0], [1.0, INF, 2.0], [1.0, 2.0, -INF], [INF, -INF, 0.0], [math.nan] * 3]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 2, "top_p": 0.9, "min_p": 0.1, "seed": 0}


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_number_that_is_not_finite_affects_its_row_only(
    library: Backend, options: dict[str, Any]
) -> None:
    for bad in BAD:
        sampler = make_sampler(library, (3, 3), repetition_penalty=1.1, **options)
        assert step(sampler, [[0.0, 90.0, 0.0], bad, [0.0, 0.0, 90.0]]) == [1, -1, 2]


# Parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-0.1, math.nan, INF, "1", True, None)],
        *[("top_k", value) for value in (-1, 1.5, 2.0, "3", True, None)],
        *[(name, value) for name in ("top_p", "min_p") for value in (-0.01, 1.01, math.nan, "1")],
        *[("repetition_penalty", value) for value in (0, -1.0, math.nan, INF)],
        *[("presence_penalty", value) for value in (math.nan, -INF, "0", False)],
        *[("frequency_penalty", value) for value in (math.nan, INF, [0], False)],
        *[("seed", value) for value in (-1, 2**64, 1.0, "1", True)],
        *[("logit_bias", {1: value}) for value in (math.nan, INF, "1", None, True)],
        *[("logit_bias", {token: 1.0}) for token in ("1", 1.5, True, None)],
    ],
    ids=str,
)
def test_the_error_of_a_parameter_names_it(name: str, value: Any) -> None:
    shown = next(iter(value.values())) if name == "logit_bias" else value
    with pytest.raises(ParameterError, match=name) as error:
        SamplingParams(**{name: value})
    assert str(shown) in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.uint64(2**64 - 1)},
        {"temperature": 1, "top_p": 1, "min_p": 0, "repetition_penalty": 1},
        {"logit_bias": {np.int32(1): np.float64(2)}},
        {"presence_penalty": -2.0, "frequency_penalty": -2.0},
    ],
    ids=str,
)
def test_valid_parameters(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    assert all(getattr(params, name) == value for name, value in options.items())


def test_the_default_is_greedy_with_every_other_step_off(random: np.random.Generator) -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=0.1).greedy
    x = random.normal(0, 3, (4, 50))
    sampler = make_sampler(NUMPY, x.shape, prompts=[[int(i)] for i in x.argmax(axis=-1)])
    assert [step(sampler, x) for _ in range(2)] == [x.argmax(axis=-1).tolist()] * 2


def test_logit_bias_none_is_no_bias() -> None:
    assert SamplingParams(logit_bias=None).logit_bias == {}  # type: ignore[arg-type]


def test_logit_bias_is_a_copy() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[2] = 3.0
    assert params.logit_bias == {1: 2.0}


@pytest.mark.parametrize("token", [-1, 5, 10**12])
def test_logit_bias_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(ParameterError, match=rf"logit_bias has token {token}, expected 0 to 4"):
        SamplingParams(logit_bias={token: 1.0}).check_bias(5)
