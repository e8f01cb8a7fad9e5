"""Sampling: every filter against a plain float64 definition, the order of the steps, the draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import make_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptx.backends import Backend, get_backend
from gptx.errors import ParameterError
from gptx.sampling import (
    Sampler,
    SamplingParams,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_softmax,
    uniform,
)

Floats = NDArray[np.floating[Any]]
INF = math.inf
LARGEST_U = (2**24 - 1) / 2**24
NUMPY = get_backend("numpy")

# The definitions, in float64 NumPy, for one row.


def softmax(x: Floats) -> Floats:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def top_k(x: Floats, k: int) -> Floats:
    if k == 0:
        return x
    worst = sorted(x, reverse=True)[min(k, len(x)) - 1]
    return np.where(x < worst, -INF, x)


def top_p(x: Floats, p: float) -> Floats:
    if p == 1:
        return x
    probs = softmax(x)
    total = 0.0
    for worst in sorted(probs, reverse=True):
        total += worst
        if total >= p:
            break
    return np.where(probs < worst, -INF, x)


def min_p(x: Floats, p: float) -> Floats:
    probs = softmax(x)
    return np.where(probs < p * probs.max(), -INF, x)


def run_filter(
    keep: Callable[[Backend, Any, Any], Any], backend: Backend, x: Floats, at: float
) -> Floats:
    """One of gptx's filters on host logits [B, V]."""
    kept = keep(backend, backend.asarray(x.astype(np.float32), "float32"), at)
    return np.asarray(backend.to_numpy(kept))


def run_draw(backend: Backend, x: Floats, u: Floats) -> NDArray[np.integer[Any]]:
    """`draw` on host logits [B, V] and host numbers [B]."""
    logits = backend.asarray(x.astype(np.float32), "float32")
    return np.asarray(backend.to_numpy(draw(backend, logits, backend.asarray(u, "float32"))))


def make_sampler(
    backend: Backend,
    shape: tuple[int, ...],
    *,
    prompts: list[list[int]] | None = None,
    streams: list[int] | None = None,
    **params: Any,
) -> Sampler:
    n_rows, vocab_size = shape
    return Sampler(
        SamplingParams(**params),
        backend,
        [[]] * n_rows if prompts is None else prompts,
        list(range(n_rows)) if streams is None else streams,
        vocab_size,
    )


def step(sampler: Sampler, logits: Any) -> list[int]:
    """One step of a sampler on host logits [B, V], in the surroundings that the engine gives it."""
    backend = sampler.backend
    with backend.scope():
        ids = sampler(backend.asarray(np.asarray(logits, np.float32), "float32"))
        return [int(i) for i in backend.to_numpy(ids)]


# Filters

ROWS = {
    "random": np.random.default_rng(1).normal(0, 3, (8, 50)),
    "ties": np.array([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -1.0], [0.0] * 7]),
    "one token": np.array([[0.0, 900.0, 0.0, -5.0], [-INF, -INF, 7.0, -INF]]),
    "banned": np.array([[-INF, 2.0, 1.0, -INF, 0.5, -INF]]),
}
VALUES = {
    "top_k": (keep_top_k, top_k, (0, 1, 2, 3, 5, 49, 50, 51, 10**9)),
    "top_p": (keep_top_p, top_p, (0.0, 1e-6, 0.2, 0.55, 0.9, 0.999, 1.0)),
    "min_p": (keep_min_p, min_p, (0.0, 1e-6, 0.2, 0.55, 0.9, 1.0)),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("name", "at"), [(n, at) for n, row in VALUES.items() for at in row[2]])
def test_filter_is_its_definition(backend: Backend, name: str, at: float, rows: str) -> None:
    keep, definition, _ = VALUES[name]
    x = ROWS[rows].astype(np.float32)
    expected = np.stack([definition(row, at) for row in x])  # type: ignore[arg-type]
    np.testing.assert_array_equal(run_filter(keep, backend, x, at), expected)


@pytest.mark.parametrize("name", VALUES)
def test_filter_of_a_whole_vocabulary(name: str) -> None:
    keep, definition, _ = VALUES[name]
    x = np.random.default_rng(2).normal(0, 3, (2, 50257)).astype(np.float32)
    at = {"top_k": 40, "top_p": 0.9, "min_p": 0.05}[name]
    expected = np.stack([definition(row, at) for row in x])  # type: ignore[arg-type]
    np.testing.assert_array_equal(run_filter(keep, NUMPY, x, at), expected)


