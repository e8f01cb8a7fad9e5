"""GEMM kernel for quantized weights on VNNI: several rows times a matrix, in registers.

As in `gemv_bytes.py`, a row is three bytes to a number. A tile of integer sums has 8 rows, three
digits and 16 outputs, in 24 registers. For eight rows this takes half the time of products with
floats (`gemm.py`), for hundreds four fifths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gptx.backends.cpu.interface.sizes import BYTE_ROWS, LANES, N_DIGITS
from gptx.backends.cpu.kernels.arguments import Matrix, QuantizedMatrix
from gptx.backends.cpu.kernels.byte_products import add_byte_products
from gptx.backends.cpu.kernels.compilation import compiled
from gptx.backends.cpu.kernels.fixed_point import measure_row, store_digits
from gptx.backends.cpu.kernels.gemv_bytes import add_group
from gptx.backends.cpu.kernels.group_scales import prefetch_group, scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    PREFETCH_BYTES,
    broadcast,
    load,
    nibbles_as_bytes,
    prefetch_l2,
    put_vector,
    round_to_even,
    splat,
    stack_vectors,
    store,
)

BLOCK_DIGITS = BYTE_ROWS * N_DIGITS  # words to four inputs of a block


@compiled
def pack_row(row: Any, n_in: int, group_size: int, bits: int, x: Any, n: int, digits: Any) -> None:
    """Pack a row [I] of floats as row n of x; `digits` has room for the 3·I bytes of one row.

    x has blocks of 8 rows, of 8·I floats each: digits, words [I / 4, 8, 3]; factors [8]; sums of
    the groups [G, 8].
    """
    block = n // BYTE_ROWS * BYTE_ROWS * n_in
    factors = block + BLOCK_DIGITS * n_in // 4 + n % BYTE_ROWS
    factor, inverse = measure_row(row, n_in, group_size, x[factors + BYTE_ROWS :], BYTE_ROWS)
    x[factors] = factor
    for k in range(0, n_in, LANES):
        store_digits(digits, k, n_in, round_to_even(load(row, k) * splat(inverse)), bits)
    source, target = digits.view(np.uint32), x.view(np.uint32)
    first = block + n % BYTE_ROWS * N_DIGITS
    for k in range(n_in // 4):
        for d in range(N_DIGITS):
            target[first + k * BLOCK_DIGITS + d] = source[d * (n_in // 4) + k]


def _make_product(rows: int, bits: int) -> Callable[..., None]:
    """Make the product of one strip with the first `rows` rows of a block."""
    per_word, size = 32 // bits, rows * N_DIGITS

    @compiled
    def multiply(matrix: QuantizedMatrix, strip: int, x: Any, block: int, y: Matrix) -> None:
        """Compute 16 outputs of y = x·W; y begins at them, and x at `block`."""
        words, groups, offset_bits = matrix.words, matrix.groups, matrix.offset_bits
        n_in, group_size, result = matrix.n_in, matrix.group_size, y.array
        n_groups, digits = n_in // group_size, x.view(np.uint32)
        factors = block + BLOCK_DIGITS * n_in // 4
        for g in range(n_groups):
            sums = stack_vectors(size)
            for n in range(size):
                put_vector(sums, n, splat(0.0))  # the bits of the integer 0
            for k in range(g * group_size, (g + 1) * group_size, per_word):
                at, i = block + k // 4 * BLOCK_DIGITS, (strip * n_in + k) // per_word * LANES
                prefetch_l2(words, i + PREFETCH_BYTES // 4)
                packed = load(words, i)
                if bits == 8:
                    for n in range(size):
                        add_byte_products(sums, n, packed, broadcast(digits, at + n))
                else:
                    even, odd = nibbles_as_bytes(packed, 0), nibbles_as_bytes(packed, 1)
                    for n in range(size):
                        add_byte_products(sums, n, even, broadcast(digits, at + n))
                    for n in range(size):
                        add_byte_products(sums, n, odd, broadcast(digits, at + BLOCK_DIGITS + n))
            entry = strip * n_groups + g
            prefetch_group(groups, entry, offset_bits)
            scale, offset = scale_and_offset(groups, entry, offset_bits)
            for r in range(rows):
                i = y.start + r * y.row_stride
                factor = broadcast(x, factors + r)
                sum_of_x = broadcast(x, factors + (g + 1) * BYTE_ROWS + r)
                before = splat(0.0) if g == 0 else load(result, i)
                after = add_group(before, sums, r * N_DIGITS, scale, offset, factor, sum_of_x)
                store(result, i, after)

    return multiply


def _make_quantized_gemm(bits: int) -> Callable[..., None]:
    whole, half = (_make_product(rows, bits) for rows in (BYTE_ROWS, BYTE_ROWS // 2))

    @compiled
    def multiply(matrix: QuantizedMatrix, strip: int, x: Any, rows: int, n: int, y: Matrix) -> None:
        """Compute 16 outputs for the rows from n on, at most 8 of `rows` rows."""
        if rows - n > BYTE_ROWS // 2:
            whole(matrix, strip, x, n * matrix.n_in, y)
        else:
            half(matrix, strip, x, n * matrix.n_in, y)

    return multiply


multiply_int8, multiply_int4 = _make_quantized_gemm(8), _make_quantized_gemm(4)
