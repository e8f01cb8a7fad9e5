"""Rows of floats as 24-bit integers, each split into three bytes, for units that multiply bytes.

A row has one factor. The rounding error is at most 2**-24 of the row's largest magnitude, about
that of float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.interface.sizes import LANES, N_DIGITS
from gptx.backends.cpu.kernels.compilation import I8, compiled, element_pointer, to_int64
from gptx.backends.cpu.kernels.simd import (
    INTS,
    load,
    max_lanes,
    maximum,
    splat,
    sum_lanes,
)

MAX_INTEGER = np.float32(127 * 2**16)  # fits three digits of -128 to 127, also if rounded up


@intrinsic
def store_digits(context: Any, array: Any, i: Any, stride: Any, x: Any, bits: Any) -> Any:
    """Store 16 integers x, as floats, as three digits of one byte each.

    The digits a, b, c of x = a + 256 b + 65536 c, with -128 <= a, b, c < 128, go to 16 bytes each
    from array[i], array[i + stride] and array[i + 2 * stride] on. For weights of 4 bits the even
    ones of eight integers precede the odd ones, as in `nibbles_as_bytes`.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def constant(value: int) -> Any:
            return ir.Constant(INTS, [value] * LANES)

        order = [8 * (n // 8) + n % 4 * 2 + n % 8 // 4 for n in range(LANES)]
        stride = to_int64(context, builder, args[2], sig.args[2])
        even_first = builder.icmp_signed("==", args[4], ir.Constant(args[4].type, 4))
        pointer = element_pointer(context, builder, sig.args, args)
        # Add 128 to each digit: none is negative, and the digits are the bytes of the sum. A flip
        # of a byte's highest bit then subtracts 128 again.
        middle = constant(0x808080)
        digits = builder.xor(builder.add(builder.fptosi(args[3], INTS), middle), middle)
        permuted = builder.shuffle_vector(digits, digits, ir.Constant(INTS, order))
        digits = builder.select(even_first, permuted, digits)
        for n in range(N_DIGITS):
            digit = builder.lshr(digits, constant(8 * n))
            values = builder.trunc(digit, ir.VectorType(I8, LANES))
            builder.store(values, builder.bitcast(pointer, values.type.as_pointer()), align=1)
            pointer = builder.gep(pointer, [stride])
        return context.get_dummy_value()

    return types.void(array, i, stride, x, bits), generate


@compiled
def measure_row(row: Any, n_in: int, group_size: int, sums: Any, stride: int) -> tuple[Any, Any]:
    """Return a row's factor and its inverse; set sums[g * stride] to the sum of group g."""
    highest, group_sums = splat(0.0), splat(0.0)
    for g in range(n_in // group_size):
        group_sum = splat(0.0)
        for k in range(g * group_size, (g + 1) * group_size, LANES):
            value = load(row, k)
            highest = maximum(highest, maximum(value, splat(0.0) - value))
            group_sum += value
        sums[g * stride] = sum_lanes(group_sum)
        group_sums += group_sum
    magnitude = max_lanes(highest)
    # `maximum` may drop a NaN; the sums keep it, and make the factor NaN. Large sums may overflow.
    factor = magnitude / MAX_INTEGER + sum_lanes(group_sums * splat(0.0))
    return factor, MAX_INTEGER / magnitude if magnitude > 0 else np.float32(0)
