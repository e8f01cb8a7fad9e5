"""Vectors of 16 floats: what each intrinsic computes, against NumPy and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install 'gptx[fast]')")

import numba

from gptx.backends.cpu.kernels import simd
from gptx.backends.cpu.kernels.simd import LANES, load, store

NAN, INF = np.float32(np.nan), np.float32(np.inf)
# Zeros of both signs, infinities, the smallest and the largest numbers, a NaN.
EDGES = np.array([0, -0.0, 1, -1, 1e-45, -1e-45, 1e-38, 3e38, -3e38, INF, -INF, NAN], np.float32)


def unary(function: Any) -> Callable[[np.ndarray], np.ndarray]:
    @numba.njit
    def each(x: Any, y: Any) -> None:
        for i in range(0, len(x), LANES):
            store(y, i, function(load(x, i)))

    def call(x: np.ndarray) -> np.ndarray:
        padded = np.zeros(-(-len(x) // LANES) * LANES, np.float32)
        padded[: len(x)] = x
        y = np.empty_like(padded)
        each(padded, y)
        return y[: len(x)]

    return call


def binary(function: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    @numba.njit
    def each(x: Any, y: Any, z: Any) -> None:
        for i in range(0, len(x), LANES):
            store(z, i, function(load(x, i), load(y, i)))

    def call(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        z = np.empty_like(x)
        each(x, y, z)
        return z

    return call


def reduction(function: Any) -> Callable[[np.ndarray], float]:
    @numba.njit
    def call(x: Any) -> Any:
        return function(load(x, 0))

    return call


@pytest.fixture(scope="module")
def exp() -> Callable[[np.ndarray], np.ndarray]:
    return unary(simd.exp)


def test_exp_is_exact_within_two_units_in_the_last_place(exp: Any) -> None:
    x = np.linspace(-87, 88, 1_000_000, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(exp(x) - exact) / ulp) <= 2


def test_exp_beyond_its_range(exp: Any) -> None:
    """What is far below is next to nothing, what is far above is finite, and a NaN stays one."""
    x = np.array([-INF, -1e30, -87.5, 88.5, 1e30, INF, NAN, -NAN, 0.0, -0.0], np.float32)
    found = exp(x)
    np.testing.assert_array_equal(found[:3], exp(np.full(3, -87, np.float32)))
    np.testing.assert_array_equal(found[3:6], exp(np.full(3, 88, np.float32)))
    assert 0 < found[0] < 2e-38
    assert np.isfinite(found[5])
    assert np.isnan(found[6:8]).all()
    np.testing.assert_array_equal(found[8:], [1, 1])


def test_nearest_goes_to_the_even_one() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 126.7, -3e38, INF, NAN], np.float32)
    np.testing.assert_array_equal(unary(simd.nearest)(x), np.rint(x))


def test_negative() -> None:
    np.testing.assert_array_equal(unary(simd.negative)(EDGES), (EDGES < 0).astype(np.float32))


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Each of the edges with each."""
    x, y = (np.ascontiguousarray(a.reshape(-1)) for a in np.meshgrid(EDGES, EDGES))
    assert len(x) % LANES == 0
    return x, y


@pytest.mark.parametrize(("name", "numpy"), [("maximum", np.maximum), ("minimum", np.minimum)])
def test_the_first_operand_wins_if_one_is_a_nan(name: str, numpy: Any, pairs: Any) -> None:
    x, y = pairs
    wanted = np.where(np.isnan(x) | np.isnan(y), x, numpy(x, y))
    np.testing.assert_array_equal(binary(getattr(simd, name))(x, y), wanted)


def test_operators(pairs: Any) -> None:
    """Infinities and NaN as the standard has them."""
    x, y = pairs

    @numba.njit
    def each(x: Any, y: Any, z: Any) -> None:
        for i in range(0, len(x), LANES):
            a, b = load(x, i), load(y, i)
            store(z, i, a + b)
            store(z, len(x) + i, a - b)
            store(z, 2 * len(x) + i, a * b)
            store(z, 3 * len(x) + i, a / b)
            c = a
            c += b
            store(z, 4 * len(x) + i, c)

    z = np.empty(5 * len(x), np.float32)
    each(x, y, z)
    with np.errstate(all="ignore"):
        wanted = np.concatenate([x + y, x - y, x * y, x / y, x + y])
    np.testing.assert_array_equal(np.isnan(z), np.isnan(wanted))
    np.testing.assert_allclose(z, wanted, rtol=3e-7, atol=1e-44)


