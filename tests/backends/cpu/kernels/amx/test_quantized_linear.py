"""Numbers cut into bytes, and their products with codes on Intel's matrix unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from gptx.quantization import dequantize, quantize

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install 'gptx[fast]')")

from gptx.backends.cpu.compiled import QuantizedWeight
from gptx.backends.cpu.kernels.amx import quantized_linear as amx
from gptx.backends.cpu.kernels.amx.tile_unit import allowed
from gptx.backends.cpu.kernels.gemm import BLOCK, TILE
from tests.support.kernels import as_kept

# Of a row's largest number, about 2**23 units, this much may be lost: half a unit by rounding to
# whole numbers, and half a unit each by the factor, by its inverse and by the product with that.
LOSS = 2.0**-22


@dataclass
class Cut:
    """What `amx.cut` makes of rows [R, I], taken apart again."""

    rows: np.ndarray
    group: int
    bits: int

    def __post_init__(self) -> None:
        count, n_in = self.rows.shape
        self.padded = -(-count // amx.ROWS) * amx.ROWS
        size = amx.PARTS * self.padded * n_in // 4
        # What is there before does not matter: NaN, and bytes of 255.
        self.x = np.full(size + self.padded * (1 + n_in // self.group), np.nan, np.float32)
        self.x[:size].view(np.int8)[:] = -1
        for n, row in enumerate(self.rows):
            amx.cut(row, n_in, self.group, self.bits, self.x, n, self.padded)
        self.bytes, rest = self.x[:size].view(np.int8), self.x[size:]
        self.factors, self.sums = rest[: self.padded], rest[self.padded :]

    def digits(self) -> np.ndarray:
        """Whole numbers [3, R, I], the lowest digit first, in the order of the inputs."""
        count, n_in = self.rows.shape
        depth = min(self.group, amx.DEPTH)
        tiles = self.bytes.reshape(-1, n_in // depth, amx.ROWS, amx.PARTS, depth)
        digits = tiles.transpose(3, 0, 2, 1, 4).reshape(amx.PARTS, -1, n_in)[:, :count]
        if self.bits == 4:  # eight inputs to a word: first the even ones, then the odd ones
            words = digits.reshape(amx.PARTS, count, n_in // 8, 2, 4)
            digits = words.swapaxes(-1, -2).reshape(amx.PARTS, count, n_in)
        return digits.astype(np.int64)

    def numbers(self) -> np.ndarray:
        """The rows that the digits and the factors stand for, in float64."""
        low, middle, high = self.digits()
        whole = low + 2**8 * middle + 2**16 * high
        return whole * self.factors[: len(self.rows), None].astype(np.float64)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 16, 21])
def test_the_digits_are_the_row(
    count: int, bits: int, group: int, random: np.random.Generator
) -> None:
    rows = random.standard_normal((count, 256)).astype(np.float32)
    rows *= 10.0 ** random.integers(-20, 20, (count, 1)).astype(np.float32)
    cut = Cut(rows, group, bits)
    most = np.abs(rows).max(axis=1, keepdims=True)
    assert np.max(np.abs(cut.numbers() - rows) / most) <= LOSS
    sums = cut.sums.reshape(-1, 256 // group, BLOCK).swapaxes(1, 2).reshape(-1, 256 // group)
    groups = rows.reshape(count, -1, group).astype(np.float64)
    error = np.abs(sums[:count] - groups.sum(axis=-1)) / np.abs(groups).sum(axis=-1)
    assert np.max(error) < 1e-6


def test_rows_do_not_touch_each_other(random: np.random.Generator) -> None:
    rows = random.standard_normal((20, 128)).astype(np.float32)
    together = Cut(rows, 32, 4)
    for n in (0, 7, 15, 16, 19):
        alone = Cut(rows[n : n + 1], 32, 4)
        np.testing.assert_array_equal(together.digits()[:, n], alone.digits()[:, 0])
        assert together.factors[n] == alone.factors[0]
    assert np.isnan(together.factors[20:]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_number_fits(bits: int, random: np.random.Generator) -> None:
    """At either end, also where the factor was rounded: no digit wraps around."""
    rows = random.uniform(-1, 1, (400, 64)).astype(np.float32)
    most = random.uniform(0.5, 2, 400).astype(np.float32)
    rows *= most[:, None]
    rows[:, 5], rows[:, 40] = most, -most
    rows[0] = np.where(np.arange(64) % 2, 1, -1)
    cut = Cut(rows, 64, bits)
    largest = np.abs(rows).max(axis=1)
    for column in (5, 40):
        error = np.abs(cut.numbers()[:, column] - rows[:, column])
        assert np.max(error / largest) <= LOSS
    np.testing.assert_array_equal(np.abs(cut.numbers()[0]), np.abs(cut.numbers()[0, 0]))


@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e30, 3e37])
def test_tiny_and_huge_rows(size: float, random: np.random.Generator) -> None:
    """Nothing is lost but where the inverse of the factor is beyond float32, and all is tiny."""
    rows = (random.uniform(-1, 1, (3, 64)) * size).astype(np.float32)
    with np.errstate(all="ignore"):
        cut = Cut(rows, 32, 8)
    most = np.abs(rows).max(axis=1, keepdims=True)
    error = np.abs(cut.numbers() - rows)
    assert np.isfinite(cut.factors[:3]).all()
    assert np.all(error <= np.maximum(most * LOSS, 2.5e-32))


def test_a_row_of_zeros() -> None:
    cut = Cut(np.array([[0.0] * 32, [-0.0] * 32], np.float32), 32, 8)
    np.testing.assert_array_equal(cut.numbers(), np.zeros((2, 32)))
    np.testing.assert_array_equal(cut.factors[:2], [0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 13, 63])
def test_what_is_not_finite_makes_the_factor_a_nan(column: int, bad: float) -> None:
    rows = np.ones((2, 64), np.float32)
    rows[1, column] = bad
    cut = Cut(rows, 32, 4)
    assert np.isnan(cut.factors[1])
    np.testing.assert_array_equal(cut.numbers()[0], cut.numbers()[0, 0])


# Products

unit = pytest.mark.skipif(
    not allowed(), reason="this processor has no AMX, or the system does not lend it"
)


def multiply(
    rows: np.ndarray, tiles: QuantizedWeight, tile: int, first: int, last: int, y: np.ndarray
) -> None:
    cut = Cut(rows, tiles.group, tiles.bits)
    n_in = rows.shape[1]
    room = np.full(amx.ROOM, np.nan, np.float32)
    amx.multiply(
        *(tiles.weight.reshape(-1), tiles.scales.reshape(-1), tiles.steps),
        *(tiles.bits, tile, n_in, tiles.group, cut.x, len(rows), first, last),
        *(y.reshape(-1), y.shape[1], room),
    )


def exact(rows: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Products in float64, and what their terms may add up to."""
    x, w = rows.astype(np.float64), w.astype(np.float64)
    most = np.abs(x).max(axis=1, keepdims=True)
    return x @ w.T, most * np.abs(w).sum(axis=1)