def test_top_p_counts_the_token_that_reaches_it(backend: Backend) -> None:
    x = np.log(np.array([[0.125, 0.5, 0.25, 0.125]]))
    for p, kept in [(0.49, [1]), (0.51, [1, 2]), (0.74, [1, 2]), (0.76, [0, 1, 2, 3])]:
        found = run_filter(keep_top_p, backend, x, p)
        assert np.flatnonzero(found[0] > -INF).tolist() == kept, p


def test_min_p_is_relative_to_the_best(backend: Backend) -> None:
    x = np.log(np.array([[0.1, 0.5, 0.26, 0.14]]))
    for p, kept in [(0.19, [0, 1, 2, 3]), (0.21, [1, 2, 3]), (0.29, [1, 2]), (0.53, [1])]:
        found = run_filter(keep_min_p, backend, x, p)
        assert np.flatnonzero(found[0] > -INF).tolist() == kept, p


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    st.sampled_from(list(VALUES)),
    st.integers(0, 14),
)
@settings(max_examples=200, deadline=None)
def test_filters_keep_the_best_and_change_nothing_they_keep(
    quarters: list[int], name: str, at: int
) -> None:
    x = np.array([quarters], np.float32) / 4
    kept = run_filter(VALUES[name][0], NUMPY, x, at if name == "top_k" else at / 14)
    assert kept.max() == x.max()
    assert np.all((kept == x) | (kept == -INF))
    assert np.max(x[kept == -INF], initial=-INF) < np.min(kept[kept > -INF])


# The draw


def test_draw_inverts_the_distribution(backend: Backend, random: np.random.Generator) -> None:
    x = random.normal(0, 3, (400, 300)).astype(np.float32)
    u = random.integers(0, 2**24, 400) / 2**24
    cdf = np.cumsum(np.stack([softmax(row) for row in x]), axis=-1)
    clear = np.abs(cdf - u[:, None]).min(axis=-1) > 1e-5  # where float32 cannot decide otherwise
    assert clear.sum() > 300
    expected = [np.searchsorted(row, at, side="right") for row, at in zip(cdf, u, strict=True)]
    np.testing.assert_array_equal(run_draw(backend, x, u)[clear], np.array(expected)[clear])


def test_draw_from_a_whole_vocabulary(random: np.random.Generator) -> None:
    x = random.normal(0, 2, (16, 50257)).astype(np.float32)
    u = random.integers(0, 2**24, 16) / 2**24
    cdf = np.cumsum(np.stack([softmax(row) for row in x]), axis=-1)
    found = run_draw(NUMPY, x, u)
    for row, token, at in zip(cdf, found, u, strict=True):
        assert row[token] - row[token - 1] > 0
        assert row[token - 1] - 1e-4 < at < row[token] + 1e-4


@pytest.mark.parametrize("u", [0.0, 2**-24, 0.5, LARGEST_U])
@pytest.mark.parametrize(
    "row",
    [
        [-INF, -INF, 1.0, 2.0],
        [1.0, 2.0, -INF, -INF],
        [-INF, 3.0, -INF, 3.0, -INF],
        [-INF, -INF, -INF, 0.0],
        [0.0, -INF, -INF, -INF],
        [-300.0, 5.0, -300.0],  # whose probabilities are 0 in float32
        [-INF, *[0.1 * (i % 7) for i in range(1000)], -INF, -INF],
    ],
)
def test_no_token_without_probability_is_drawn(
    backend: Backend, row: list[float], u: float
) -> None:
    x = np.array([row], np.float32)
    (token,) = run_draw(backend, x, np.array([u]))
    assert softmax(x[0]).astype(np.float32)[token] > 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_are_probable(backend: Backend, temperature: float) -> None:
    logits = np.array([1.0, 0.0, 2.0, -1.0, 1.5, 0.5, 0.25, -0.5])
    n = 4000
    sampler = make_sampler(backend, (n, len(logits)), temperature=temperature, seed=3)
    found = step(sampler, np.tile(logits, (n, 1)))
    expected = n * softmax(logits / temperature)
    counts = np.bincount(found, minlength=len(logits))
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 7 degrees of freedom: exceeded once in a thousand seeds


# Random numbers


