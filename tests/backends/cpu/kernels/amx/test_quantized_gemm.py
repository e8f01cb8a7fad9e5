"""Rows packed as digits, and their products with quantized weights on AMX."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from gptx.quantization import dequantize, quantize

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

from gptx.backends.cpu.interface.cpu_features import amx_is_allowed
from gptx.backends.cpu.interface.sizes import (
    BLOCK_ROWS,
    N_DIGITS,
    PANEL_OUTPUTS,
    QUANTIZED_WORKSPACE_SIZE,
    TILE_ROW_BYTES,
    TILE_ROWS,
)
from gptx.backends.cpu.kernels.amx import quantized_gemm
from gptx.backends.cpu.kernels.arguments import Matrix, QuantizedMatrix
from gptx.backends.cpu.quantized import QuantizedWeight
from tests.support.kernels import cached, with_encoded_scales

pack_row, multiply_panel = cached(quantized_gemm.pack_row), cached(quantized_gemm.multiply)

# Greatest error, of a row's largest magnitude (about 2**23 units): half a unit by rounding to
# integers, and half a unit each by the factor, by its inverse and by the product with that.
MAX_ERROR = 2.0**-22


@dataclass
class PackedRows:
    """Rows [R, I] after `pack_row`, and the parts of the result."""

    rows: np.ndarray
    group_size: int
    bits: int

    def __post_init__(self) -> None:
        count, n_in = self.rows.shape
        self.padded = -(-count // TILE_ROWS) * TILE_ROWS
        size = N_DIGITS * self.padded * n_in // 4
        # NaN and bytes of -1 show a read of what no kernel wrote.
        self.x = np.full(size + self.padded * (1 + n_in // self.group_size), np.nan, np.float32)
        self.x[:size].view(np.int8)[:] = -1
        for n, row in enumerate(self.rows):
            pack_row(row, n_in, self.group_size, self.bits, self.x, n, self.padded)
        self.bytes, rest = self.x[:size].view(np.int8), self.x[size:]
        self.factors, self.sums = rest[: self.padded], rest[self.padded :]

    def digits(self) -> np.ndarray:
        """Return the digits [3, R, I], the lowest first, in the order of the inputs."""
        count, n_in = self.rows.shape
        depth = min(self.group_size, TILE_ROW_BYTES)
        tiles = self.bytes.reshape(-1, n_in // depth, TILE_ROWS, N_DIGITS, depth)
        digits = tiles.transpose(3, 0, 2, 1, 4).reshape(N_DIGITS, -1, n_in)[:, :count]
        if self.bits == 4:  # of eight inputs, first the even ones, then the odd ones
            words = digits.reshape(N_DIGITS, count, n_in // 8, 2, 4)
            digits = words.swapaxes(-1, -2).reshape(N_DIGITS, count, n_in)
        return digits.astype(np.int64)

    def numbers(self) -> np.ndarray:
        """Return the rows that digits and factors represent, in float64."""
        low, middle, high = self.digits()
        integers = low + 2**8 * middle + 2**16 * high
        return integers * self.factors[: len(self.rows), None].astype(np.float64)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 16, 21])
def test_digits_represent_the_row(
    count: int, bits: int, group_size: int, random: np.random.Generator
) -> None:
    rows = random.standard_normal((count, 256)).astype(np.float32)
    rows *= 10.0 ** random.integers(-20, 20, (count, 1)).astype(np.float32)
    packed = PackedRows(rows, group_size, bits)
    most = np.abs(rows).max(axis=1, keepdims=True)
    assert np.max(np.abs(packed.numbers() - rows) / most) <= MAX_ERROR
    n_groups = 256 // group_size
    sums = packed.sums.reshape(-1, n_groups, BLOCK_ROWS).swapaxes(1, 2).reshape(-1, n_groups)
    groups = rows.reshape(count, -1, group_size).astype(np.float64)
    error = np.abs(sums[:count] - groups.sum(axis=-1)) / np.abs(groups).sum(axis=-1)
    assert np.max(error) < 1e-6


def test_rows_are_independent(random: np.random.Generator) -> None:
    rows = random.standard_normal((20, 128)).astype(np.float32)
    together = PackedRows(rows, 32, 4)
    for n in (0, 7, 15, 16, 19):
        single = PackedRows(rows[n : n + 1], 32, 4)
        np.testing.assert_array_equal(together.digits()[:, n], single.digits()[:, 0])
        assert together.factors[n] == single.factors[0]
    assert np.isnan(together.factors[20:]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_magnitude_does_not_overflow(bits: int, random: np.random.Generator) -> None:
    """Neither does it with a rounded factor, for both signs."""
    rows = random.uniform(-1, 1, (400, 64)).astype(np.float32)
    most = random.uniform(0.5, 2, 400).astype(np.float32)
    rows *= most[:, None]
    rows[:, 5], rows[:, 40] = most, -most
    rows[0] = np.where(np.arange(64) % 2, 1, -1)
    packed = PackedRows(rows, 64, bits)
    highest = np.abs(rows).max(axis=1)
    for column in (5, 40):
        error = np.abs(packed.numbers()[:, column] - rows[:, column])
        assert np.max(error / highest) <= MAX_ERROR
    np.testing.assert_array_equal(np.abs(packed.numbers()[0]), np.abs(packed.numbers()[0, 0]))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-38, 1e30, 3e37])
def test_tiny_and_huge_rows(magnitude: float, random: np.random.Generator) -> None:
    """The error is larger only if the factor's inverse is beyond float32, where rows are tiny."""
    rows = (random.uniform(-1, 1, (3, 64)) * magnitude).astype(np.float32)
    with np.errstate(all="ignore"):
        packed = PackedRows(rows, 32, 8)
    most = np.abs(rows).max(axis=1, keepdims=True)
    error = np.abs(packed.numbers() - rows)
    assert np.isfinite(packed.factors[:3]).all()
    assert np.all(error <= np.maximum(most * MAX_ERROR, 2.5e-32))


