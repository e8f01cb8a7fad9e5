"""GEMM kernels on vectors (AVX2, AVX-512, NEON): several rows times a matrix, in registers.

A product with several rows is bound by arithmetic. `expand_...` expands weights to panels of floats
[inputs, 64 outputs], which fit the first-level cache. The kernels keep 4 rows by 64 outputs of the
result in registers. Arrays are flat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gptx.backends.cpu.kernels.arguments import PANEL_OUTPUTS, Matrix, QuantizedMatrix
from gptx.backends.cpu.kernels.compilation import compiled
from gptx.backends.cpu.kernels.gemv import FIELD_FACTORS
from gptx.backends.cpu.kernels.group_scales import scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    LANES,
    PREFETCH_BYTES,
    bit_field_as_floats,
    broadcast,
    get_vector,
    load,
    load_scalar,
    prefetch_l1,
    prefetch_l2,
    put_vector,
    splat,
    stack_vectors,
    store,
    sum_lanes,
    sum_lanes_of_16,
)

PREFETCH_INPUTS = 16  # inputs by which kernels for a single row prefetch


def _make_outer_product(rows: int, vectors: int) -> Callable[..., None]:
    size = rows * vectors

    @compiled
    def outer_product(x: Any, xi: int, w: Matrix, depth: int, y: Matrix, overwrite: bool) -> None:
        """Compute y += x·w (y = x·w to overwrite), as a sum of outer products over the inputs.

        x is packed [depth, rows] from xi on, w is [depth, 16·vectors], y is [rows, 16·vectors].
        """
        weights, result = w.array, y.array
        sums = stack_vectors(size)
        for r in range(rows):
            for c in range(vectors):
                if overwrite:
                    put_vector(sums, r * vectors + c, splat(0.0))
                else:
                    yi = y.start + r * y.row_stride + 16 * c
                    put_vector(sums, r * vectors + c, load(result, yi))
        for k in range(depth):
            for c in range(vectors):
                if rows == 1:  # bound by memory latency
                    ahead = min(k + PREFETCH_INPUTS, depth - 1)
                    prefetch_l1(weights, w.start + ahead * w.row_stride + 16 * c)
                column = load(weights, w.start + k * w.row_stride + 16 * c)
                for r in range(rows):
                    n = r * vectors + c
                    product = column * broadcast(x, xi + k * rows + r)
                    put_vector(sums, n, get_vector(sums, n) + product)
        for r in range(rows):
            for c in range(vectors):
                yi = y.start + r * y.row_stride + 16 * c
                store(result, yi, get_vector(sums, r * vectors + c))

    return outer_product


def _make_dot_product(rows: int, columns: int) -> Callable[..., None]:
    size = rows * columns

    @compiled
    def dot_product(
        x: Any, xi: int, w: Any, wi: int, depth: int, y: Matrix, prefetch: bool
    ) -> None:
        """Compute y = x·wᵀ, 16 inputs at a time; `prefetch` fetches the next columns.

        x is [rows, depth] from xi on, w is [columns, depth] from wi on, y is [rows, columns].
        """
        sums = stack_vectors(size)
        for n in range(size):
            put_vector(sums, n, splat(0.0))
        vector_end = depth // 16 * 16
        for k in range(0, vector_end, 16):
            for c in range(columns):
                if prefetch:
                    prefetch_l2(w, wi + (columns + c) * depth + k)
                column = load(w, wi + c * depth + k)
                for r in range(rows):
                    n = c * rows + r
                    product = column * load(x, xi + r * depth + k)
                    put_vector(sums, n, get_vector(sums, n) + product)
        dense = y.row_stride == 1 and y.column_stride == rows
        if size == 16 and vector_end == depth and dense:
            store(y.array, y.start, sum_lanes_of_16(sums))
        else:
            for c in range(columns):
                for r in range(rows):
                    s = sum_lanes(get_vector(sums, c * rows + r))
                    for k in range(vector_end, depth):
                        s += x[xi + r * depth + k] * load_scalar(w, wi + c * depth + k)
                    y.array[y.start + r * y.row_stride + c * y.column_stride] = s

    return dot_product


# Named by rows and vectors of 16 columns.
outer_product_4x4, outer_product_4x1 = _make_outer_product(4, 4), _make_outer_product(4, 1)
outer_product_1x4, outer_product_1x1 = _make_outer_product(1, 4), _make_outer_product(1, 1)

# Named by rows and columns.
dot_product_4x4, dot_product_4x1 = _make_dot_product(4, 4), _make_dot_product(4, 1)
dot_product_1x4, dot_product_1x1 = _make_dot_product(1, 4), _make_dot_product(1, 1)


@compiled
def expand_float32(w: Any, n_out: int, number: int, first: int, depth: int, panel: Any) -> None:
    """Copy inputs [first, first + depth) of panel `number` of w [I, O] to panel [depth, 64].

    Outputs past the last one are zero.
    """
    left = n_out - number * PANEL_OUTPUTS
    for k in range(depth):
        i, p = (first + k) * n_out + number * PANEL_OUTPUTS, k * PANEL_OUTPUTS
        if left >= PANEL_OUTPUTS:
            for c in range(4):
                store(panel, p + 16 * c, load(w, i + 16 * c))
        else:
            for j in range(PANEL_OUTPUTS):
                panel[p + j] = w[i + j] if j < left else np.float32(0)


def _make_expand_quantized(bits: int) -> Callable[..., None]:
    per_word = 32 // bits
    factors = FIELD_FACTORS[bits]

    @compiled
    def expand(matrix: QuantizedMatrix, number: int, first: int, depth: int, panel: Any) -> None:
        """Dequantize inputs [first, first + depth) of panel `number` to panel [depth, 64]."""
        words, groups, offset_bits = matrix.words, matrix.groups, matrix.offset_bits
        n_in, group_size = matrix.n_in, matrix.group_size
        for c in range(4):
            strip = 4 * number + c
            for k in range(first, first + depth, per_word):
                i = (strip * n_in + k) // per_word * LANES
                prefetch_l1(words, i + PREFETCH_BYTES // 4)
                packed = load(words, i)
                entry = strip * (n_in // group_size) + k // group_size
                scale, offset = scale_and_offset(groups, entry, offset_bits)
                for n in range(per_word):
                    weights = bit_field_as_floats(packed, n, bits) * broadcast(factors, n)
                    at = (k + n - first) * PANEL_OUTPUTS + LANES * c
                    store(panel, at, weights * scale + offset)

    return expand


expand_int8, expand_int4 = _make_expand_quantized(8), _make_expand_quantized(4)