def test_total_and_largest(random: np.random.Generator) -> None:
    total, largest = reduction(simd.total), reduction(simd.largest)
    x = random.standard_normal(LANES).astype(np.float32)
    assert abs(total(x) - x.astype(np.float64).sum()) < 1e-6 * np.abs(x).sum()
    assert largest(x) == x.max()
    for lane in range(LANES):
        with_one = np.zeros(LANES, np.float32)
        with_one[lane] = 1
        assert total(with_one) == largest(with_one) == -largest(-with_one - 1) == 1
        with_one[lane] = NAN
        assert np.isnan(total(with_one))
        with_one[lane] = -INF
        assert total(with_one) == -INF
        assert largest(with_one) == 0


def test_totals(random: np.random.Generator) -> None:
    """Lane n is the total of vector n, and vectors of `vectors` keep what is put there."""

    @numba.njit
    def call(x: Any, y: Any) -> None:
        room = simd.vectors(16)
        for n in range(16):
            simd.put(room, n, load(x, n * LANES))
        store(y, 0, simd.totals(room))
        store(y, LANES, simd.get(room, 7))

    x = random.standard_normal((16, LANES)).astype(np.float32)
    y = np.empty(2 * LANES, np.float32)
    call(x.reshape(-1), y)
    np.testing.assert_allclose(y[:LANES], x.astype(np.float64).sum(axis=1), atol=2e-6)
    np.testing.assert_array_equal(y[LANES:], x[7])


def test_load_and_store_at_any_place() -> None:
    """Neither needs an aligned place, and neither touches its neighbors."""

    @numba.njit
    def copy(x: Any, i: Any, y: Any, j: Any) -> None:
        store(y, j, load(x, i))

    for dtype in (np.float32, np.uint32, np.int32):
        x = np.arange(64).astype(dtype)
        for i, j in ((0, 0), (1, 3), (47, 48), (5, 17)):
            y = np.full(64, 99, dtype)
            copy(x, i, y, j)
            np.testing.assert_array_equal(y[j : j + LANES], x[i : i + LANES])
            assert (np.delete(y, np.arange(j, j + LANES)) == 99).all()


def test_spread_and_splat() -> None:
    @numba.njit
    def fill(x: Any, i: Any, y: Any) -> None:
        simd.prefetch(x, i + 10**6)  # past the end
        store(y, 0, simd.spread(x, i))
        store(y, LANES, simd.splat(2.5))
        store(y, 2 * LANES, simd.splat(x[i]))
        store(y, 3 * LANES, simd.splat(3))

    x, y = np.arange(5, dtype=np.float32) / 3, np.empty(4 * LANES, np.float32)
    fill(x, 4, y)
    np.testing.assert_array_equal(y.reshape(4, LANES), [[z] * LANES for z in (x[4], 2.5, x[4], 3)])


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_where_they_lie(bits: int, random: np.random.Generator) -> None:
    """As many times too large as their place in the word says, but for the last, which is not."""
    count = 32 // bits

    @numba.njit
    def each(words: Any, y: Any) -> None:
        for n in range(count):
            store(y, n * LANES, simd.code(load(words, 0), n, bits))

    for words in (
        random.integers(0, 2**32, LANES, np.uint32),
        np.full(LANES, 2**32 - 1, np.uint32),
    ):
        y = np.empty((count, LANES), np.float32)
        each(words, y.reshape(-1))
        for n in range(count):
            codes = (words >> np.uint32(bits * n)) & np.uint32(2**bits - 1)
            factor = 1 if n == count - 1 else 2.0 ** (bits * n)
            np.testing.assert_array_equal(y[n], codes * factor)


def test_bytes_of_codes_of_four_bits(random: np.random.Generator) -> None:
    @numba.njit
    def each(words: Any, y: Any) -> None:
        store(y, 0, simd.to_bytes(load(words, 0), 0))
        store(y, LANES, simd.to_bytes(load(words, 0), 1))

    words = random.integers(0, 2**32, LANES, np.uint32)
    y = np.empty((2, LANES), np.uint32)
    each(words, y.reshape(-1))
    codes = words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)
    np.testing.assert_array_equal(y[0].view(np.uint8).reshape(LANES, 4), codes[:, ::2])
    np.testing.assert_array_equal(y[1].view(np.uint8).reshape(LANES, 4), codes[:, 1::2])


def test_ints_become_floats() -> None:
    """They are signed."""

    @numba.njit
    def each(x: Any, y: Any) -> None:
        store(y, 0, simd.to_floats(load(x, 0)))

    x, y = np.arange(-8, 8, dtype=np.int32) * 2**20, np.empty(LANES, np.float32)
    each(x, y)
    np.testing.assert_array_equal(y, x)


def test_arrays_at_an_address() -> None:
    @numba.njit
    def read(address: Any, words: Any) -> Any:
        return simd.float_array(address, 3)[2], simd.word_array(words, 3)[1]

    x, words = np.array([1, 2, 3.5], np.float32), np.array([1, 2**32 - 1, 3], np.uint32)
    assert read(x.ctypes.data, words.ctypes.data) == (3.5, 2**32 - 1)
