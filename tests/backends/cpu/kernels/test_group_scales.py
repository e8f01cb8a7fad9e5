"""Scales and offsets in words: what goes in comes back, and what does not stays in floats."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba", reason="the kernels need Numba")

from gptx.backends.cpu.compiled import QuantizedWeight
from gptx.backends.cpu.kernels.group_scales import as_words, of_lanes
from gptx.quantization import QuantizedTensor, dequantize, quantize


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("size", [1e-5, 0.02, 1.0, 500.0])
def test_what_quantize_makes_goes_into_words(
    size: float, group: int, bits: int, random: np.random.Generator
) -> None:
    w = (size * random.standard_normal((200, 3 * group))).astype(np.float32)
    w[7] = 0
    q = quantize(w, bits, group)
    packed = as_words(q.scales, q.offsets, bits)
    assert packed is not None
    assert packed.dtype == np.uint32
    scales, offsets = of_lanes(packed[..., None], np.zeros(200, int), bits)
    lost = bits - 3  # of a fraction of 23 bits
    np.testing.assert_allclose(scales, q.scales, rtol=2.0 ** (lost - 24))
    np.testing.assert_allclose(offsets, q.offsets, rtol=2.0 ** (lost - 23) + 2**-22)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_that_is_rounded_up_to_the_next_exponent(sign: int, bits: int) -> None:
    scale = sign * np.nextafter(np.float32([[1.0, 2.0**-24]]), np.float32(0))
    words = as_words(scale, -7 * scale, bits)
    assert words is not None
    scales, offsets = of_lanes(words[..., None], np.zeros(1, int), bits)
    np.testing.assert_array_equal(scales, sign * np.float32([[1.0, 2.0**-24]]))
    np.testing.assert_array_equal(offsets, -7 * scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("scale", "offset"),
    [
        (0.1, -0.55),  # no whole number of scales
        (0.1, None),  # one more of them than a code can be
        (0.1, 0.1),  # one of the wrong sign
        (2.0**-25, -(2.0**-22)),
        (2.0**8, -(2.0**11)),
        (np.nextafter(np.float32(2**8), 0), -(2.0**11)),  # it is rounded to that
        (0.0, 0.0),
        (0.0, 1.0),
        (np.inf, -np.inf),
        (np.nan, 0.0),
        (0.1, np.nan),
    ],
)
def test_what_does_not_fit_stays_in_floats(
    scale: float, offset: float | None, bits: int, random: np.random.Generator
) -> None:
    scales, biases = (np.full((16, 2), x, np.float32) for x in (0.1, -0.1 * (2**bits - 1)))
    assert as_words(scales, biases, bits) is not None
    offset = -scale * 2**bits if offset is None else offset
    scales[5, 1], biases[5, 1] = scale, offset
    assert as_words(scales, biases, bits) is None
    codes = random.integers(0, 2**32, (16, 2 * bits), np.uint32)
    tiles = QuantizedWeight(QuantizedTensor(codes, scales, biases, 32, bits))
    assert tiles.steps == 0
    got = tiles.scales.view(np.float32)[0, 1, 5::16]
    np.testing.assert_array_equal(got, np.float32([scale, offset]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [0.0, 9.0])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_of_both_kinds(
    rows: int, shift: float, bits: int, random: np.random.Generator
) -> None:
    w = (random.standard_normal((150, 192)) + shift).astype(np.float32)
    q = quantize(w, bits, 32)
    tiles, exact = QuantizedWeight(q), dequantize(q).astype(np.float64)
    assert tiles.steps == (0 if shift else bits)  # far from zero, offsets are many scales
    x = random.standard_normal((rows, 192)).astype(np.float32)
    most = np.abs(x).astype(np.float64) @ np.abs(exact).T
    assert np.max(np.abs(tiles.product(x, None, 2) - x @ exact.T) / most) < 2e-6
    ids = np.array([[0, 149], [17, 64]])
    np.testing.assert_allclose(tiles.rows(ids), exact[ids], rtol=2.0 ** (bits - 27), atol=1e-6)
