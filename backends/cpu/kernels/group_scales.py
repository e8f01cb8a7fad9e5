"""Scales and offsets of 16 outputs in registers, from words (`group_words.py`) or floats."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.interface.group_words import EXPONENT_SHIFT, MIN_EXPONENT
from gptx.backends.cpu.interface.sizes import LANES
from gptx.backends.cpu.kernels.compilation import I32, compiled
from gptx.backends.cpu.kernels.simd import (
    FLOATS,
    INTS,
    PREFETCH_BYTES,
    fill_lanes,
    floats,
    load,
    load_bits_as_floats,
    prefetch_l2,
    splat,
)


def _low_mask(builder: Any, context: Any, sig: Any, args: Any) -> Any:
    """Emit a mask of the lowest args[1] bits of each word."""
    bits = context.cast(builder, args[1], sig.args[1], types.int32)
    return fill_lanes(builder, builder.sub(builder.shl(I32(1), bits), I32(1)), INTS)


@intrinsic
def _scales(context: Any, words: Any, offset_bits: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def constant(value: int) -> Any:
            return ir.Constant(INTS, [value] * LANES)

        high = builder.not_(_low_mask(builder, context, sig, args))
        magnitude = builder.and_(args[0], builder.and_(high, constant(2**31 - 1)))
        magnitude = builder.lshr(magnitude, constant(EXPONENT_SHIFT))
        bits = builder.add(magnitude, constant(MIN_EXPONENT << 23))
        sign = builder.and_(args[0], constant(-(2**31)))
        return builder.bitcast(builder.or_(bits, sign), FLOATS)

    return floats(words, offset_bits), generate


@intrinsic
def _multiples(context: Any, words: Any, offset_bits: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(builder.and_(args[0], _low_mask(builder, context, sig, args)), FLOATS)

    return floats(words, offset_bits), generate


@compiled
def scale_and_offset(groups: Any, n: int, offset_bits: int) -> tuple[Any, Any]:
    """Return scales and offsets of 16 outputs, as floats, from entry n of `groups` (uint32)."""
    if offset_bits == 0:
        i = 2 * LANES * n
        return load_bits_as_floats(groups, i), load_bits_as_floats(groups, i + LANES)
    words = load(groups, LANES * n)
    scales = _scales(words, offset_bits)
    return scales, splat(0.0) - scales * _multiples(words, offset_bits)


@compiled
def prefetch_group(groups: Any, n: int, offset_bits: int) -> None:
    """Prefetch the entry that is needed some entries after n."""
    if offset_bits == 0:
        prefetch_l2(groups, 2 * LANES * n + PREFETCH_BYTES // 8)
        prefetch_l2(groups, 2 * LANES * n + LANES + PREFETCH_BYTES // 8)
    else:
        prefetch_l2(groups, LANES * n + PREFETCH_BYTES // 16)