def test_a_row_of_zeros() -> None:
    packed = PackedRows(np.array([[0.0] * 32, [-0.0] * 32], np.float32), 32, 8)
    np.testing.assert_array_equal(packed.numbers(), np.zeros((2, 32)))
    np.testing.assert_array_equal(packed.factors[:2], [0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 13, 63])
def test_a_non_finite_number_makes_the_factor_nan(column: int, bad: float) -> None:
    rows = np.ones((2, 64), np.float32)
    rows[1, column] = bad
    packed = PackedRows(rows, 32, 4)
    assert np.isnan(packed.factors[1])
    np.testing.assert_array_equal(packed.numbers()[0], packed.numbers()[0, 0])


# Products

needs_amx = pytest.mark.skipif(
    not amx_is_allowed(), reason="this processor has no AMX, or the system does not permit it"
)


def multiply(
    rows: np.ndarray, weight: QuantizedWeight, panel: int, first: int, last: int, y: np.ndarray
) -> None:
    packed = PackedRows(rows, weight.group_size, weight.bits)
    matrix = QuantizedMatrix(
        weight.words.reshape(-1), weight.groups.reshape(-1), weight.offset_bits,
        rows.shape[1], weight.group_size, weight.bits,
    )  # fmt: skip
    target = Matrix(y.reshape(-1), panel * PANEL_OUTPUTS, y.shape[1], 1)
    workspace = np.full(QUANTIZED_WORKSPACE_SIZE, np.nan, np.float32)
    multiply_panel(matrix, panel, packed.x, len(rows), first, last, target, workspace)


def exact(rows: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return products in float64, and the largest sums that their terms may have."""
    x, w = rows.astype(np.float64), w.astype(np.float64)
    most = np.abs(x).max(axis=1, keepdims=True)
    return x @ w.T, most * np.abs(w).sum(axis=1)


@needs_amx
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_products(bits: int, group_size: int, random: np.random.Generator) -> None:
    """Any number of rows and any panel, with a y that was NaN before."""
    w = random.standard_normal((128, 256)).astype(np.float32)
    q = with_encoded_scales(quantize(w, bits, group_size))
    weight, w = QuantizedWeight(q), dequantize(q)
    for count in range(1, 41):
        rows = random.standard_normal((count, 256)).astype(np.float32)
        expected, magnitude = exact(rows, w)
        y = np.full((count + -count % BLOCK_ROWS, 128), np.nan, np.float32)
        for panel in range(2):
            multiply(rows, weight, panel, 0, count, y)
        assert np.max(np.abs(y[:count] - expected) / magnitude) < 1e-6


@needs_amx
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("first", "last"), [(0, 16), (16, 32), (16, 40), (32, 37), (0, 3)])
def test_a_range_of_rows(first: int, last: int, bits: int, random: np.random.Generator) -> None:
    """`multiply` changes only these rows, up to a whole block, and the outputs of the panel."""
    w = random.standard_normal((128, 128)).astype(np.float32)
    q = with_encoded_scales(quantize(w, bits, 64))
    rows = random.standard_normal((40, 128)).astype(np.float32)
    expected, magnitude = exact(rows, dequantize(q))
    y, here, columns = np.full((40, 160), 7, np.float32), slice(first, last), slice(64, 128)
    multiply(rows, QuantizedWeight(q), 1, first, last, y)
    error = np.abs(y[here, columns] - expected[here, columns]) / magnitude[here, columns]
    assert np.max(error) < 1e-6
    assert (np.delete(y, np.arange(64, 128), axis=1) == 7).all()
    assert (y[:first] == 7).all()
    assert (y[last + -last % BLOCK_ROWS :] == 7).all()


@needs_amx
def test_nan_affects_only_its_row(random: np.random.Generator) -> None:
    q = quantize(random.standard_normal((64, 128)).astype(np.float32), 4, 64)
    rows = random.standard_normal((5, 128)).astype(np.float32)
    rows[3, 77] = np.nan
    y = np.zeros((8, PANEL_OUTPUTS), np.float32)
    multiply(rows, QuantizedWeight(q), 0, 0, 5, y)
    np.testing.assert_array_equal(np.isnan(y[:5]).all(axis=1), [False, False, False, True, False])
    np.testing.assert_array_equal(np.isnan(y[:5]).any(axis=1), [False, False, False, True, False])