def philox(seed: int, stream: int, count: int) -> float:
    """Philox4x64-10, written from the paper (Salmon et al., SC 2011, section 3.3)."""
    mask = 2**64 - 1
    # NumPy advances the counter before it uses it.
    a, b, c, d = count + 1, 0, 0, 0
    key0, key1 = seed, stream
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (right >> 64) ^ b ^ key0, right & mask, (left >> 64) ^ d ^ key1, left & mask
        key0, key1 = (key0 + 0x9E3779B97F4A7C15) & mask, (key1 + 0xBB67AE8584CAA73B) & mask
    return (a >> 40) / 2**24


@pytest.mark.parametrize(
    ("seed", "stream", "count", "numerator"),
    [
        (0, 0, 0, 193722),
        (0, 1, 0, 13645816),
        (0, 0, 1, 8428531),
        (42, 0, 7, 6835266),
        (123456789, 7, 100, 8197679),
        (2**63 - 1, 3, 1023, 16684418),
        (2**63, 3, 5, 5647773),
        (2**64 - 1, 0, 0, 3941665),
    ],
)
def test_seeds_keep_their_meaning(seed: int, stream: int, count: int, numerator: int) -> None:
    assert uniform(seed, stream, count) == numerator / 2**24


@given(
    st.integers(0, 2**64 - 1) | st.integers(2**63, 2**64 - 1),
    st.integers(0, 2**32),
    st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_uniform_is_philox(seed: int, stream: int, count: int) -> None:
    u = uniform(seed, stream, count)
    assert u == philox(seed, stream, count)
    assert 0 <= u < 1
    assert float(np.float32(u)) == u


def test_uniform_knows_no_order() -> None:
    forward = [uniform(5, stream, count) for stream in range(4) for count in range(8)]
    backward = [
        uniform(5, stream, count) for stream in range(3, -1, -1) for count in range(7, -1, -1)
    ]
    assert forward == backward[::-1]
    assert len(set(forward)) == len(forward)


def test_neighboring_seeds_differ_over_the_whole_range() -> None:
    seeds = [0, 1, 2, 2**53, 2**53 + 1, 2**63 + 4096, 2**63 + 4097, 2**64 - 2, 2**64 - 1]
    assert len({uniform(seed, 0, 0) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("along", ["seeds", "streams", "steps"])
def test_uniform_is_uniform(along: str) -> None:
    keys = {
        "seeds": [(i, 0, 0) for i in range(4096)],
        "streams": [(9, i, 0) for i in range(4096)],
        "steps": [(9, 0, i) for i in range(4096)],
    }
    counts, _ = np.histogram([uniform(*key) for key in keys[along]], bins=16, range=(0, 1))
    assert ((counts - 256) ** 2 / 256).sum() < 37.7  # 15 degrees of freedom: once in a thousand


# The sampler


def test_greedy_takes_the_best(backend: Backend, random: np.random.Generator) -> None:
    x = random.normal(0, 3, (20, 97)).astype(np.float32)
    assert step(make_sampler(backend, x.shape), x) == np.argmax(x, axis=-1).tolist()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_a_filter_down_to_one_token_takes_the_best(
    backend: Backend, random: np.random.Generator, options: dict[str, Any]
) -> None:
    x = random.normal(0, 3, (20, 97)).astype(np.float32)
    sampler = make_sampler(backend, x.shape, temperature=1.5, seed=1, **options)
    assert step(sampler, x) == np.argmax(x, axis=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-37, 1e-40, 1e-46, 5e-324])
def test_a_tiny_temperature_takes_the_best(backend: Backend, temperature: float) -> None:
    x = np.array([[-101.0, -100.0, -90.0, -102.0], [3.0, 30.0, 20.0, 10.0]])
    assert step(make_sampler(backend, x.shape, temperature=temperature, seed=1), x) == [2, 1]


def test_logit_bias_favors_and_bans(backend: Backend) -> None:
    x = [[3.0, 2.0, 1.0]]
    assert step(make_sampler(backend, (1, 3), logit_bias={0: -1.5}), x) == [1]
    assert step(make_sampler(backend, (1, 3), logit_bias={2: 2.5}), x) == [2]
    assert step(make_sampler(backend, (1, 3), logit_bias={0: -INF, 1: -INF}), x) == [2]


def test_a_banned_token_is_never_drawn(backend: Backend) -> None:
    sampler = make_sampler(
        backend, (300, 4), temperature=1.0, seed=0, logit_bias={0: -INF, 2: -INF}
    )
    assert set(step(sampler, np.tile([9.0, 0.0, 9.0, 0.0], (300, 1)))) == {1, 3}


@pytest.mark.parametrize(
    ("logits", "penalty", "expected"),
    [
        ([2.0, 1.5], 1.3, 0),  # 2 / 1.3 = 1.538
        ([2.0, 1.5], 1.4, 1),  # 2 / 1.4 = 1.429
        ([-1.0, -1.4], 1.3, 0),  # -1 * 1.3
        ([-1.0, -1.4], 1.5, 1),  # -1 * 1.5
        ([1.0, 1.5], 0.5, 0),  # 1 / 0.5 = 2: below 1 it favors
        ([0.0, -0.1], 9.0, 0),  # 0 stays 0
    ],
)
def test_repetition_penalty_of_prompt_tokens(
    backend: Backend, logits: list[float], penalty: float, expected: int
) -> None:
    # Token 0 is there three times, which counts once.
    sampler = make_sampler(backend, (1, 2), prompts=[[0, 0, 0]], repetition_penalty=penalty)
    assert step(sampler, [logits]) == [expected]


def test_repetition_penalty_of_output_tokens(backend: Backend) -> None:
    sampler = make_sampler(backend, (1, 3), prompts=[[2]], repetition_penalty=2.0)
    # 3 -> 1.5 once it has come; 1.6 -> 0.8 after it; the prompt's 4 is 2 from the start.
    assert [step(sampler, [[3.0, 1.6, 2.8]])[0] for _ in range(4)] == [0, 1, 0, 0]


def test_presence_penalty_counts_output_once(backend: Backend) -> None:
    sampler = make_sampler(backend, (1, 3), prompts=[[0, 2]], presence_penalty=0.5)
    # The prompt does not count. 1 -> 0.5 once and for all, then 0.6 -> 0.1.
    assert [step(sampler, [[1.0, 0.6, 0.0]])[0] for _ in range(5)] == [0, 1, 0, 0, 0]


def test_frequency_penalty_counts_output_each_time(backend: Backend) -> None:
    sampler = make_sampler(backend, (1, 3), prompts=[[0, 2]], frequency_penalty=0.15)
    # 1, 0.85, 0.7, 0.55 against 0.6, 0.45, 0.3
    found = [step(sampler, [[1.0, 0.6, 0.0]])[0] for _ in range(7)]
    assert found == [0, 0, 0, 1, 0, 1, 0]


def test_penalties_are_of_each_sequence(backend: Backend) -> None:
    sampler = make_sampler(
        backend, (3, 3), prompts=[[0], [1], []], repetition_penalty=4.0, presence_penalty=0.1
    )
    assert step(sampler, [[3.0, 2.0, 1.0]] * 3) == [1, 0, 0]


# What each step does to float64 logits of one row; token 0 was in the prompt and in the output.
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
        # top_k keeps the same tokens at any temperature: here it is off
        ("temperature", "top_p", {"temperature": 3.0, "top_p": 0.7}, [3.0, 1.0, 0.0]),
        # 0.4 and 0.3 make 0.57 and 0.43 of the best two, 0.4 and 0.3 of all
        (
            "top_k",
            "top_p",
            {"top_k": 2, "top_p": 0.5},
            [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)],
        ),
        # without the last, 0.5 is 0.71 of what is left
        (
            "top_p",
            "min_p",
            {"top_p": 0.65, "min_p": 0.35},
            [math.log(p) for p in (0.5, 0.2, 0.15, 0.15)],
        ),
    ],
)
def test_order_of_the_steps(
    backend: Backend, first: str, second: str, params: dict[str, Any], logits: list[float]
) -> None:
    order = list(STEPS)
    swapped = order.copy()
    i, j = order.index(first), order.index(second)
    swapped[i], swapped[j] = second, first
    expected = support(logits, params, order)
    assert support(logits, params, swapped) != expected, "this case would not tell the orders apart"
    n, vocab_size = 400, len(logits)
    sampler = make_sampler(
        backend, (n, vocab_size), prompts=[[0]] * n, **{"temperature": 1.0, "seed": 0} | params
    )
    sure = np.full((n, vocab_size), -1000.0)
    sure[:, 0] = 1000.0
    assert set(step(sampler, sure)) == {0}  # now it is in the output, too
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
    backend: Backend, random: np.random.Generator, options: dict[str, Any]
) -> None:
    def continue_(on: Backend) -> list[list[int]]:
        sampler = make_sampler(on, (16, 97), prompts=[[i] for i in range(16)], seed=11, **options)
        return [step(sampler, x) for x in logits]

    logits = random.normal(0, 3, (6, 16, 97)).astype(np.float32)
    expected = continue_(make_backend("numpy-generic"))
    assert continue_(backend) == expected
    assert len({tuple(tokens) for tokens in expected}) == 6


