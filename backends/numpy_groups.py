"""Scale and offset of each group of quantized weights, as the NumPy backend's kernels read them.

Those of a group of 16 outputs lie side by side: as floats, 16 scales and 16 offsets; or, since
`mx.quantize` and those who do as it does make an offset a whole number of scales, as 16 words
that hold a scale and that number. With codes of 4 bits this saves a tenth of what is read.

A word is, from above: the scale's sign, 5 bits of its exponent, 22 of its fraction, and the number
of scales that are subtracted, 0 to 15. A bit of the fraction is lost, which is less than a product
rounds away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.simd import (
    AHEAD,
    FLOATS,
    INTS,
    LANES,
    compiled,
    floats,
    load,
    prefetch_once,
    splat,
)

Array = np.ndarray

LOWEST = 103  # the exponent, as float32 writes it, that is written as 0: of 2**-24
CLOSE = 2.0**-21  # relative: an offset is rounded, and so is the scale that it is divided by


def as_words(scales: Array, offsets: Array) -> Array | None:
    """Float32 scales and offsets [...] as words [...]; None if one of them does not go into one."""
    with np.errstate(all="ignore"):  # what is not finite does not go into them either
        steps = np.rint(-offsets / scales)
        fits = (steps >= 0) & (steps <= 15)
        fits &= np.abs(steps * scales + offsets) <= CLOSE * np.abs(offsets)
    rounded = scales.view(np.uint32) + np.uint32(1)
    exponent = (rounded >> np.uint32(23) & np.uint32(255)) - np.uint32(LOWEST)
    if not (fits & (exponent < 32)).all():  # one below LOWEST has wrapped around
        return None
    sign, fraction = rounded & np.uint32(1 << 31), rounded & np.uint32(2**23 - 2)
    return sign | exponent << np.uint32(26) | fraction << np.uint32(3) | steps.astype(np.uint32)


def of_lanes(groups: Array, lanes: Array) -> tuple[Array, Array]:
    """Scales and offsets [..., G] of one output each of records [..., G, 16 or 32]."""
    lanes = lanes[..., None, None]
    words = np.take_along_axis(groups, lanes, -1)[..., 0]
    if groups.shape[-1] > LANES:
        offsets = np.take_along_axis(groups, lanes + LANES, -1)[..., 0]
        return words.view(np.float32), offsets.view(np.float32)
    bits = (words >> np.uint32(3) & np.uint32(2**28 - 2)) + np.uint32(LOWEST << 23)
    scales = (bits | words & np.uint32(1 << 31)).view(np.float32)
    return scales, -scales * (words & np.uint32(15)).astype(np.float32)


@intrinsic
def _scale(context: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def constant(value: int) -> Any:
            return ir.Constant(INTS, [value] * LANES)

        bits = builder.and_(builder.lshr(args[0], constant(3)), constant(2**28 - 2))
        bits = builder.add(bits, constant(LOWEST << 23))
        sign = builder.and_(args[0], constant(-(2**31)))
        return builder.bitcast(builder.or_(bits, sign), FLOATS)

    return floats(word), generate


@intrinsic
def _steps(context: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        steps = builder.and_(args[0], ir.Constant(INTS, [15] * LANES))
        return builder.sitofp(steps, FLOATS)

    return floats(word), generate


@intrinsic
def lane(context: Any, x: Any, n: Any) -> Any:
    """Number n of 16."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], args[1])

    return types.float32(x, n), generate


@compiled
def scale_and_offset(groups: Any, n: int, wide: bool) -> tuple[Any, Any]:
    """Those of 16 outputs, as floats: record n of `groups`, uint32."""
    if wide:
        numbers, i = groups.view(np.float32), 2 * LANES * n
        return load(numbers, i), load(numbers, i + LANES)
    word = load(groups, LANES * n)
    scale = _scale(word)
    return scale, splat(0.0) - scale * _steps(word)


@compiled
def fetch_group(groups: Any, n: int, wide: bool) -> None:
    """Begin to bring what comes some records after n."""
    if wide:
        prefetch_once(groups, 2 * LANES * n + AHEAD // 8)
        prefetch_once(groups, 2 * LANES * n + LANES + AHEAD // 8)
    else:
        prefetch_once(groups, LANES * n + AHEAD // 16)
