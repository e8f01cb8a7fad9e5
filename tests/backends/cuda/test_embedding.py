"""Embedding kernels on the emulator, compared with NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptx.quantization import dequantize, quantize
from tests.emulator import compile_module
from tests.support.cuda_types import TYPES, assert_near


def kernels(real: str, bits: int = 0, group_size: int = 0) -> Any:
    macros = {"REAL": real, "BITS": str(bits), "GROUP": str(group_size)}
    return compile_module(["embedding.cu"], macros)


@pytest.mark.parametrize(
    ("real", "bits", "group_size"),
    [("float", 0, 0), ("half_t", 0, 0), ("bf16_t", 0, 0), ("half_t", 8, 32), ("bf16_t", 4, 64)],
)
def test_embeddings_of_tokens_and_positions_are_added(
    real: str, bits: int, group_size: int, random: np.random.Generator
) -> None:
    table, positions = random.normal(size=(2, 11, 128)).astype(TYPES[real])
    arrays: list[Any] = [table, None, None]
    expected = table.astype(np.float64)
    if bits:
        q = quantize(table.astype(np.float32), bits, group_size)
        arrays, expected = [q.weight, q.scales, q.offsets], dequantize(q).astype(np.float64)
    ids, index = np.array([10, 0, 3, 3]), np.array([0, 10, 1, 2])
    out = np.zeros((4, 128), np.float32)
    args = [ids, index, *arrays, positions, out, np.int32(128)]
    kernels(real, bits, group_size).launch("embed_prefill", (4, 1, 1), (64, 1, 1), args)
    exact = expected[ids] + positions[index].astype(np.float64)
    np.testing.assert_allclose(out, exact, atol=1e-6)
    before, next_out = index - 1, np.zeros_like(out)
    args = [np.array([ids.ctypes.data]), before, *args[2:6], next_out, np.int32(128)]
    kernels(real, bits, group_size).launch("embed_decode", (4, 1, 1), (64, 1, 1), args)
    assert next_out.tolist() == out.tolist()
    assert before.tolist() == index.tolist()


@pytest.mark.parametrize(("real", "bits", "group_size"), [("half_t", 8, 32), ("bf16_t", 4, 64)])
def test_dequantize(real: str, bits: int, group_size: int, random: np.random.Generator) -> None:
    q = quantize(random.normal(size=(5, 128)).astype(np.float32), bits, group_size)
    out = np.zeros((5, 128), TYPES[real])
    args = [q.weight, q.scales, q.offsets, out, np.int32(128)]
    kernels(real, bits, group_size).launch("dequantize", (5, 1, 1), (64, 1, 1), args)
    assert_near(out, dequantize(q), real)
