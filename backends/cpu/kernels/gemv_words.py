"""GEMV kernels for quantized weights, which become floats in registers, on any processor.

A word has 8 or 4 values, the bit fields, of an output. A field is the value times a power of two
(`emit_bit_field`), by which the numbers of the row are divided. Scales and offsets are applied to
the sums of a group. `gemm_words.py` is the same for few rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.interface.sizes import LANES
from gptx.backends.cpu.kernels.arguments import Matrix, QuantizedMatrix
from gptx.backends.cpu.kernels.compilation import I32, compiled, element_pointer
from gptx.backends.cpu.kernels.group_scales import prefetch_group, scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    FLOATS,
    PREFETCH_BYTES,
    broadcast,
    emit_bit_field,
    fill_lanes,
    get_vector,
    load,
    prefetch_l2,
    put_vector,
    splat,
    stack_vectors,
    store,
    sum_lanes,
)

# Factors that cancel the powers of two of 16 fields, by bits.
FIELD_FACTORS = {
    bits: np.tile([2.0 ** (-bits * n) for n in range(32 // bits - 1)] + [1.0], LANES * bits // 32)
    .astype(np.float32)
    for bits in (4, 8)
}  # fmt: skip
_FACTORS_4, _FACTORS_8 = FIELD_FACTORS[4], FIELD_FACTORS[8]


@compiled
def prepare_row(x: Any, n_in: int, group_size: int, bits: int) -> None:
    """Append to a row x [I] the sum of each group, and multiply x by `FIELD_FACTORS`."""
    factors = load(_FACTORS_8, 0) if bits == 8 else load(_FACTORS_4, 0)
    for g in range(n_in // group_size):
        group_sum = splat(0.0)
        for k in range(g * group_size, (g + 1) * group_size, LANES):
            numbers = load(x, k)
            group_sum += numbers
            store(x, k, numbers * factors)
        x[n_in + g] = sum_lanes(group_sum)


@lru_cache
def _make_add_products(bits: int, rows: int, parts: int) -> Any:
    per_word = 32 // bits

    @intrinsic
    def add_products(context: Any, sums: Any, words: Any, x: Any, i: Any) -> Any:
        """Add to the vectors of floats sums [parts, rows] the fields of 16 words times numbers.

        The numbers are x[i:], [fields, rows]. The result is the sum of the parts.
        """

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            numbers = element_pointer(context, builder, sig.args[2:], args[2:])
            pointers = [builder.gep(args[0], [I32(n)]) for n in range(parts * rows)]
            results = [builder.load(pointer) for pointer in pointers]
            for n in range(per_word):
                weights = emit_bit_field(builder, args[1], I32(n), I32(bits))
                for r in range(rows):
                    number = builder.load(builder.gep(numbers, [I32(n * rows + r)]))
                    number = fill_lanes(builder, number, FLOATS)
                    product = builder.fmul(weights, number, flags=("contract",))
                    s = n % parts * rows + r
                    results[s] = builder.fadd(results[s], product, flags=("contract",))
            for pointer, result in zip(pointers, results, strict=True):
                builder.store(result, pointer)
            return context.get_dummy_value()

        return types.void(sums, words, x, i), generate

    return add_products


@lru_cache
def make_word_product(bits: int, rows: int) -> Callable[..., None]:
    """Make the product of `rows` rows; with few, several sums each overlap their additions."""
    per_word, parts = 32 // bits, max(1, 4 // rows)
    size = parts * rows
    add_products = _make_add_products(bits, rows, parts)

    @compiled
    def multiply(
        matrix: QuantizedMatrix, first: int, last: int, x: Any, start: int, y: Matrix
    ) -> None:
        """Compute strips [first, last) of y = x·W; prepared rows [I + G, rows] are at x[start].

        One strip at a time: two or four reached a lower memory bandwidth.
        """
        words, groups, offset_bits = matrix.words, matrix.groups, matrix.offset_bits
        n_in, group_size, target = matrix.n_in, matrix.group_size, y.array
        n_groups = n_in // group_size
        results = stack_vectors(rows)
        for strip in range(first, last):
            for r in range(rows):
                put_vector(results, r, splat(0.0))
            for g in range(n_groups):
                sums = stack_vectors(size)
                for n in range(size):
                    put_vector(sums, n, splat(0.0))
                for k in range(g * group_size, (g + 1) * group_size, per_word):
                    i = (strip * n_in + k) // per_word * LANES
                    prefetch_l2(words, i + PREFETCH_BYTES // 4)
                    add_products(sums, load(words, i), x, start + k * rows)
                entry = strip * n_groups + g
                prefetch_group(groups, entry, offset_bits)
                scale, offset = scale_and_offset(groups, entry, offset_bits)
                for r in range(rows):
                    group_sum = get_vector(sums, r)
                    for n in range(1, parts):
                        group_sum += get_vector(sums, n * rows + r)
                    sum_of_x = broadcast(x, start + (n_in + g) * rows + r)
                    group_sum = scale * group_sum + offset * sum_of_x
                    put_vector(results, r, get_vector(results, r) + group_sum)
            for r in range(rows):
                store(target, y.start + r * y.row_stride + strip * LANES, get_vector(results, r))

    return multiply


def _make_quantized_gemv(bits: int) -> Callable[..., None]:
    product = make_word_product(bits, 1)

    @compiled
    def multiply(matrix: QuantizedMatrix, first: int, last: int, x: Any, y: Any) -> None:
        """Compute strips [first, last) of y = W·x; x is the result of `prepare_row`."""
        product(matrix, first, last, x, 0, Matrix(y, 0, 0, 1))

    return multiply


multiply_int8, multiply_int4 = _make_quantized_gemv(8), _make_quantized_gemv(4)
