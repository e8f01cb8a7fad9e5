"""GEMV with quantized weights: as floats, and by products of integers that the processor has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from gptx.quantization import dequantize, quantize

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

from gptx.backends.cpu.interface.cpu_features import HAS_BYTE_PRODUCTS, HAS_PAIR_PRODUCTS
from gptx.backends.cpu.kernels import gemv_bytes, gemv_pairs, gemv_words
from gptx.backends.cpu.kernels.arguments import QuantizedMatrix
from gptx.backends.cpu.quantized import QuantizedWeight
from tests.support.kernels import cached, with_encoded_scales, with_float16_scales


@cache
def _kernels(module: Any) -> tuple[Any, Any, Any]:
    return cached(module.prepare_row), cached(module.multiply_int8), cached(module.multiply_int4)


@pytest.fixture(params=["floats", "pairs", "bytes"])
def product(request: pytest.FixtureRequest) -> Callable[[np.ndarray, QuantizedWeight], np.ndarray]:
    """Multiply a row [I] by a matrix: outputs [O]."""
    if request.param == "bytes" and not HAS_BYTE_PRODUCTS:
        pytest.skip("this processor has neither AVX-512 VNNI nor NEON's dot products")
    if request.param == "pairs" and not HAS_PAIR_PRODUCTS:
        pytest.skip("this processor has no pmaddwd")
    module = {"floats": gemv_words, "pairs": gemv_pairs, "bytes": gemv_bytes}[request.param]
    prepare_row, multiply_int8, multiply_int4 = _kernels(module)

    def multiply(row: np.ndarray, weight: QuantizedWeight) -> np.ndarray:
        n_out, n_in = weight.shape
        x = np.full(2 * n_in, np.nan, np.float32)  # NaN shows a read of what no kernel wrote
        x[:n_in] = row
        prepare_row(x, n_in, weight.group_size, weight.bits)
        multiply_strips = multiply_int8 if weight.bits == 8 else multiply_int4
        matrix = QuantizedMatrix(
            weight.words.reshape(-1), weight.groups.reshape(-1), weight.offset_bits,
            n_in, weight.group_size, weight.bits,
        )  # fmt: skip
        y = np.full(weight.words.shape[0] * 16, np.nan, np.float32)
        multiply_strips(matrix, 0, 1, x, y)
        multiply_strips(matrix, 1, len(y) // 16, x, y)
        return y[:n_out]

    return multiply


def error(y: np.ndarray, w: np.ndarray, row: np.ndarray) -> float:
    """Return the largest error, relative to the largest sum that the terms may have."""
    exact = w.astype(np.float64) @ row.astype(np.float64)
    most = np.abs(w).astype(np.float64).sum(axis=1) * np.abs(row).max()
    return float(np.max(np.abs(y - exact) / most))


@pytest.mark.parametrize("scales", [with_encoded_scales, with_float16_scales])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_in", [128, 768, 1600, 6400])
def test_products(
    n_in: int, bits: int, group_size: int, scales: Any, product: Any, random: np.random.Generator
) -> None:
    n_in -= n_in % group_size
    q = scales(quantize(random.standard_normal((100, n_in)).astype(np.float32), bits, group_size))
    row = random.standard_normal(n_in).astype(np.float32)
    assert error(product(row, QuantizedWeight(q)), dequantize(q), row) < 1e-7


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_sums_do_not_overflow(bits: int, product: Any) -> None:
    """A group's sums have 32 bits; the worst case has the largest values, all of one sign."""
    w = np.ones((64, 128), np.float32)
    w[:, ::128] = 0  # quantized values from 0 to the largest, of which almost all are the largest
    q = with_encoded_scales(quantize(w, bits, 128))
    for sign in (1, -1):
        row = np.full(128, sign * 3.7, np.float32)
        # An overflow would be an error of about 1; without fused additions, floats round more.
        assert error(product(row, QuantizedWeight(q)), dequantize(q), row) < 2e-6


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-20, 1e20])
def test_rows_of_any_magnitude(magnitude: float, product: Any, random: np.random.Generator) -> None:
    q = quantize(random.standard_normal((64, 64)).astype(np.float32), 8, 64)
    row = (random.uniform(-1, 1, 64) * magnitude).astype(np.float32)
    y = product(row, QuantizedWeight(q))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, dequantize(q) @ row, rtol=1e-4, atol=1e-5 * magnitude)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 13, 63])
def test_non_finite_inputs_give_non_finite_outputs(column: int, bad: float, product: Any) -> None:
    q = quantize(np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64), 4, 32)
    row = np.ones(64, np.float32)
    row[column] = bad
    assert not np.isfinite(product(row, QuantizedWeight(q))).any()