def test_rows_that_stay_go_on_as_if_alone(backend: Backend, random: np.random.Generator) -> None:
    logits = random.normal(0, 2, (6, 5, 31)).astype(np.float32)
    prompts, streams = [[i, i + 1] for i in range(5)], [0, 4, 1, 7, 2]
    sampler = make_sampler(backend, (5, 31), prompts=prompts, streams=streams, seed=2, **ALL)
    found = [step(sampler, x) for x in logits[:3]]
    sampler.keep([3, 1])
    assert (sampler.streams, sampler.steps) == ([7, 4], [3, 3])
    found += [step(sampler, x[[3, 1]]) for x in logits[3:]]
    for i, row in enumerate([3, 1]):
        alone = make_sampler(
            backend, (1, 31), prompts=[prompts[row]], streams=[streams[row]], seed=2, **ALL
        )
        expected = [step(alone, x[[row]])[0] for x in logits]
        assert [tokens[row] for tokens in found[:3]] + [t[i] for t in found[3:]] == expected


def test_streams_differ_and_equal_streams_agree() -> None:
    x = np.zeros((4, 1000))
    sampler = make_sampler(NUMPY, x.shape, streams=[0, 1, 0, 2], temperature=1.0, seed=5)
    for _ in range(3):
        a, b, c, d = step(sampler, x)
        assert a == c
        assert len({a, b, d}) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_are_counted_and_decide_the_draw(temperature: float) -> None:
    logits = np.zeros((2, 100))
    sampler = make_sampler(NUMPY, logits.shape, temperature=temperature, seed=5)
    assert sampler.steps == [0, 0]
    for n in range(3):
        expected = [int(100 * uniform(5, stream, n)) for stream in (0, 1)]
        assert step(sampler, logits) == (expected if temperature else [0, 0])
    assert sampler.steps == [3, 3]


