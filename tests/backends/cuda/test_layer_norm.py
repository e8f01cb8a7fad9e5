"""Layer norm kernels on the emulator, compared with the generic op in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import compile_module
from tests.support.cuda_types import GENERIC, TYPES, every_type


@every_type
@pytest.mark.parametrize("n", [1, 40, 257])
def test_layer_norms_agree_with_the_generic_op(
    real: str, n: int, random: np.random.Generator
) -> None:
    x = (random.normal(size=(3, n)) + 100).astype(TYPES[real])  # a large mean: cancellation shows
    weight, bias = random.normal(size=(2, n)).astype(TYPES[real])
    in_float64 = (a.astype(np.float64) for a in (x, weight, bias))
    expected = GENERIC.layer_norm(*in_float64, 1e-5)
    for name, rows in (("layer_norm_stream", x.astype(np.float32)), ("layer_norm", x)):
        out = np.zeros((3, n), TYPES[real])
        args = [rows, weight, bias, np.float32(1e-5), out, np.int32(n)]
        kernels = compile_module(["reductions.cuh", "layer_norm.cu"], {"REAL": real})
        kernels.launch(name, (3, 1, 1), (64, 1, 1), args)
        np.testing.assert_allclose(out.astype(np.float64), expected, rtol=0, atol=0.03)
        if real == "float":
            np.testing.assert_allclose(out, expected, rtol=0, atol=2e-4)
