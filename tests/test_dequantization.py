"""gptx.dequantization: matrices that no backend computes with, against MLX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptx.dequantization import dequantize_stored, unpack_bits
from gptx.quantization import GROUP_SIZES, SMALL_FLOATS, STORED_BITS, Quantization

AFFINE = [Quantization(size, bits) for size in GROUP_SIZES for bits in STORED_BITS]
SMALL = [Quantization(*settings, mode) for mode, settings in SMALL_FLOATS.items()]


@pytest.mark.parametrize("bits", STORED_BITS)
def test_numbers_are_a_stream_of_bits(bits: int, random: np.random.Generator) -> None:
    numbers = random.integers(0, 2**bits, (3, 64))
    packed = sum(  # a row as one large integer, its first number in the lowest bits
        int(n) << bits * i for i, n in enumerate(numbers[1])
    ).to_bytes(8 * bits, "little")
    words = np.frombuffer(packed, "<u4").reshape(1, -1)
    np.testing.assert_array_equal(unpack_bits(words, bits), numbers[1:2])


def test_small_floats_by_their_bits() -> None:
    """Tables of the Open Compute Project's OCP Microscaling Formats 1.0."""
    codes = np.arange(16, dtype=np.uint8).repeat(2)[None]  # each code in both halves of a byte
    words = (codes[:, 0::2] | codes[:, 1::2] << 4).copy().view("<u4")
    one = np.array([[127]], np.uint8)
    found = dequantize_stored(words, one, None, Quantization(32, 4, "mxfp4"))
    half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    np.testing.assert_array_equal(found[0, ::2], half + [-x for x in half])
    codes = np.array([[0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0x7F, 0xB9]], np.uint8)
    words = np.tile(codes, 4).view("<u4")
    two = np.array([[128]], np.uint8)
    found = dequantize_stored(words, two, None, Quantization(32, 8, "mxfp8"))
    expected = [0, 2**-9, 7 * 2**-9, 2**-6, 1, 448, np.nan, -1.125]
    np.testing.assert_array_equal(found[0, :8], 2 * np.array(expected))


@pytest.mark.parametrize("kind", SMALL, ids=str)
def test_large_scales_are_no_warning(kind: Quantization) -> None:
    words = np.full((2, kind.bits), 0x77777777, np.uint32)  # the largest numbers, or NaN
    scales = np.array([[254], [255]], np.uint8).repeat(32 // kind.group_size, axis=1)
    assert not np.isfinite(dequantize_stored(words, scales, None, kind)[1]).any()


@pytest.mark.parametrize("kind", AFFINE + SMALL, ids=str)
def test_every_kind_equals_that_of_mlx(kind: Quantization, random: np.random.Generator) -> None:
    mx = pytest.importorskip("mlx.core")
    w = random.standard_normal((5, 256)).astype(np.float32) * 10.0 ** random.integers(-3, 3, (5, 1))
    packed = mx.quantize(mx.array(w.astype(np.float32)), kind.group_size, kind.bits, mode=kind.mode)
    arrays: list[Any] = [np.array(part) for part in packed]
    offsets = arrays[2] if kind.mode == "affine" else None
    found = dequantize_stored(arrays[0], arrays[1], offsets, kind)
    expected = np.array(
        mx.dequantize(
            *packed, group_size=kind.group_size, bits=kind.bits, mode=kind.mode, dtype=mx.float32
        )
    )
    assert found.dtype == np.float32
    if kind.mode == "affine":  # MLX rounds once in a fused multiply-add
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * np.abs(w).max())
    else:
        np.testing.assert_array_equal(found, expected)