BAD = [[1.0, math.nan, 2.0], [1.0, INF, 2.0], [1.0, 2.0, -INF], [INF, -INF, 0.0], [math.nan] * 3]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 2, "top_p": 0.9, "min_p": 0.1, "seed": 0}


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_number_that_is_not_finite_spoils_its_row_alone(
    backend: Backend, bad: list[float], options: dict[str, Any]
) -> None:
    sampler = make_sampler(backend, (3, 3), repetition_penalty=1.1, **options)
    assert step(sampler, [[0.0, 90.0, 0.0], bad, [0.0, 0.0, 90.0]]) == [1, -1, 2]


def test_log_softmax(backend: Backend, random: np.random.Generator) -> None:
    x = random.normal(0, 30, (5, 200)).astype(np.float32)
    found = backend.to_numpy(log_softmax(backend, backend.asarray(x, "float32")))
    wide = x.astype(np.float64)
    expected = wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


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
def test_a_bad_parameter_is_refused_by_name(name: str, value: Any) -> None:
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
def test_good_parameters(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    assert all(getattr(params, name) == value for name, value in options.items())


def test_the_default_is_greedy_with_everything_off(random: np.random.Generator) -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=0.1).greedy
    x = random.normal(0, 3, (4, 50))
    sampler = make_sampler(NUMPY, x.shape, prompts=[[int(i)] for i in x.argmax(axis=-1)])
    assert [step(sampler, x) for _ in range(2)] == [x.argmax(axis=-1).tolist()] * 2


def test_logit_bias_none_is_no_bias() -> None:
    assert SamplingParams(logit_bias=None).logit_bias == {}  # type: ignore[arg-type]


def test_logit_bias_is_not_changed_from_outside() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[2] = 3.0
    assert params.logit_bias == {1: 2.0}


@pytest.mark.parametrize("token", [-1, 5, 10**12])
def test_logit_bias_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(ParameterError, match=rf"logit_bias has token {token}, expected 0 to 4"):
        make_sampler(NUMPY, (1, 5), logit_bias={token: 1.0})
