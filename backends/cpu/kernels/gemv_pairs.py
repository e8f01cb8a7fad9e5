"""GEMV kernels for quantized weights on x86 without AVX-512: 16-bit products, added in pairs.

`pmaddwd` multiplies 16-bit integers by others and adds the products by twos, as 32-bit integers.
Quantized values become 16-bit integers by a shift and a mask; the row is split into two of them to
a number, as exact as `fixed_point.py` is. That takes fewer instructions and registers than
`gemv_words.py`, which converts the quantized values to floats. On AVX-512 both take the same
time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.interface.cpu_features import HAS_AVX2
from gptx.backends.cpu.interface.sizes import LANES
from gptx.backends.cpu.kernels.arguments import QuantizedMatrix
from gptx.backends.cpu.kernels.compilation import I32, call, compiled, element_pointer, to_int64
from gptx.backends.cpu.kernels.fixed_point import measure_row
from gptx.backends.cpu.kernels.group_scales import prefetch_group, scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    INTS,
    PREFETCH_BYTES,
    bits_as_ints,
    broadcast,
    fill_lanes,
    get_vector,
    ints,
    ints_to_floats,
    join,
    load,
    prefetch_l2,
    put_vector,
    round_to_even,
    splat,
    stack_vectors,
    store,
)

N_DIGITS = 2  # 16-bit integers of a number of the row
I16 = ir.IntType(16)
HALVES = ir.VectorType(I16, 2 * LANES)
# LLVM's name of `pmaddwd` on SSE2 or AVX2, and the 32-bit lanes of its result.
PRODUCT, PRODUCT_LANES = "llvm.x86.sse2.pmadd.wd", 4
if HAS_AVX2:
    PRODUCT, PRODUCT_LANES = "llvm.x86.avx2.pmadd.wd", 8


@intrinsic
def _store_pairs(context: Any, array: Any, i: Any, x: Any, bits: Any) -> Any:
    """Store 16 integers x, given as floats, as two digits each at array[i : i + 16], 32-bit.

    The digits a and b of x = a + 65536 b, -32768 <= a < 32768, are 16-bit integers. For each word
    of weights, the a of its inputs precede the b. The inputs are in pairs: the weight of the first
    is in the lower half of the word, that of the second in the same place of the upper half.
    """

    def order(per_word: int) -> list[int]:
        half = per_word // 2
        return [
            digit + first + n + upper
            for first in range(0, LANES, per_word)
            for digit in (0, LANES)
            for n in range(half)
            for upper in (0, half)
        ]

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def constant(value: int) -> Any:
            return ir.Constant(INTS, [value] * LANES)

        x = builder.fptosi(args[2], INTS)
        upper = builder.ashr(builder.add(x, constant(2**15)), constant(16))
        digits = [builder.trunc(part, ir.VectorType(I16, LANES)) for part in (x, upper)]
        has_4_bits = builder.icmp_signed("==", args[3], ir.Constant(args[3].type, 4))
        orders = (ir.Constant(ir.VectorType(I32, 2 * LANES), order(n)) for n in (8, 4))
        pairs = builder.select(has_4_bits, *(builder.shuffle_vector(*digits, n) for n in orders))
        pointer = element_pointer(context, builder, sig.args, args)
        builder.store(pairs, builder.bitcast(pointer, HALVES.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, i, x, bits), generate


@intrinsic
def _half_fields(context: Any, words: Any, n: Any, bits: Any) -> Any:
    """Return field n, of 8 or 4 bits, of both halves of each word as 16-bit integers."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at, width = (
            builder.trunc(to_int64(context, builder, value, kind), I16)
            for value, kind in zip(args[1:], sig.args[1:], strict=True)
        )
        shift = fill_lanes(builder, builder.mul(at, width), HALVES)
        mask = builder.sub(builder.shl(I16(1), width), I16(1))
        moved = builder.lshr(builder.bitcast(args[0], HALVES), shift)
        return builder.bitcast(builder.and_(moved, fill_lanes(builder, mask, HALVES)), INTS)

    return ints(words, n, bits), generate


@intrinsic
def _add_pair_products(context: Any, vectors: Any, i: Any, weights: Any, x: Any) -> Any:
    """Add to the ints in vector i of `stack_vectors`, in each lane, two weights times two x."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def part(vector: Any, first: int, kind: Any) -> Any:
            lanes = ir.Constant(kind, list(range(first, first + kind.count)))
            taken = builder.shuffle_vector(vector, vector, lanes)
            return builder.bitcast(taken, ir.VectorType(I16, 2 * kind.count))

        kind = ir.VectorType(I32, PRODUCT_LANES)
        products = [
            call(builder, PRODUCT, kind, *(part(vector, first, kind) for vector in args[2:]))
            for first in range(0, LANES, PRODUCT_LANES)
        ]
        while len(products) > 1:
            products = [
                join(builder, *two) for two in zip(products[::2], products[1::2], strict=True)
            ]
        pointer = builder.gep(args[0], [to_int64(context, builder, args[1], sig.args[1])])
        pointer = builder.bitcast(pointer, INTS.as_pointer())
        builder.store(builder.add(builder.load(pointer), products[0]), pointer)
        return context.get_dummy_value()

    return types.void(vectors, i, weights, x), generate


@compiled
def prepare_row(x: Any, n_in: int, group_size: int, bits: int) -> None:
    """Replace a row x [I] by its digits, and append the sum of each group and the row's factor."""
    factor, inverse = measure_row(x, n_in, group_size, x[n_in:], 1)
    x[n_in + n_in // group_size] = factor
    for k in range(0, n_in, LANES):
        _store_pairs(x, k, round_to_even(load(x, k) * splat(inverse)), bits)


def _make_quantized_gemv(bits: int) -> Callable[..., None]:
    per_word, per_half = 32 // bits, 16 // bits

    @compiled
    def multiply(matrix: QuantizedMatrix, first: int, last: int, x: Any, y: Any) -> None:
        """Compute strips [first, last) of y = W·x; x is the result of `prepare_row`."""
        words, groups, offset_bits = matrix.words, matrix.groups, matrix.offset_bits
        n_in, group_size, pairs = matrix.n_in, matrix.group_size, x.view(np.uint32)
        n_groups = n_in // group_size
        factor = broadcast(x, n_in + n_groups)
        for strip in range(first, last):
            result = splat(0.0)
            for g in range(n_groups):
                sums = stack_vectors(N_DIGITS)
                for d in range(N_DIGITS):
                    put_vector(sums, d, splat(0.0))  # the bits of the integer 0
                for k in range(g * group_size, (g + 1) * group_size, per_word):
                    i = (strip * n_in + k) // per_word * LANES
                    prefetch_l2(words, i + PREFETCH_BYTES // 4)
                    packed = load(words, i)
                    for n in range(per_half):
                        weights = _half_fields(packed, n, bits)
                        for d in range(N_DIGITS):
                            numbers = broadcast(pairs, k + d * per_half + n)
                            _add_pair_products(sums, d, weights, numbers)
                entry = strip * n_groups + g
                prefetch_group(groups, entry, offset_bits)
                scale, offset = scale_and_offset(groups, entry, offset_bits)
                low = ints_to_floats(bits_as_ints(get_vector(sums, 0)))
                high = ints_to_floats(bits_as_ints(get_vector(sums, 1)))
                group_sum = (low + high * splat(2.0**16)) * factor
                result += scale * group_sum + offset * broadcast(x, n_in + g)
            store(y, strip * LANES, result)

    return multiply


multiply_int8, multiply_int4 = _make_quantized_gemv(8), _make_quantized_gemv(4)
