"""Each operation on vectors of 16 against NumPy and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

from gptx.backends.cpu.kernels import compilation, simd
from gptx.backends.cpu.kernels.simd import LANES, load, store
from tests.support.kernels import cached

NAN, INF = np.float32(np.nan), np.float32(np.inf)
# Zeros of both signs, infinities, the smallest and the largest numbers, NaN.
EDGES = np.array([0, -0.0, 1, -1, 1e-45, -1e-45, 1e-38, 3e38, -3e38, INF, -INF, NAN], np.float32)


@cached
def _unary_operations(x: Any, y: Any) -> None:
    for i in range(0, len(x), LANES):
        store(y, i, simd.exp(load(x, i)))
        store(y, len(x) + i, simd.round_to_even(load(x, i)))
        store(y, 2 * len(x) + i, simd.is_negative(load(x, i)))


def _unary(n: int) -> Callable[[np.ndarray], np.ndarray]:
    def call(x: np.ndarray) -> np.ndarray:
        padded = np.zeros(-(-len(x) // LANES) * LANES, np.float32)
        padded[: len(x)] = x
        y = np.empty((3, len(padded)), np.float32)
        _unary_operations(padded, y.reshape(-1))
        return y[n, : len(x)]

    return call


exp, round_to_even, is_negative = _unary(0), _unary(1), _unary(2)


def test_exp_is_exact_within_two_units_in_the_last_place() -> None:
    x = np.linspace(-87, 88, 1_000_000, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(exp(x) - exact) / ulp) <= 2


def test_exp_outside_its_range() -> None:
    """The result is next to 0 far below, finite far above, and NaN for NaN."""
    x = np.array([-INF, -1e30, -87.5, 88.5, 1e30, INF, NAN, -NAN, 0.0, -0.0], np.float32)
    found = exp(x)
    np.testing.assert_array_equal(found[:3], exp(np.full(3, -87, np.float32)))
    np.testing.assert_array_equal(found[3:6], exp(np.full(3, 88, np.float32)))
    assert 0 < found[0] < 2e-38
    assert np.isfinite(found[5])
    assert np.isnan(found[6:8]).all()
    np.testing.assert_array_equal(found[8:], [1, 1])


def test_halves_round_to_even() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 126.7, -3e38, INF, NAN], np.float32)
    np.testing.assert_array_equal(round_to_even(x), np.rint(x))


def test_is_negative() -> None:
    np.testing.assert_array_equal(is_negative(EDGES), (EDGES < 0).astype(np.float32))


@pytest.fixture(scope="module")
def binary() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of edges x and y, and the results of the binary operations [7, ...]."""
    x, y = (np.ascontiguousarray(a.reshape(-1)) for a in np.meshgrid(EDGES, EDGES))
    assert len(x) % LANES == 0

    @cached
    def operations(x: Any, y: Any, z: Any) -> None:
        for i in range(0, len(x), LANES):
            a, b = load(x, i), load(y, i)
            store(z, i, a + b)
            store(z, len(x) + i, a - b)
            store(z, 2 * len(x) + i, a * b)
            store(z, 3 * len(x) + i, a / b)
            c = a
            c += b
            store(z, 4 * len(x) + i, c)
            store(z, 5 * len(x) + i, simd.maximum(a, b))
            store(z, 6 * len(x) + i, simd.minimum(a, b))

    z = np.empty((7, len(x)), np.float32)
    operations(x, y, z.reshape(-1))
    return x, y, z


@pytest.mark.parametrize(("row", "function"), [(5, np.maximum), (6, np.minimum)])
def test_the_first_operand_wins_if_one_is_nan(row: int, function: Any, binary: Any) -> None:
    x, y, found = binary
    expected = np.where(np.isnan(x) | np.isnan(y), x, function(x, y))
    np.testing.assert_array_equal(found[row], expected)


def test_operators(binary: Any) -> None:
    """Infinities and NaN as in IEEE 754."""
    x, y, found = binary
    with np.errstate(all="ignore"):
        expected = np.stack([x + y, x - y, x * y, x / y, x + y])
    np.testing.assert_array_equal(np.isnan(found[:5]), np.isnan(expected))
    np.testing.assert_allclose(found[:5], expected, rtol=3e-7, atol=1e-44)


def test_reductions(random: np.random.Generator) -> None:
    @cached
    def reductions(x: Any) -> Any:
        return simd.sum_lanes(load(x, 0)), simd.max_lanes(load(x, 0))

    x = random.standard_normal(LANES).astype(np.float32)
    total, highest = reductions(x)
    assert abs(total - x.astype(np.float64).sum()) < 1e-6 * np.abs(x).sum()
    assert highest == x.max()
    for lane in range(LANES):
        edge = np.zeros(LANES, np.float32)
        edge[lane] = 1
        assert reductions(edge) == (1, 1)
        assert reductions(-edge - 1)[1] == -1
        edge[lane] = NAN
        assert np.isnan(reductions(edge)[0])
        edge[lane] = -INF
        assert reductions(edge) == (-INF, 0)