@unit
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_products(bits: int, group: int, random: np.random.Generator) -> None:
    """Any number of rows, and any 64 outputs, whatever y was before."""
    q = as_kept(quantize(random.standard_normal((128, 256)).astype(np.float32), bits, group))
    tiles, w = QuantizedWeight(q), dequantize(q)
    for count in range(1, 41):
        rows = random.standard_normal((count, 256)).astype(np.float32)
        wanted, size = exact(rows, w)
        y = np.full((count + -count % BLOCK, 128), np.nan, np.float32)
        for tile in range(2):
            multiply(rows, tiles, tile, 0, count, y)
        assert np.max(np.abs(y[:count] - wanted) / size) < 1e-6


@unit
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("first", "last"), [(0, 16), (16, 32), (16, 40), (32, 37), (0, 3)])
def test_a_range_of_rows(first: int, last: int, bits: int, random: np.random.Generator) -> None:
    """It changes these rows, up to a whole block, and these outputs alone."""
    q = as_kept(quantize(random.standard_normal((128, 128)).astype(np.float32), bits, 64))
    rows = random.standard_normal((40, 128)).astype(np.float32)
    wanted, size = exact(rows, dequantize(q))
    y, here, columns = np.full((40, 160), 7, np.float32), slice(first, last), slice(64, 128)
    multiply(rows, QuantizedWeight(q), 1, first, last, y)
    assert np.max(np.abs(y[here, columns] - wanted[here, columns]) / size[here, columns]) < 1e-6
    assert (np.delete(y, np.arange(64, 128), axis=1) == 7).all()
    assert (y[:first] == 7).all()
    assert (y[last + -last % BLOCK :] == 7).all()


@unit
def test_a_nan_in_a_product(random: np.random.Generator) -> None:
    """It takes its row, and no other."""
    q = quantize(random.standard_normal((64, 128)).astype(np.float32), 4, 64)
    rows = random.standard_normal((5, 128)).astype(np.float32)
    rows[3, 77] = np.nan
    y = np.zeros((8, TILE), np.float32)
    multiply(rows, QuantizedWeight(q), 0, 0, 5, y)
    np.testing.assert_array_equal(np.isnan(y[:5]).all(axis=1), [False, False, False, True, False])
    np.testing.assert_array_equal(np.isnan(y[:5]).any(axis=1), [False, False, False, True, False])
