"""Scale and offset of each group of quantized weights, encoded for the kernels.

An entry holds those of one group of 16 outputs side by side: 16 float scales and 16 float offsets,
or 16 words. A word holds a scale, and the offset as a whole number of scales: `mx.quantize` and
compatible quantizers make the offset a multiple of the scale. Words reduce the memory traffic by a
tenth with 4 bits to a weight, and by a twentieth with 8. Scales and offsets that a file rounds
to 16 bits stay floats.

The bits of a word, from the highest: the scale's sign, 5 bits of its exponent, its fraction, and
the number of scales to subtract, in as many bits as a quantized value. With 4 bits the fraction
has 22 bits, one less than float32's. With 8 it has 18: a weight is off by at most a part in
500,000, a thousandth of the quantization error.
"""

from __future__ import annotations

import numpy as np

from gptx.backends.cpu.interface.sizes import LANES

Array = np.ndarray

EXPONENT_SHIFT = 3  # a word's exponent begins at bit 26, float32's at 23
MIN_EXPONENT = 103  # float32's biased exponent of 2**-24, which a word encodes as 0
MAX_OFFSET_ERROR = 2.0**-21  # relative: the offset and the scale that divides it are rounded


def encode_words(scales: Array, offsets: Array, bits: int) -> Array | None:
    """Encode float32 scales and offsets [...] of values with `bits` bits as uint32 words [...].

    Returns
    -------
    np.ndarray or None
        None if a word cannot represent one of them.
    """
    with np.errstate(all="ignore"):  # no word represents infinity or NaN either
        multiples = np.rint(-offsets / scales)
        fits = (multiples >= 0) & (multiples < 2**bits)
        fits &= np.abs(multiples * scales + offsets) <= MAX_OFFSET_ERROR * np.abs(offsets)
    lost = bits - EXPONENT_SHIFT  # of the 23 bits of a fraction
    rounded = scales.view(np.uint32) + np.uint32(2 ** (lost - 1))
    magnitude = (rounded & np.uint32(2**31 - 2**lost)) - np.uint32(MIN_EXPONENT << 23)
    if not (fits & (magnitude < 2**28)).all():  # an exponent below the minimum wraps around
        return None
    sign = rounded & np.uint32(2**31)
    return sign | magnitude << np.uint32(EXPONENT_SHIFT) | multiples.astype(np.uint32)


def decode_lanes(groups: Array, lanes: Array, offset_bits: int) -> tuple[Array, Array]:
    """Return scales and offsets [..., G] of one output each from entries [..., G, 16 or 32]."""
    lanes = lanes[..., None, None]
    words = np.take_along_axis(groups, lanes, -1)[..., 0]
    if not offset_bits:
        offsets = np.take_along_axis(groups, lanes + LANES, -1)[..., 0]
        return words.view(np.float32), offsets.view(np.float32)
    low = np.uint32(2**offset_bits - 1)
    magnitude = (words & np.uint32(2**31 - 2**offset_bits)) >> np.uint32(EXPONENT_SHIFT)
    bits = magnitude + np.uint32(MIN_EXPONENT << 23) | words & np.uint32(2**31)
    scales = bits.view(np.float32)
    return scales, -scales * (words & low).astype(np.float32)
