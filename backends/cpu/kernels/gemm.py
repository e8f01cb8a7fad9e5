"""GEMM kernels on vectors (AVX2, AVX-512, NEON): several rows times a matrix, in registers.

A product with several rows is bound by arithmetic. `expand_weights` turns weights of any format
into strips of floats, which fit the caches. `multiply_strip` multiplies one by blocks of rows, a
tile of the result at a time, which stays in registers. Arrays are flat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from gptx.backends.cpu.interface.cpu_features import HAS_AVX512
from gptx.backends.cpu.interface.instructions import (
    FLOAT32,
    FLOAT32_TRANSPOSED,
    FORMAT,
    INT4,
    INT8,
    N_IN,
    N_OUT,
    WEIGHT,
)
from gptx.backends.cpu.interface.sizes import (
    BLOCK_ROWS,
    LANES,
    PANEL_OUTPUTS,
    STRIP_OUTPUTS,
    STRIP_VECTORS,
    TALL_ROWS,
)
from gptx.backends.cpu.interface.variant import HAS_FLOATS, HAS_INT4, HAS_INT8
from gptx.backends.cpu.kernels.arguments import (
    Matrix,
    QuantizedMatrix,
    quantized_matrix,
)
from gptx.backends.cpu.kernels.barrier import split_range
from gptx.backends.cpu.kernels.compilation import compiled, float_array, inlined
from gptx.backends.cpu.kernels.gemv_words import FIELD_FACTORS
from gptx.backends.cpu.kernels.group_scales import scale_and_offset
from gptx.backends.cpu.kernels.simd import (
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
    transpose_vectors,
)

PREFETCH_INPUTS = 16  # inputs by which kernels for a single row prefetch


@lru_cache
def make_outer_product(rows: int, vectors: int) -> Callable[..., None]:
    """Return a kernel for a tile of `rows` rows and `vectors` vectors of outputs."""
    streaming_product = _make_streaming_product(rows, vectors, False)

    @inlined
    def outer_product(x: Matrix, w: Matrix, depth: int, y: Matrix, overwrite: bool) -> None:
        """Compute y += x·w (y = x·w to overwrite), as a sum of outer products over the inputs.

        x is [rows, depth]; w is [depth, 16·vectors] and y is [rows, 16·vectors], with contiguous
        rows.
        """
        streaming_product(x, w, depth, y, overwrite, w.array, w, 0)

    return outer_product


@lru_cache
def _make_streaming_product(rows: int, vectors: int, keeps: bool) -> Callable[..., None]:
    size = rows * vectors

    @compiled
    def streaming_product(
        x: Matrix, w: Matrix, depth: int, y: Matrix, overwrite: bool, kept: Any, ahead: Matrix,
        n_ahead: int,
    ) -> None:  # fmt: skip
        """Compute an outer product, and prefetch rows [0, n_ahead) of `ahead`, 64 numbers each.

        The prefetches are spread over the inputs: more of them at a time than the processor has
        buffers for would make it wait. With `keeps`, w is copied to `kept` [depth, 16·vectors].
        """
        numbers, weights, result, later = x.array, w.array, y.array, ahead.array
        sums = stack_vectors(size)
        for r in range(rows):
            for c in range(vectors):
                if overwrite:
                    put_vector(sums, r * vectors + c, splat(0.0))
                else:
                    yi = y.start + r * y.row_stride + 16 * c
                    put_vector(sums, r * vectors + c, load(result, yi))
        pieces = max(n_ahead, 1)
        for piece in range(pieces):
            if piece < n_ahead:
                for c in range(0, PANEL_OUTPUTS, LANES):
                    prefetch_l2(later, ahead.start + piece * ahead.row_stride + c)
            first, last = split_range(depth, piece, pieces)
            for k in range(first, last):
                for c in range(vectors):
                    if rows == 1:  # bound by memory latency
                        near = min(k + PREFETCH_INPUTS, depth - 1)
                        prefetch_l1(weights, w.start + near * w.row_stride + 16 * c)
                    column = load(weights, w.start + k * w.row_stride + 16 * c)
                    if keeps:
                        store(kept, (k * vectors + c) * 16, column)
                    for r in range(rows):
                        n = r * vectors + c
                        i = x.start + r * x.row_stride + k * x.column_stride
                        number = broadcast(numbers, i)
                        put_vector(sums, n, get_vector(sums, n) + column * number)
        for r in range(rows):
            for c in range(vectors):
                yi = y.start + r * y.row_stride + 16 * c
                store(result, yi, get_vector(sums, r * vectors + c))

    return streaming_product


_multiply_tall = _make_streaming_product(TALL_ROWS, STRIP_VECTORS, False)
_multiply_short = _make_streaming_product(BLOCK_ROWS, STRIP_VECTORS, False)
_multiply_tall_and_keep = _make_streaming_product(TALL_ROWS, STRIP_VECTORS, True)
_multiply_short_and_keep = _make_streaming_product(BLOCK_ROWS, STRIP_VECTORS, True)


@inlined
def count_blocks(rows: int) -> tuple[int, int]:
    """Return the numbers of tall and of short blocks of rows, in this order.

    A few short blocks in the place of tall ones leave at most one row empty, of six rows or more.
    """
    short = 0 if TALL_ROWS == BLOCK_ROWS else (3 - (rows + 1) // 2 % 3) % 3
    tall = max(0, rows + TALL_ROWS - 1 - short * BLOCK_ROWS) // TALL_ROWS
    return tall, max(0, rows - tall * TALL_ROWS + BLOCK_ROWS - 1) // BLOCK_ROWS


@inlined
def first_row(block: int, tall: int) -> int:
    """Return the first row of a block; `tall` is the number of tall ones."""
    return min(block, tall) * TALL_ROWS + max(0, block - tall) * BLOCK_ROWS


@compiled
def multiply_strip(
    x: Any, n_in: int, k: int, rows: int, first: int, last: int, w: Matrix, is_strip: bool,
    depth: int, y: Matrix, overwrite: bool, strip: Any, ahead: Matrix, n_ahead: int,
) -> None:  # fmt: skip
    """Compute STRIP_OUTPUTS columns of y += x·w (y = x·w to overwrite), blocks [first, last).

    x are the packed rows, [n_in, rows] for each block, of which the inputs from k on are used. w is
    [depth, STRIP_OUTPUTS]: the strip, or a part of a matrix, which the first block copies to the
    strip for the others. y begins at row 0. Meanwhile rows [0, n_ahead) of `ahead`, weights that
    are needed later, are prefetched.
    """
    tall = count_blocks(rows)[0]
    in_strip = Matrix(strip, 0, STRIP_OUTPUTS, 1)
    for block in range(first, last):
        begin, end = split_range(n_ahead, block - first, last - first)
        later = Matrix(ahead.array, ahead.start + begin * ahead.row_stride, ahead.row_stride, 1)
        row, count = first_row(block, tall), end - begin
        target = Matrix(y.array, y.start + row * y.row_stride, y.row_stride, 1)
        keep = HAS_FLOATS and block == first and not is_strip
        if block < tall:
            source = Matrix(x, row * n_in + k * TALL_ROWS, 1, TALL_ROWS)
            if keep:
                _multiply_tall_and_keep(source, w, depth, target, overwrite, strip, later, count)
            else:
                _multiply_tall(source, in_strip, depth, target, overwrite, strip, later, count)
        else:
            source = Matrix(x, row * n_in + k * BLOCK_ROWS, 1, BLOCK_ROWS)
            if keep:
                _multiply_short_and_keep(source, w, depth, target, overwrite, strip, later, count)
            else:
                _multiply_short(source, in_strip, depth, target, overwrite, strip, later, count)


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


# Named by rows and columns.
dot_product_4x1 = _make_dot_product(4, 1)
dot_product_1x4, dot_product_1x1 = _make_dot_product(1, 4), _make_dot_product(1, 1)

DOT_COLUMNS = 4 if HAS_AVX512 else 1  # of a product with 4 rows in registers
multiply_columns = _make_dot_product(BLOCK_ROWS, 4) if HAS_AVX512 else dot_product_4x1


# Strips


@compiled
def expand_float32(w: Any, n_out: int, j: int, first: int, depth: int, strip: Any) -> None:
    """Copy inputs [first, first + depth) of the outputs from j on of w [I, O].

    Outputs past the last one are zero.
    """
    for k in range(depth):
        i = (first + k) * n_out + j
        for c in range(0, STRIP_OUTPUTS, LANES):
            p = k * STRIP_OUTPUTS + c
            if n_out - j - c >= LANES:
                store(strip, p, load(w, i + c))
            else:
                for n in range(LANES):
                    strip[p + n] = w[i + c + n] if j + c + n < n_out else np.float32(0)


@compiled
def _expand_transposed(w: Any, op: Any, j: int, first: int, depth: int, strip: Any) -> None:
    """Copy inputs [first, first + depth) of the outputs from j on of w [O, I].

    Outputs past the last one repeat it.
    """
    n_in, last = op[N_IN], op[N_OUT] - 1
    vector_end = depth // LANES * LANES
    for c in range(0, STRIP_OUTPUTS, LANES):
        for k in range(0, vector_end, LANES):
            square = stack_vectors(LANES)
            for n in range(LANES):
                put_vector(square, n, load(w, min(j + c + n, last) * n_in + first + k))
            transpose_vectors(square)
            for n in range(LANES):
                store(strip, (k + n) * STRIP_OUTPUTS + c, get_vector(square, n))
        for k in range(vector_end, depth):
            for n in range(LANES):
                strip[k * STRIP_OUTPUTS + c + n] = w[min(j + c + n, last) * n_in + first + k]


def _make_expand_quantized(bits: int) -> Callable[..., None]:
    per_word = 32 // bits
    factors = FIELD_FACTORS[bits]

    @compiled
    def expand(matrix: QuantizedMatrix, j: int, first: int, depth: int, strip: Any) -> None:
        """Dequantize inputs [first, first + depth) of the outputs from j on.

        Meanwhile those of the next strip are prefetched.
        """
        words, groups, offset_bits = matrix.words, matrix.groups, matrix.offset_bits
        n_in, group_size = matrix.n_in, matrix.group_size
        for c in range(0, STRIP_OUTPUTS, LANES):
            number = (j + c) // LANES
            scales = stack_vectors(per_word)
            begin, last = first, first + depth
            while begin < last:
                end = min(last, (begin // group_size + 1) * group_size)
                entry = number * (n_in // group_size) + begin // group_size
                scale, offset = scale_and_offset(groups, entry, offset_bits)
                for n in range(per_word):
                    put_vector(scales, n, scale * broadcast(factors, n))
                for k in range(begin, end, per_word):
                    i = (number * n_in + k) // per_word * LANES
                    prefetch_l2(words, i + n_in // per_word * LANES)
                    packed = load(words, i)
                    for n in range(per_word):
                        weights = bit_field_as_floats(packed, n, bits) * get_vector(scales, n)
                        store(strip, (k + n - first) * STRIP_OUTPUTS + c, weights + offset)
                begin = end

    return expand


_expand_int8, _expand_int4 = _make_expand_quantized(8), _make_expand_quantized(4)


@compiled
def expand_weights(op: Any, j: int, first: int, depth: int, strip: Any) -> None:
    """Expand weights of an instruction's matrix to floats, a strip [depth, STRIP_OUTPUTS].

    They are those of the inputs [first, first + depth) and of the outputs from j on.
    """
    if HAS_FLOATS:
        w = float_array(op[WEIGHT], op[N_IN] * (op[N_OUT] + PANEL_OUTPUTS))
        if op[FORMAT] == FLOAT32:
            expand_float32(w, op[N_OUT], j, first, depth, strip)
        elif op[FORMAT] == FLOAT32_TRANSPOSED:
            _expand_transposed(w, op, j, first, depth, strip)
    if HAS_INT8 and op[FORMAT] == INT8:
        _expand_int8(quantized_matrix(op), j, first, depth, strip)
    if HAS_INT4 and op[FORMAT] == INT4:
        _expand_int4(quantized_matrix(op), j, first, depth, strip)
