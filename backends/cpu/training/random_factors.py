"""Random factors of dropout, by Philox 4x64-10 (see `gptx.backends.philox`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.interface.sizes import LANES
from gptx.backends.cpu.kernels.compilation import I32, compiled
from gptx.backends.cpu.kernels.simd import FLOATS, INTS, fill_lanes, floats

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
INCREMENT_0, INCREMENT_1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)


@intrinsic
def _high_word(context: Any, a: Any, b: Any) -> Any:
    """Return the high word of the product of two words."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(x, wide) for x in args))
        return builder.trunc(builder.lshr(product, wide(64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def _select_factors(
    context: Any, w0: Any, w1: Any, w2: Any, w3: Any, threshold: Any, factor: Any
) -> Any:
    """Return `factor` where 16 bits of the words are at least `threshold`, else 0, as floats."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = ir.Constant(ir.VectorType(ir.IntType(64), 4), ir.Undefined)
        for n, word in enumerate(args[:4]):
            words = builder.insert_element(words, word, I32(n))
        bits = builder.zext(builder.bitcast(words, ir.VectorType(ir.IntType(16), LANES)), INTS)
        least = fill_lanes(builder, builder.trunc(args[4], I32), INTS)
        kept = builder.icmp_unsigned(">=", bits, least)
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        return builder.select(kept, fill_lanes(builder, args[5], FLOATS), zero)

    word = types.uint64
    return floats(word, word, word, word, types.int64, types.float32), generate


@compiled
def random_factors(
    seed: Any, step: Any, site: Any, row: int, block: int, threshold: int, factor: Any
) -> Any:
    """Return the factors of dropout of elements 16 * block to 16 * block + 15 of a row.

    An element is kept, with `factor`, if its 16 bits are at least `threshold`; see
    `gptx.backends.gradients.dropout`.
    """
    w0, w1, w2, w3 = np.uint64(block + 1), np.uint64(step), np.uint64(site), np.uint64(row)
    k0, k1 = np.uint64(seed), np.uint64(0)
    for _ in range(ROUNDS):
        high0, low0 = _high_word(MULTIPLIER_0, w0), MULTIPLIER_0 * w0
        high1, low1 = _high_word(MULTIPLIER_1, w2), MULTIPLIER_1 * w2
        w0, w1, w2, w3 = high1 ^ w1 ^ k0, low1, high0 ^ w3 ^ k1, low0
        k0, k1 = k0 + INCREMENT_0, k1 + INCREMENT_1
    return _select_factors(w0, w1, w2, w3, threshold, factor)
