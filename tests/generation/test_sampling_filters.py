"""Top-k, top-p, min-p and log-softmax against their definitions in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.backends import Backend
from gptx.generation.filters import keep_min_p, keep_top_k, keep_top_p, keep_typical_p
from tests.support.sampling_reference import (
    INF,
    NUMPY,
    min_p,
    run_filter,
    top_k,
    top_p,
    typical_p,
)

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


@pytest.mark.parametrize("name", VALUES)
def test_filter_is_its_definition(library: Backend, name: str) -> None:
    keep, definition, values = VALUES[name]
    for rows, at in itertools.product(ROWS.values(), values):
        x = rows.astype(np.float32)
        expected = np.stack([definition(row, at) for row in x])  # type: ignore[arg-type]
        found = run_filter(keep, library, x, at)
        np.testing.assert_array_equal(found, expected, err_msg=f"{at} of {rows}")


@pytest.mark.parametrize("name", VALUES)
def test_filter_of_a_whole_vocabulary(name: str) -> None:
    keep, definition, _ = VALUES[name]
    x = np.random.default_rng(2).normal(0, 3, (2, 50257)).astype(np.float32)
    at = {"top_k": 40, "top_p": 0.9, "min_p": 0.05}[name]
    expected = np.stack([definition(row, at) for row in x])  # type: ignore[arg-type]
    np.testing.assert_array_equal(run_filter(keep, NUMPY, x, at), expected)


def test_top_p_counts_the_token_that_reaches_it(library: Backend) -> None:
    x = np.log(np.array([[0.125, 0.5, 0.25, 0.125]]))
    for p, kept in [(0.49, [1]), (0.51, [1, 2]), (0.74, [1, 2]), (0.76, [0, 1, 2, 3])]:
        found = run_filter(keep_top_p, library, x, p)
        assert np.flatnonzero(found[0] > -INF).tolist() == kept, p


def test_min_p_is_relative_to_the_most_probable_token(library: Backend) -> None:
    x = np.log(np.array([[0.1, 0.5, 0.26, 0.14]]))
    for p, kept in [(0.19, [0, 1, 2, 3]), (0.21, [1, 2, 3]), (0.29, [1, 2]), (0.53, [1])]:
        found = run_filter(keep_min_p, library, x, p)
        assert np.flatnonzero(found[0] > -INF).tolist() == kept, p


@pytest.mark.parametrize("p", [0.0, 0.21, 0.55, 0.9, 1.0])
def test_typical_p_is_its_definition(library: Backend, p: float) -> None:
    for rows in ROWS.values():
        x = rows.astype(np.float32)
        expected = np.stack([typical_p(row, p) for row in x])
        found = run_filter(keep_typical_p, library, x, p)
        np.testing.assert_array_equal(found, expected, err_msg=f"{p} of {rows}")


def test_typical_p_can_leave_out_the_most_probable_token(library: Backend) -> None:
    x = np.log(np.array([[0.4, 0.3, 0.12, 0.1, 0.08]]))  # an entropy of 1.41, as -log(0.244)
    for p, kept in [(0.29, [1]), (0.31, [0, 1]), (0.71, [0, 1, 2])]:
        found = run_filter(keep_typical_p, library, x, p)
        assert np.flatnonzero(found[0] > -INF).tolist() == kept, p


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    st.sampled_from(list(VALUES)),
    st.integers(0, 14),
)
@settings(max_examples=100, deadline=None)
def test_filters_keep_the_largest_logits_unchanged(quarters: list[int], name: str, at: int) -> None:
    x = np.array([quarters], np.float32) / 4
    kept = run_filter(VALUES[name][0], NUMPY, x, at if name == "top_k" else at / 14)
    assert kept.max() == x.max()
    assert np.all((kept == x) | (kept == -INF))
    assert np.max(x[kept == -INF], initial=-INF) < np.min(kept[kept > -INF])


def test_log_softmax(library: Backend, random: np.random.Generator) -> None:
    x = random.normal(0, 30, (5, 200)).astype(np.float32)
    found = library.to_numpy(library.log_softmax(library.asarray(x, "float32")))
    wide = x.astype(np.float64)
    expected = wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
