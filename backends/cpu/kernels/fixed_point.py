"""Rows of floats as whole numbers of 24 bits, cut into three bytes, for units that multiply bytes.

A row has one factor, and so hardly anything is lost that float32 would have kept: half a unit of
2**-23 of its largest number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.kernels.simd import (
    I8,
    INTS,
    LANES,
    compiled,
    int64,
    largest,
    load,
    maximum,
    pointer,
    splat,
    total,
)

PARTS = 3  # bytes to a number
LARGEST = np.float32(127 * 2**16)  # three digits of -128 to 127 hold it, and what rounds to above


@intrinsic
def digits(context: Any, array: Any, i: Any, step: Any, x: Any, bits: Any) -> Any:
    """Whole numbers x as three bytes each, x = a + 256 b + 65536 c with -128 <= a, b, c < 128, to
    array[i : i + 16] and on by `step`; for codes of 4 bits even ones of 8 before odd ones."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def constant(value: int) -> Any:
            return ir.Constant(INTS, [value] * LANES)

        order = [8 * (n // 8) + n % 4 * 2 + n % 8 // 4 for n in range(LANES)]
        step = int64(context, builder, args[2], sig.args[2])
        even_first = builder.icmp_signed("==", args[4], ir.Constant(args[4].type, 4))
        place = pointer(context, builder, sig.args, args)
        # With 128 more in each digit none is negative, and they are the bytes; a byte whose upper
        # bit is turned over is 128 less again.
        middle = constant(0x808080)
        whole = builder.xor(builder.add(builder.fptosi(args[3], INTS), middle), middle)
        mixed = builder.shuffle_vector(whole, whole, ir.Constant(INTS, order))
        whole = builder.select(even_first, mixed, whole)
        for part in range(PARTS):
            digit = builder.lshr(whole, constant(8 * part))
            values = builder.trunc(digit, ir.VectorType(I8, LANES))
            builder.store(values, builder.bitcast(place, values.type.as_pointer()), align=1)
            place = builder.gep(place, [step])
        return context.get_dummy_value()

    return types.void(array, i, step, x, bits), generate


@compiled
def measure(row: Any, n_in: int, group: int, sums: Any, step: int) -> tuple[Any, Any]:
    """The factor of a row [I] and the inverse of it; sums[g * step] gets the sum of group g."""
    most, everything = splat(0.0), splat(0.0)
    for g in range(n_in // group):
        sum_of_group = splat(0.0)
        for k in range(g * group, (g + 1) * group, LANES):
            value = load(row, k)
            most = maximum(most, maximum(value, splat(0.0) - value))
            sum_of_group += value
        sums[g * step] = total(sum_of_group)
        everything += sum_of_group
    size = largest(most)
    # A NaN, which a maximum may not see, makes the factor one.
    factor = size / LARGEST + np.float32(0) * total(everything)
    return factor, LARGEST / size if size > 0 else np.float32(0)
