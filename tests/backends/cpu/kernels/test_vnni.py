"""One row times codes: in floats, and in bytes where the processor has VNNI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gptx.quantization import dequantize, quantize

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install 'gptx[fast]')")

from gptx.backends.cpu.compiled import QuantizedWeight
from gptx.backends.cpu.kernels import gemm as numpy_products
from gptx.backends.cpu.kernels import vnni
from tests.support.kernels import as_kept, in_16_bits

WAYS = {
    "floats": (numpy_products.shrink_row, numpy_products.times_int8, numpy_products.times_int4),
    "bytes": (vnni.cut_row, vnni.times_int8, vnni.times_int4),
}


@pytest.fixture(params=WAYS)
def product(request: pytest.FixtureRequest) -> Callable[[np.ndarray, QuantizedWeight], np.ndarray]:
    """A way to multiply a row [I] by a matrix: outputs [O]."""
    if request.param == "bytes" and not vnni.COMPILED:
        pytest.skip("this processor has no AVX-512 VNNI")
    prepare, times_int8, times_int4 = WAYS[request.param]

    def multiply(row: np.ndarray, tiles: QuantizedWeight) -> np.ndarray:
        n_out, n_in = tiles.shape
        x = np.full(2 * n_in, np.nan, np.float32)  # what is there before does not matter
        x[:n_in] = row
        prepare(x, n_in, tiles.group, tiles.bits)
        times: Any = times_int8 if tiles.bits == 8 else times_int4
        parts = tiles.weight.reshape(-1), tiles.scales.reshape(-1), tiles.steps
        y = np.full(tiles.weight.shape[0] * 16, np.nan, np.float32)
        for tile in range(len(y) // 16):
            times(*parts, x, tile, n_in, tiles.group, y)
        return y[:n_out]

    return multiply


def error(y: np.ndarray, w: np.ndarray, row: np.ndarray) -> float:
    """The largest error, of what the terms of a product may add up to."""
    exact = w.astype(np.float64) @ row.astype(np.float64)
    most = np.abs(w).astype(np.float64).sum(axis=1) * np.abs(row).max()
    return float(np.max(np.abs(y - exact) / most))


@pytest.mark.parametrize("scales", [as_kept, in_16_bits])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_in", [128, 768, 1600, 6400])
def test_products(
    n_in: int, bits: int, group: int, scales: Any, product: Any, random: np.random.Generator
) -> None:
    if n_in % group:
        n_in -= n_in % group
    q = scales(quantize(random.standard_normal((100, n_in)).astype(np.float32), bits, group))
    row = random.standard_normal(n_in).astype(np.float32)
    assert error(product(row, QuantizedWeight(q)), dequantize(q), row) < 1e-7


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_numbers_at_every_place_do_not_wrap_around(bits: int, product: Any) -> None:
    """The sums of a group are whole numbers of 32 bits: the worst case is all of one sign."""
    w = np.ones((64, 128), np.float32)
    w[:, ::128] = 0  # codes from 0 to the largest, of which almost all are the largest
    q = as_kept(quantize(w, bits, 128))
    for sign in (1, -1):
        row = np.full(128, sign * 3.7, np.float32)
        assert error(product(row, QuantizedWeight(q)), dequantize(q), row) < 1e-7


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e20])
def test_rows_of_any_size(size: float, product: Any, random: np.random.Generator) -> None:
    q = quantize(random.standard_normal((64, 64)).astype(np.float32), 8, 64)
    row = (random.uniform(-1, 1, 64) * size).astype(np.float32)
    y = product(row, QuantizedWeight(q))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, dequantize(q) @ row, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 13, 63])
def test_what_is_not_finite_shows(column: int, bad: float, product: Any) -> None:
    q = quantize(np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64), 4, 32)
    row = np.ones(64, np.float32)
    row[column] = bad
    assert not np.isfinite(product(row, QuantizedWeight(q))).any()
