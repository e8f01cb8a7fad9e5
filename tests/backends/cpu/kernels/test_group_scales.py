"""Scales and offsets as words: exact round trips, and floats where a word cannot encode them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba", reason="the kernels need Numba")

from gptx.backends.cpu.interface.group_words import decode_lanes, encode_words
from gptx.backends.cpu.quantized import QuantizedWeight
from gptx.quantization import QuantizedTensor, dequantize, quantize


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("size", [1e-5, 0.02, 1.0, 500.0])
def test_words_encode_the_scales_of_quantize(
    size: float, group_size: int, bits: int, random: np.random.Generator
) -> None:
    w = (size * random.standard_normal((200, 3 * group_size))).astype(np.float32)
    w[7] = 0
    q = quantize(w, bits, group_size)
    words = encode_words(q.scales, q.offsets, bits)
    assert words is not None
    assert words.dtype == np.uint32
    scales, offsets = decode_lanes(words[..., None], np.zeros(200, int), bits)
    lost = bits - 3  # of a fraction of 23 bits
    np.testing.assert_allclose(scales, q.scales, rtol=2.0 ** (lost - 24))
    np.testing.assert_allclose(offsets, q.offsets, rtol=2.0 ** (lost - 23) + 2**-22)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_rounded_up_to_the_next_exponent(sign: int, bits: int) -> None:
    scale = sign * np.nextafter(np.float32([[1.0, 2.0**-24]]), np.float32(0))
    words = encode_words(scale, -7 * scale, bits)
    assert words is not None
    scales, offsets = decode_lanes(words[..., None], np.zeros(1, int), bits)
    np.testing.assert_array_equal(scales, sign * np.float32([[1.0, 2.0**-24]]))
    np.testing.assert_array_equal(offsets, -7 * scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("scale", "offset"),
    [
        (0.1, -0.55),  # no whole number of scales
        (0.1, None),  # one scale more than the largest quantized value
        (0.1, 0.1),  # the wrong sign
        (2.0**-25, -(2.0**-22)),
        (2.0**8, -(2.0**11)),
        (np.nextafter(np.float32(2**8), 0), -(2.0**11)),  # rounds to 2**8
        (0.0, 0.0),
        (0.0, 1.0),
        (np.inf, -np.inf),
        (np.nan, 0.0),
        (0.1, np.nan),
    ],
)
def test_other_scales_stay_floats(
    scale: float, offset: float | None, bits: int, random: np.random.Generator
) -> None:
    scales, offsets = (np.full((16, 2), x, np.float32) for x in (0.1, -0.1 * (2**bits - 1)))
    assert encode_words(scales, offsets, bits) is not None
    offset = -scale * 2**bits if offset is None else offset
    scales[5, 1], offsets[5, 1] = scale, offset
    assert encode_words(scales, offsets, bits) is None
    words = random.integers(0, 2**32, (16, 2 * bits), np.uint32)
    weight = QuantizedWeight(QuantizedTensor(words, scales, offsets, 32, bits))
    assert weight.offset_bits == 0
    got = weight.groups.view(np.float32)[0, 1, 5::16]
    np.testing.assert_array_equal(got, np.float32([scale, offset]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [0.0, 9.0])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_with_both_encodings(
    rows: int, shift: float, bits: int, random: np.random.Generator
) -> None:
    w = (random.standard_normal((150, 192)) + shift).astype(np.float32)
    q = quantize(w, bits, 32)
    weight, exact = QuantizedWeight(q), dequantize(q).astype(np.float64)
    assert weight.offset_bits == (0 if shift else bits)  # a large shift is too many scales
    x = random.standard_normal((rows, 192)).astype(np.float32)
    most = np.abs(x).astype(np.float64) @ np.abs(exact).T
    assert np.max(np.abs(weight.multiply(x, None, 2) - x @ exact.T) / most) < 2e-6
    ids = np.array([[0, 149], [17, 64]])
    np.testing.assert_allclose(
        weight.take_rows(ids), exact[ids], rtol=2.0 ** (bits - 27), atol=1e-6
    )
