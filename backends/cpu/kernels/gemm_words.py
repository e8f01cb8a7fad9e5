"""GEMM kernel for quantized weights and few rows: weights become floats in registers.

`gemm.py` expands weights to a strip of floats in the cache, which takes as long as multiplying it
by four rows. Here each block of rows converts the weights again, beside the multiplications. On
AVX2 a row takes a fifth more time; 8 rows take a quarter less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptx.backends.cpu.interface.sizes import WORD_ROWS
from gptx.backends.cpu.kernels.arguments import Matrix, QuantizedMatrix
from gptx.backends.cpu.kernels.barrier import split_range
from gptx.backends.cpu.kernels.compilation import compiled, inlined
from gptx.backends.cpu.kernels.gemv_words import make_word_product

MIN_ROWS = 2  # of a block


@inlined
def count_blocks(rows: int) -> int:
    """Return the number of blocks, among which `split_range` splits the rows."""
    return (rows + WORD_ROWS - 1) // WORD_ROWS


@compiled
def pack_row(row: Any, size: int, n: int, rows: int, x: Any) -> None:
    """Copy a prepared row, with its sums, as row n of `rows` to x: blocks [I + G, rows]."""
    blocks = count_blocks(rows)
    begin, end = split_range(rows, ((n + 1) * blocks - 1) // rows, blocks)
    for k in range(size):
        x[begin * size + k * (end - begin) + n - begin] = row[k]


@inlined
def _skip_block(
    matrix: QuantizedMatrix, strip: int, x: Any, start: int, rows: int, y: Matrix
) -> None:
    """Compute nothing: a block has at least `MIN_ROWS` rows."""


def _make_block_product(bits: int, most: int) -> Callable[..., None]:
    """Make the product of a block of at most `most` rows."""
    if most < MIN_ROWS:
        return _skip_block
    product, multiply_fewer = make_word_product(bits, most), _make_block_product(bits, most - 1)

    @inlined
    def multiply(
        matrix: QuantizedMatrix, strip: int, x: Any, start: int, rows: int, y: Matrix
    ) -> None:
        if rows == most:
            product(matrix, strip, strip + 1, x, start, y)
        else:
            multiply_fewer(matrix, strip, x, start, rows, y)

    return multiply


def _make_quantized_gemm(bits: int) -> Callable[..., None]:
    multiply_block = _make_block_product(bits, WORD_ROWS)

    @compiled
    def multiply(matrix: QuantizedMatrix, strip: int, x: Any, rows: int, y: Matrix) -> None:
        """Compute strip `strip` of y = x·W; x are blocks [I + G, rows] of prepared rows."""
        blocks, size = count_blocks(rows), matrix.n_in + matrix.n_in // matrix.group_size
        for block in range(blocks):
            row, end = split_range(rows, block, blocks)
            target = Matrix(y.array, y.start + row * y.row_stride, y.row_stride, 1)
            multiply_block(matrix, strip, x, row * size, end - row, target)

    return multiply


multiply_int8, multiply_int4 = _make_quantized_gemm(8), _make_quantized_gemm(4)