def test_vectors_on_the_stack(random: np.random.Generator) -> None:
    """Vectors keep their values; lane n of `sum_lanes_of_16` is the sum of vector n."""

    @cached
    def call(x: Any, y: Any) -> None:
        vectors = simd.stack_vectors(16)
        for n in range(16):
            simd.put_vector(vectors, n, load(x, n * LANES))
        store(y, 0, simd.sum_lanes_of_16(vectors))
        store(y, LANES, simd.get_vector(vectors, 7))

    x = random.standard_normal((16, LANES)).astype(np.float32)
    y = np.empty(2 * LANES, np.float32)
    call(x.reshape(-1), y)
    np.testing.assert_allclose(y[:LANES], x.astype(np.float64).sum(axis=1), atol=2e-6)
    np.testing.assert_array_equal(y[LANES:], x[7])


@cached
def _copy(x: Any, i: Any, y: Any, j: Any) -> None:
    store(y, j, load(x, i))


@pytest.mark.parametrize("dtype", [np.float32, np.uint32, np.int32])
def test_load_and_store_are_unaligned_and_change_no_other_element(dtype: type) -> None:
    x = np.arange(64).astype(dtype)
    for i, j in ((0, 0), (1, 3), (47, 48), (5, 17)):
        y = np.full(64, 99, dtype)
        _copy(x, i, y, j)
        np.testing.assert_array_equal(y[j : j + LANES], x[i : i + LANES])
        assert (np.delete(y, np.arange(j, j + LANES)) == 99).all()


def test_broadcast_and_splat() -> None:
    @cached
    def fill(x: Any, i: Any, y: Any) -> None:
        simd.prefetch_l1(x, i + 10**6)  # past the end
        store(y, 0, simd.broadcast(x, i))
        store(y, LANES, simd.splat(2.5))
        store(y, 2 * LANES, simd.splat(x[i]))
        store(y, 3 * LANES, simd.splat(3))

    x, y = np.arange(5, dtype=np.float32) / 3, np.empty(4 * LANES, np.float32)
    fill(x, 4, y)
    np.testing.assert_array_equal(y.reshape(4, LANES), [[z] * LANES for z in (x[4], 2.5, x[4], 3)])


@cached
def _unpack(words: Any, y4: Any, y8: Any, nibbles: Any) -> None:
    for n in range(8):
        store(y4, n * LANES, simd.bit_field_as_floats(load(words, 0), n, 4))
    for n in range(4):
        store(y8, n * LANES, simd.bit_field_as_floats(load(words, 0), n, 8))
    store(nibbles, 0, simd.nibbles_as_bytes(load(words, 0), 0))
    store(nibbles, LANES, simd.nibbles_as_bytes(load(words, 0), 1))


def test_bit_fields(random: np.random.Generator) -> None:
    """A field as a float is multiplied by its place in the word, except the last one."""
    for words in (
        random.integers(0, 2**32, LANES, np.uint32),
        np.full(LANES, 2**32 - 1, np.uint32),
    ):
        y4, y8 = np.empty((8, LANES), np.float32), np.empty((4, LANES), np.float32)
        nibbles = np.empty((2, LANES), np.uint32)
        _unpack(words, y4.reshape(-1), y8.reshape(-1), nibbles.reshape(-1))
        for bits, y in ((4, y4), (8, y8)):
            for n in range(len(y)):
                fields = (words >> np.uint32(bits * n)) & np.uint32(2**bits - 1)
                factor = 1 if n == len(y) - 1 else 2.0 ** (bits * n)
                np.testing.assert_array_equal(y[n], fields * factor)
        fields = words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)
        np.testing.assert_array_equal(nibbles[0].view(np.uint8).reshape(LANES, 4), fields[:, ::2])
        np.testing.assert_array_equal(nibbles[1].view(np.uint8).reshape(LANES, 4), fields[:, 1::2])


def test_ints_become_signed_floats() -> None:
    @cached
    def convert(x: Any, y: Any) -> None:
        store(y, 0, simd.ints_to_floats(load(x, 0)))

    x, y = np.arange(-8, 8, dtype=np.int32) * 2**20, np.empty(LANES, np.float32)
    convert(x, y)
    np.testing.assert_array_equal(y, x)


def test_arrays_at_an_address() -> None:
    @cached
    def read(address: Any, words: Any) -> Any:
        return compilation.float_array(address, 3)[2], compilation.word_array(words, 3)[1]

    x, words = np.array([1, 2, 3.5], np.float32), np.array([1, 2**32 - 1, 3], np.uint32)
    assert read(x.ctypes.data, words.ctypes.data) == (3.5, 2**32 - 1)
