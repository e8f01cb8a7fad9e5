"""Elementwise kernels on the emulator, compared with the generic ops in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.emulator import compile_module
from tests.support.cuda_types import GENERIC, TYPES, assert_near, every_type


def kernels(real: str) -> Any:
    return compile_module(["activation.cuh", "elementwise.cu"], {"REAL": real})


@every_type
@pytest.mark.parametrize("activation", [0, 1, 2, 3])
def test_epilogue_and_activation(real: str, activation: int, random: np.random.Generator) -> None:
    y = random.normal(size=(3, 70)).astype(TYPES[real])
    bias = random.normal(size=70).astype(TYPES[real])
    residual = random.normal(size=(3, 70)).astype(np.float32)
    apply = [lambda x: x, GENERIC.gelu_new, GENERIC.gelu, GENERIC.relu][activation]
    plain = apply(y.astype(np.float64))
    biased = apply(y.astype(np.float64) + bias.astype(np.float64))
    for b, r, float32_out, expected in (
        (None, None, 0, plain),
        (bias, None, 0, biased),
        (bias, residual, 1, biased + residual),
    ):
        out = np.zeros((3, 70), np.float32 if float32_out else TYPES[real])
        args = [y, b, r, out, np.int32(70), np.int32(activation), np.int32(float32_out)]
        kernels(real).launch("linear_epilogue", (3, 1, 1), (32, 1, 1), args)
        assert_near(out, expected, real)
    if activation:
        out = np.zeros_like(y)
        args = [y, out, np.int64(y.size), np.int32(activation)]
        kernels(real).launch("activate", (2, 1, 1), (32, 1, 1), args)
        assert_near(out, plain, real)


def test_gather_last(random: np.random.Generator) -> None:
    x = random.normal(size=(3, 5, 70)).astype(np.float32)
    out = np.zeros((3, 70), np.float32)
    args = [x.reshape(15, 70), out, np.int32(5), np.int32(70)]
    kernels("half_t").launch("gather_last", (3, 1, 1), (32, 1, 1), args)
    assert out.tolist() == x[:, -1].tolist()
