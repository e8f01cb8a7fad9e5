"""Ops on quantized matrices: every backend against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptx.backends import Backend
from gptx.quantization import GROUP_SIZES, QuantizedTensor, dequantize, quantize
from tests.support.backends import make_backend

KINDS = [(bits, group_size) for bits in (4, 8) for group_size in GROUP_SIZES]
# outputs, groups in a row, B and T of x: one row, odd sizes, a batch
SIZES = [
    (1, 1, (1, 1)),
    (5, 3, (1, 1)),
    (97, 2, (1, 7)),
    (64, 1, (3, 1)),
    (257, 5, (2, 3)),
    (8, 9, (1, 40)),
]


def matrix(
    random: np.random.Generator, n_out: int, n_in: int, bits: int, size: int
) -> QuantizedTensor:
    return quantize(random.normal(size=(n_out, n_in)) / n_in**0.5, bits, size)


def ops(
    backend: Backend, q: QuantizedTensor, x: np.ndarray, bias: np.ndarray, ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the result of each op on a quantized matrix, on the host."""
    with backend.scope():
        x, bias, ids = (backend.asarray(a) for a in (x, bias, ids))
        table: Any = backend.pack_quantized(q, table=True)
        results = {
            "linear": backend.linear(x, backend.pack_quantized(q), bias),
            "unembed": backend.unembed(x, table),
            "embed": backend.embed(ids, table),
        }
        return {op: backend.to_numpy(y) for op, y in results.items()}


def exact_ops(
    q: QuantizedTensor, x: np.ndarray, bias: np.ndarray, ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the same results in float64 NumPy."""
    w = dequantize(q).astype(np.float64)
    return {"linear": x @ w.T + bias, "unembed": x @ w.T, "embed": w[ids]}


def arguments(
    random: np.random.Generator, q: QuantizedTensor, rows: tuple[int, int]
) -> tuple[Any, ...]:
    n_out, n_in = q.shape
    x, bias = random.normal(size=(*rows, n_in)), random.normal(size=n_out)
    return x, bias, random.integers(0, n_out, rows)


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
@pytest.mark.parametrize("name", ["numpy", "numpy-generic", "mlx", "cupy", "cupy-cpu", "strict"])
def test_ops_agree_with_float64(
    name: str, bits: int, group_size: int, random: np.random.Generator
) -> None:
    backend = make_backend(name)
    for n_out, n_groups, rows in SIZES:
        q = matrix(random, n_out, n_groups * group_size, bits, group_size)
        given = arguments(random, q, rows)
        expected = exact_ops(q, *given)
        for op, got in ops(backend, q, *given).items():
            assert got.shape == expected[op].shape
            np.testing.assert_allclose(got, expected[op], rtol=3e-6, atol=5e-6, err_msg=op)


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ops_in_16_bits(
    dtype: str, bits: int, group_size: int, random: np.random.Generator
) -> None:
    backend = make_backend("mlx", dtype=dtype)
    eps = {"float16": 2**-10, "bfloat16": 2**-7}[dtype]
    q = matrix(random, 97, 2 * group_size, bits, group_size)
    given = arguments(random, q, (2, 3))
    expected = exact_ops(q, *given)
    for op, got in ops(backend, q, *given).items():
        scale = np.abs(expected[op]).max() + 1
        np.testing.assert_allclose(got, expected[op], atol=8 * eps * scale, err_msg=op)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_results_have_the_types_of_the_float_ops(dtype: str, random: np.random.Generator) -> None:
    backend = make_backend("mlx", dtype=dtype)
    x, ids = backend.asarray(random.normal(size=(1, 2, 64))), backend.asarray(np.array([[1, 2]]))
    q = matrix(random, 5, 64, 4, 32)
    table = backend.pack_quantized(q, table=True)
    assert (
        backend.linear(x, backend.pack_quantized(q), backend.zeros((5,))).dtype
        == backend.float_dtype
    )
    assert backend.embed(ids, table).dtype == backend.float_dtype
    assert backend.unembed(x, table).dtype == backend.accumulation_dtype


@pytest.mark.parametrize("name", ["numpy-generic", "strict", "mlx-generic"])
def test_generic_packs_floats(name: str, random: np.random.Generator) -> None:
    """The layout is [in, out] for a linear layer, as on the Hub, and [out, in] for a table."""
    q = matrix(random, 5, 64, 8, 32)
    backend = make_backend(name)
    linear, table = (backend.to_numpy(backend.pack_quantized(q, table=t)) for t in (False, True))
    np.testing.assert_array_equal(linear, dequantize(q).T)
    np.testing.assert_array_equal(table, dequantize(q))


def test_mlx_stores_quantized_values(random: np.random.Generator) -> None:
    q = matrix(random, 5, 64, 4, 32)
    held = make_backend("mlx").pack_quantized(q)
    assert sum(x.nbytes for x in held if hasattr(x, "nbytes")) == q.nbytes
