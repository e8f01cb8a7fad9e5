"""Products with quantized matrices against float64."""

from __future__ import annotations

import numpy as np
import pytest

from gptx.quantization import dequantize, quantize

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

from gptx.backends.cpu import program
from gptx.backends.cpu.quantized import QuantizedWeight

# Inputs and outputs: whole panels, and sizes that fill no panel, strip or chunk.
MATRICES = [
    (768, 704),
    (1600, 400),
    (6400, 160),
    (768, 1007),
    (32, 1),
    (96, 63),
    (160, 65),
    (224, 130),
]
ROWS = [*range(1, 9), 19, 24, 300]


def assert_close(found: np.ndarray, exact: np.ndarray, magnitude: np.ndarray) -> None:
    """Assert that only sums were rounded; `magnitude` is the sum of the terms' magnitudes."""
    assert found.shape == exact.shape
    assert np.max(np.abs(found - exact) / magnitude) < 3e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n_in", "n_out"), MATRICES, ids=lambda n: str(n))
def test_products_of_any_shape(
    n_in: int, n_out: int, bits: int, unit: str, random: np.random.Generator
) -> None:
    group_size = 64 if n_in % 64 == 0 else 32
    w = random.standard_normal((n_out, n_in)).astype(np.float32)
    q = quantize(w, bits, group_size)
    weight, exact = QuantizedWeight(q), dequantize(q).astype(np.float64)
    bias = random.standard_normal(n_out).astype(np.float32)
    x = random.standard_normal((max(ROWS), n_in)).astype(np.float32)
    expected = x @ exact.T + bias
    magnitude = np.abs(x).astype(np.float64) @ np.abs(exact).T + np.abs(bias)
    for rows in ROWS:
        for threads in (1, 3):
            found = weight.multiply(x[:rows], bias, threads)
            assert_close(found, expected[:rows], magnitude[:rows])


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [2, 15, 16, 17, 130, 300])
def test_vectors_and_amx_agree(
    rows: int,
    bits: int,
    group_size: int,
    random: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two split and sum in different ways, so their results are close but not equal."""
    if not program.amx_is_allowed():
        pytest.skip("this processor has no AMX, or the system does not permit it")
    q = quantize(random.standard_normal((200, 384)).astype(np.float32), bits, group_size)
    x = random.standard_normal((rows, 384)).astype(np.float32)
    found = []
    for allowed in (False, True):
        monkeypatch.setattr(program, "amx_is_allowed", lambda answer=allowed: answer)
        found.append(QuantizedWeight(q).multiply(x, None, 2))
    assert_close(found[0], found[1], np.abs(x) @ np.abs(dequantize(q)).T)
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_strips_hold_the_matrix(bits: int, group_size: int, random: np.random.Generator) -> None:
    q = quantize(random.standard_normal((130, 256)).astype(np.float32), bits, group_size)
    weight = QuantizedWeight(q)
    w = dequantize(q)
    close = {"rtol": 0, "atol": 2.0 ** (bits - 26) * np.abs(w).max()}  # encoding rounds scales
    np.testing.assert_allclose(weight.take_rows(np.arange(130)), w, **close)
    np.testing.assert_allclose(weight.take_rows(np.array([[129, 0]])), w[[[129, 0]]], **close)
    x = random.standard_normal((3, 256)).astype(np.float32)
    np.testing.assert_allclose(weight.multiply(x, None, 1), x @ dequantize(q).T, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_any_magnitude(bits: int, unit: str, random: np.random.Generator) -> None:
    """Values of 4 bits are multiplied without a shift, up to 16**6 too large."""
    w = random.standard_normal((64, 128)).astype(np.float32) * 10.0 ** random.integers(
        -6, 6, (64, 1)
    )
    q = quantize(w.astype(np.float32), bits, 32)
    exact = dequantize(q).astype(np.float64)
    x = random.standard_normal((2, 128)).astype(np.float32) * np.float32(1e3)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(exact).T
    weight = QuantizedWeight(q)
    assert_close(weight.multiply(x, None, 1), x @ exact.T, magnitude)
    assert_close(weight.multiply(x[:1], None, 1), x[:1] @ exact.T, magnitude[:1])
