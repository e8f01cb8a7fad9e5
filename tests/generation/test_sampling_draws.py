"""Draws: a token for each random number, with its probability; the numbers are Philox."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.backends import Backend
from gptx.generation.sampling import uniform
from tests.support.sampling_reference import INF, NUMPY, make_sampler, run_draw, softmax, step

LARGEST_U = (2**24 - 1) / 2**24

# The draw


def test_draw_inverts_the_distribution(library: Backend, random: np.random.Generator) -> None:
    x = random.normal(0, 3, (400, 300)).astype(np.float32)
    u = random.integers(0, 2**24, 400) / 2**24
    cdf = np.cumsum(np.stack([softmax(row) for row in x]), axis=-1)
    clear = np.abs(cdf - u[:, None]).min(axis=-1) > 1e-5  # float32 gives the same token there
    assert clear.sum() > 300
    expected = [np.searchsorted(row, at, side="right") for row, at in zip(cdf, u, strict=True)]
    np.testing.assert_array_equal(run_draw(library, x, u)[clear], np.array(expected)[clear])


def test_draw_from_a_whole_vocabulary(random: np.random.Generator) -> None:
    x = random.normal(0, 2, (16, 50257)).astype(np.float32)
    u = random.integers(0, 2**24, 16) / 2**24
    cdf = np.cumsum(np.stack([softmax(row) for row in x]), axis=-1)
    found = run_draw(NUMPY, x, u)
    for row, token, at in zip(cdf, found, u, strict=True):
        assert row[token] - row[token - 1] > 0
        assert row[token - 1] - 1e-4 < at < row[token] + 1e-4


@pytest.mark.parametrize(
    "row",
    [
        [-INF, -INF, 1.0, 2.0],
        [1.0, 2.0, -INF, -INF],
        [-INF, 3.0, -INF, 3.0, -INF],
        [-INF, -INF, -INF, 0.0],
        [0.0, -INF, -INF, -INF],
        [-300.0, 5.0, -300.0],  # the probability of -300 is 0 in float32
        [-INF, *[0.1 * (i % 7) for i in range(1000)], -INF, -INF],
    ],
)
def test_no_token_without_probability_is_drawn(library: Backend, row: list[float]) -> None:
    u = np.array([0.0, 2**-24, 0.5, LARGEST_U])
    x = np.array([row] * len(u), np.float32)
    probabilities = softmax(x[0]).astype(np.float32)
    assert all(probabilities[token] > 0 for token in run_draw(library, x, u))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_with_their_probabilities(library: Backend, temperature: float) -> None:
    logits = np.array([1.0, 0.0, 2.0, -1.0, 1.5, 0.5, 0.25, -0.5])
    n = 2000
    sampler = make_sampler(library, (n, len(logits)), temperature=temperature, seed=3)
    found = step(sampler, np.tile(logits, (n, 1)))
    expected = n * softmax(logits / temperature)
    counts = np.bincount(found, minlength=len(logits))
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 7 degrees of freedom: one seed in a thousand exceeds it


# Random numbers


def philox(seed: int, stream: int, count: int) -> float:
    """Return a number of Philox4x64-10, from the paper (Salmon et al., SC 2011, section 3.3)."""
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
def test_pinned_numbers_of_seeds(seed: int, stream: int, count: int, numerator: int) -> None:
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


def test_uniform_does_not_depend_on_the_order_of_calls() -> None:
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
    # 15 degrees of freedom: one seed in a thousand exceeds it
    assert ((counts - 256) ** 2 / 256).sum() < 37.7
