"""GEMV kernels on vectors (AVX2, AVX-512, NEON): one row times a matrix.

A product with one row is bound by memory bandwidth: each weight is read once, in memory order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gptx.backends.cpu.interface.sizes import LANES
from gptx.backends.cpu.kernels.arguments import QuantizedMatrix
from gptx.backends.cpu.kernels.compilation import compiled
from gptx.backends.cpu.kernels.group_scales import prefetch_group, scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    PREFETCH_BYTES,
    bit_field_as_floats,
    broadcast,
    get_vector,
    load,
    prefetch_l2,
    put_vector,
    splat,
    stack_vectors,
    store,
)

# Factors that cancel the powers of two in `bit_field_as_floats`, by bits and field.
FIELD_FACTORS = {
    bits: np.array([2.0 ** (-bits * n) for n in range(32 // bits - 1)] + [1.0], np.float32)
    for bits in (4, 8)
}
_FACTORS_4, _FACTORS_8 = FIELD_FACTORS[4], FIELD_FACTORS[8]


@compiled
def prepare_row(x: Any, n_in: int, group_size: int, bits: int) -> None:
    """Prepare a row x [I] for `multiply_int8` or `multiply_int4`.

    Appends the sum of each group to x, and multiplies x by `FIELD_FACTORS`.
    """
    for g in range(n_in // group_size):
        s = np.float32(0)
        for k in range(g * group_size, (g + 1) * group_size):
            s += x[k]
        x[n_in + g] = s
    if bits == 8:
        for k in range(n_in):
            x[k] *= _FACTORS_8[k % 4]
    else:
        for k in range(n_in):
            x[k] *= _FACTORS_4[k % 8]


def _make_quantized_gemv(bits: int) -> Callable[..., None]:
    per_word = 32 // bits

    @compiled
    def multiply(matrix: QuantizedMatrix, first: int, last: int, x: Any, y: Any) -> None:
        """Compute strips [first, last) of y = W·x; x is the result of `prepare_row`.

        One strip at a time: two or four reached a lower memory bandwidth.
        """
        words, groups, offset_bits = matrix.words, matrix.groups, matrix.offset_bits
        n_in, group_size = matrix.n_in, matrix.group_size
        n_groups = n_in // group_size
        for strip in range(first, last):
            result = splat(0.0)
            for g in range(n_groups):
                sums = stack_vectors(4)  # independent, so that additions overlap
                for n in range(4):
                    put_vector(sums, n, splat(0.0))
                for k in range(g * group_size, (g + 1) * group_size, per_word):
                    i = (strip * n_in + k) // per_word * LANES
                    prefetch_l2(words, i + PREFETCH_BYTES // 4)
                    packed = load(words, i)
                    for n in range(per_word):
                        weights = bit_field_as_floats(packed, n, bits)
                        partial_sum = get_vector(sums, n % 4) + weights * broadcast(x, k + n)
                        put_vector(sums, n % 4, partial_sum)
                entry = strip * n_groups + g
                prefetch_group(groups, entry, offset_bits)
                group_sum = get_vector(sums, 0)
                for n in range(1, 4):
                    group_sum += get_vector(sums, n)
                scale, offset = scale_and_offset(groups, entry, offset_bits)
                result += scale * group_sum + offset * broadcast(x, n_in + g)
            store(y, strip * LANES, result)

    return multiply


multiply_int8, multiply_int4 = _make_quantized_gemv(8), _make_quantized_gemv(4)


@compiled
def multiply_float32(w: Any, x: Any, first: int, last: int, n_out: int, y: Any) -> None:
    """Compute y = x[first:last]·w[first:last] for w [I, O], four rows of w at a time."""
    vector_end = n_out // 16 * 16
    for j in range(n_out):
        y[j] = 0.0
    for k in range(first, last - 3, 4):
        i = k * n_out
        for j in range(0, vector_end, 16):
            sums = load(y, j)
            for r in range(4):
                prefetch_l2(w, i + (r + 4) * n_out + j)  # the next four rows
                sums += load(w, i + r * n_out + j) * broadcast(x, k + r)
            store(y, j, sums)
    for k in range(first, last):
        if k >= last - (last - first) % 4:
            for j in range(vector_end):
                y[j] += x[k] * w[k * n_out + j]
        for j in range(vector_end, n_out):
            y[j] += x[k] * w[k * n_out + j]
