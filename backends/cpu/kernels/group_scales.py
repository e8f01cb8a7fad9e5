"""Scale and offset of each group of quantized weights, as the NumPy backend's kernels read them.

Those of a group of 16 outputs lie side by side: as floats, 16 scales and 16 offsets; or, since
`mx.quantize` and those who do as it does make an offset a whole number of scales, as 16 words
that hold a scale and that number. This saves a tenth of what is read with codes of 4 bits, and a
twentieth with 8. Files whose scales and offsets were rounded to 16 bits stay with floats.

A word is, from above: the scale's sign, 5 bits of its exponent, its fraction, and the number of
scales that are subtracted, which can be as large as a code and has as many bits. For codes of 4
bits a fraction has 22, one less than float32's. For 8 it has 18, and a weight is off by a part in
500,000 at most: a thousandth of what quantizing took from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.kernels.simd import (
    AHEAD,
    FLOATS,
    I32,
    INTS,
    LANES,
    compiled,
    filled,
    floats,
    load,
    prefetch_once,
    splat,
)

Array = np.ndarray

SHIFT = 3  # a word's exponent begins at its bit 26, float32's at 23
LOWEST = 103  # the exponent, as float32 writes it, that is written as 0: of 2**-24
CLOSE = 2.0**-21  # relative: an offset is rounded, and so is the scale that it is divided by


def as_words(scales: Array, offsets: Array, bits: int) -> Array | None:
    """Float32 scales and offsets [...] of codes with so many bits as words [...]; None if one of
    them does not go into one."""
    with np.errstate(all="ignore"):  # what is not finite does not go into them either
        steps = np.rint(-offsets / scales)
        fits = (steps >= 0) & (steps < 2**bits)
        fits &= np.abs(steps * scales + offsets) <= CLOSE * np.abs(offsets)
    lost = bits - SHIFT  # of the 23 bits of a fraction
    rounded = scales.view(np.uint32) + np.uint32(2 ** (lost - 1))
    number = (rounded & np.uint32(2**31 - 2**lost)) - np.uint32(LOWEST << 23)
    if not (fits & (number < 2**28)).all():  # one below LOWEST has wrapped around
        return None
    sign = rounded & np.uint32(2**31)
    return sign | number << np.uint32(SHIFT) | steps.astype(np.uint32)


def of_lanes(groups: Array, lanes: Array, steps: int) -> tuple[Array, Array]:
    """Scales and offsets [..., G] of one output each of records [..., G, 16 or 32]."""
    lanes = lanes[..., None, None]
    words = np.take_along_axis(groups, lanes, -1)[..., 0]
    if not steps:
        offsets = np.take_along_axis(groups, lanes + LANES, -1)[..., 0]
        return words.view(np.float32), offsets.view(np.float32)
    low = np.uint32(2**steps - 1)
    number = (words & np.uint32(2**31 - 2**steps)) >> np.uint32(SHIFT)
    bits = number + np.uint32(LOWEST << 23) | words & np.uint32(2**31)
    scales = bits.view(np.float32)
    return scales, -scales * (words & low).astype(np.float32)


@intrinsic
def _scale(context: Any, word: Any, steps: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def constant(value: int) -> Any:
            return ir.Constant(INTS, [value] * LANES)

        high = builder.not_(_low(builder, context, sig, args))
        number = builder.and_(args[0], builder.and_(high, constant(2**31 - 1)))
        bits = builder.add(builder.lshr(number, constant(SHIFT)), constant(LOWEST << 23))
        sign = builder.and_(args[0], constant(-(2**31)))
        return builder.bitcast(builder.or_(bits, sign), FLOATS)

    return floats(word, steps), generate


@intrinsic
def _steps(context: Any, word: Any, steps: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(builder.and_(args[0], _low(builder, context, sig, args)), FLOATS)

    return floats(word, steps), generate


def _low(builder: Any, context: Any, sig: Any, args: Any) -> Any:
    """The lowest `steps` bits of each word, set."""
    steps = context.cast(builder, args[1], sig.args[1], types.int32)
    return filled(builder, builder.sub(builder.shl(I32(1), steps), I32(1)), INTS)


@intrinsic
def lane(context: Any, x: Any, n: Any) -> Any:
    """Number n of 16."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], args[1])

    return types.float32(x, n), generate


@compiled
def scale_and_offset(groups: Any, n: int, steps: int) -> tuple[Any, Any]:
    """Those of 16 outputs, as floats: record n of `groups`, uint32."""
    if steps == 0:
        numbers, i = groups.view(np.float32), 2 * LANES * n
        return load(numbers, i), load(numbers, i + LANES)
    word = load(groups, LANES * n)
    scale = _scale(word, steps)
    return scale, splat(0.0) - scale * _steps(word, steps)


@compiled
def fetch_group(groups: Any, n: int, steps: int) -> None:
    """Begin to bring what comes some records after n."""
    if steps == 0:
        prefetch_once(groups, 2 * LANES * n + AHEAD // 8)
        prefetch_once(groups, 2 * LANES * n + LANES + AHEAD // 8)
    else:
        prefetch_once(groups, LANES * n + AHEAD // 16)
