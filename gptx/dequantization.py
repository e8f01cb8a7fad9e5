"""Dequantization of the matrices of MLX that no backend computes with.

Backends compute with 8-bit and 4-bit integers in MLX's affine mode, see `gptx.quantization`. A file
can have affine quantized values of 2, 3, 5 or 6 bits, or small floats with one scale a group
(https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html):

- mxfp4 and mxfp8: E2M1 or E4M3, and a scale E8M0, a power of two (OCP Microscaling Formats 1.0);
- nvfp4: E2M1, and a scale E4M3.

The numbers of a row are a stream of bits, lowest bits first, in words of 32 bits.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from gptx.quantization import Quantization, row_blocks


@np.errstate(all="ignore")  # a damaged file can have scales that are not finite
def dequantize_stored(
    weight: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None, kind: Quantization
) -> np.ndarray:
    """Return the floats of a matrix, float32 [O, I].

    Parameters
    ----------
    weight
        Numbers of `kind.bits` bits, packed: uint32 [O, I * bits / 32].
    scales
        [O, I / group_size]: float32 for the mode affine, else the bits of the small float, uint8.
    offsets
        Float32 of the same shape for the mode affine, else None.
    """
    n_out, n_in = len(weight), weight.shape[1] * 32 // kind.bits
    w = np.empty((n_out, n_in // kind.group_size, kind.group_size), np.float32)
    for rows in row_blocks(n_out, n_in):
        packed = unpack_bits(weight[rows], kind.bits).reshape(w[rows].shape)
        if offsets is None:
            numbers, scale_of = _tables(kind.mode)
            np.multiply(numbers[packed], scale_of[scales[rows], None], out=w[rows])
        else:
            np.multiply(packed, scales[rows, :, None], out=w[rows])
            w[rows] += offsets[rows, :, None]
    return w.reshape(n_out, n_in)


def unpack_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the numbers of `bits` bits in rows of 32-bit words, uint8 [O, I]."""
    stream = np.unpackbits(
        np.ascontiguousarray(words, "<u4").view(np.uint8), axis=1, bitorder="little"
    )
    grouped = stream.reshape(len(words), -1, bits)
    return np.packbits(grouped, axis=2, bitorder="little")[..., 0]


@cache
def _tables(mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the floats of the numbers of a mode, and of its scales, by their bits."""
    e2m1, e4m3 = _small_floats(2, 1), _small_floats(4, 3)
    e4m3[[0x7F, 0xFF]] = np.nan
    e8m0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
    return {
        "mxfp4": (e2m1, e8m0),
        "mxfp8": (e4m3, e8m0),
        "nvfp4": (e2m1, e4m3),
    }[mode]


def _small_floats(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Return all numbers of a float with a sign, without infinities, by their bits."""
    bits = np.arange(2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = bits >> mantissa_bits, bits & (2**mantissa_bits - 1)
    bias = 2 ** (exponent_bits - 1) - 1
    fraction = mantissa / 2**mantissa_bits + (exponent > 0)
    positive = np.ldexp(fraction, np.maximum(exponent, 1) - bias).astype(np.float32)
    return np.concatenate([positive, -positive])
