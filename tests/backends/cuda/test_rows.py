"""rows.cu on the CPU: each kernel against what it stands for, in float64 on the same inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from gptx.backends import get_backend
from gptx.quantization import dequantize, quantize
from tests.emulator import compile_module

TYPES = {"float": np.float32, "half_t": np.float16, "bf16_t": bfloat16}
ERRORS = {"float": 2e-6, "half_t": 1e-3, "bf16_t": 8e-3}  # of the largest number
GENERIC = get_backend("numpy", dtype="float64", generic=True)
REALS = pytest.mark.parametrize("real", TYPES)


def kernels(real: str, bits: int = 0, group: int = 0) -> Any:
    macros = {"REAL": real, "BITS": str(bits), "GROUP": str(group)}
    return compile_module(["activation.cuh", "rows.cu"], macros)


def near(given: np.ndarray, expected: np.ndarray, real: str) -> None:
    error = np.abs(given.astype(np.float64) - expected).max()
    assert error <= ERRORS[real] * np.abs(expected).max()


@REALS
@pytest.mark.parametrize("n", [1, 40, 257])
def test_layer_norms_are_the_generic_one(real: str, n: int, random: np.random.Generator) -> None:
    x = (random.normal(size=(3, n)) + 100).astype(TYPES[real])  # far from 0: what cancels shows
    weight, bias = random.normal(size=(2, n)).astype(TYPES[real])
    wide = (a.astype(np.float64) for a in (x, weight, bias))
    expected = GENERIC.layer_norm(*wide, 1e-5)
    for name, rows in (("normalize", x.astype(np.float32)), ("layer_norm", x)):
        out = np.zeros((3, n), TYPES[real])
        args = [rows, weight, bias, np.float32(1e-5), out, np.int32(n)]
        kernels(real).launch(name, (3, 1, 1), (64, 1, 1), args)
        np.testing.assert_allclose(out.astype(np.float64), expected, rtol=0, atol=0.03)
        if real == "float":
            np.testing.assert_allclose(out, expected, rtol=0, atol=2e-4)


@REALS
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_finished_product_has_all_that_follows(
    real: str, number: int, random: np.random.Generator
) -> None:
    y = random.normal(size=(3, 70)).astype(TYPES[real])
    bias = random.normal(size=70).astype(TYPES[real])
    residual = random.normal(size=(3, 70)).astype(np.float32)
    activation = [lambda x: x, GENERIC.gelu_new, GENERIC.gelu, GENERIC.relu][number]
    plain = activation(y.astype(np.float64))
    biased = activation(y.astype(np.float64) + bias.astype(np.float64))
    for b, r, wide, expected in (
        (None, None, 0, plain),
        (bias, None, 0, biased),
        (bias, residual, 1, biased + residual),
    ):
        out = np.zeros((3, 70), np.float32 if wide else TYPES[real])
        args = [y, b, r, out, np.int32(70), np.int32(number), np.int32(wide)]
        kernels(real).launch("finish", (3, 1, 1), (32, 1, 1), args)
        near(out, expected, real)
    if number:
        out = np.zeros_like(y)
        args = [y, out, np.int64(y.size), np.int32(number)]
        kernels(real).launch("activate", (2, 1, 1), (32, 1, 1), args)
        near(out, plain, real)


@pytest.mark.parametrize(
    ("real", "bits", "group"),
    [("float", 0, 0), ("half_t", 0, 0), ("bf16_t", 0, 0), ("half_t", 8, 32), ("bf16_t", 4, 64)],
)
def test_embedding_adds_the_rows_of_tokens_and_positions(
    real: str, bits: int, group: int, random: np.random.Generator
) -> None:
    table, positions = random.normal(size=(2, 11, 128)).astype(TYPES[real])
    parts: list[Any] = [table, None, None]
    expected = table.astype(np.float64)
    if bits:
        q = quantize(table.astype(np.float32), bits, group)
        parts, expected = [q.weight, q.scales, q.offsets], dequantize(q).astype(np.float64)
    ids, index = np.array([10, 0, 3, 3]), np.array([0, 10, 1, 2])
    out = np.zeros((4, 128), np.float32)
    args = [ids, index, *parts, positions, out, np.int32(128)]
    kernels(real, bits, group).launch("embed", (4, 1, 1), (64, 1, 1), args)
    exact = expected[ids] + positions[index].astype(np.float64)
    np.testing.assert_allclose(out, exact, atol=1e-6)
    before, next_out = index - 1, np.zeros_like(out)
    args = [np.array([ids.ctypes.data]), before, *args[2:6], next_out, np.int32(128)]
    kernels(real, bits, group).launch("embed_next", (4, 1, 1), (64, 1, 1), args)
    assert next_out.tolist() == out.tolist()
    assert before.tolist() == index.tolist()


def test_the_last_row_of_each_sequence_is_taken(random: np.random.Generator) -> None:
    x = random.normal(size=(3, 5, 70)).astype(np.float32)
    out = np.zeros((3, 70), np.float32)
    args = [x.reshape(15, 70), out, np.int32(5), np.int32(70)]
    kernels("half_t").launch("take_last", (3, 1, 1), (32, 1, 1), args)
    assert out.tolist() == x[:, -1].tolist()


@pytest.mark.parametrize(("real", "bits", "group"), [("half_t", 8, 32), ("bf16_t", 4, 64)])
def test_expanded_codes_are_the_weights(
    real: str, bits: int, group: int, random: np.random.Generator
) -> None:
    q = quantize(random.normal(size=(5, 128)).astype(np.float32), bits, group)
    out = np.zeros((5, 128), TYPES[real])
    args = [q.weight, q.scales, q.offsets, out, np.int32(128)]
    kernels(real, bits, group).launch("expand", (5, 1, 1), (64, 1, 1), args)
    near(out, dequantize(q), real)
