"""GEMM kernel for quantized weights on AMX, which multiplies tiles of bytes and adds integers.

One instruction multiplies 16 x 64 by 64 x 16 bytes. Quantized values are bytes. A row of x is split
into three rows of bytes (`fixed_point.py`), side by side: 16 rows are three tiles, 5 rows are one.
The integer sums of a group become floats and are scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.interface.sizes import (
    BLOCK_ROWS,
    LANES,
    N_DIGITS,
    PANEL_OUTPUTS,
    PANEL_TILES,
    QUANTIZED_WORKSPACE_SIZE,
    SUMS_START,
    TILE_ROW_BYTES,
    TILE_ROWS,
    TILE_WORDS,
    UNPACKED_START,
)
from gptx.backends.cpu.kernels.amx.tile_unit import (
    byte_pointer,
    configure_tiles,
    emit,
    release_tiles,
    zero_tiles,
)
from gptx.backends.cpu.kernels.arguments import (
    Matrix,
    QuantizedMatrix,
)
from gptx.backends.cpu.kernels.compilation import I64, compiled, to_int64
from gptx.backends.cpu.kernels.fixed_point import measure_row, store_digits
from gptx.backends.cpu.kernels.gemm import make_outer_product
from gptx.backends.cpu.kernels.group_scales import scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    FLOATS,
    INTS,
    PREFETCH_BYTES,
    broadcast,
    floats,
    get_vector,
    load,
    nibbles_as_bytes,
    prefetch_l1,
    put_vector,
    round_to_even,
    splat,
    stack_vectors,
    store,
)

WORKSPACE_GROUPS = QUANTIZED_WORKSPACE_SIZE // LANES  # whose offsets a workspace holds

_multiply_sums = make_outer_product(BLOCK_ROWS, 1)


@compiled
def pack_row(row: Any, n_in: int, group_size: int, bits: int, x: Any, n: int, rows: int) -> None:
    """Pack a row [I] of floats as row n of `rows` in x: its digits, its factor and its sums.

    x holds digits, bytes [rows / 16, I / depth, 16, 3, depth], then factors [rows], then sums of
    the groups, [rows / 4, G, 4]. For 4 bits the even inputs of eight precede the odd ones, as in
    the unpacked weights.
    """
    factors, depth = N_DIGITS * rows * n_in // 4, min(group_size, TILE_ROW_BYTES)
    sums = factors + rows + n // BLOCK_ROWS * BLOCK_ROWS * (n_in // group_size) + n % BLOCK_ROWS
    factor, inverse = measure_row(row, n_in, group_size, x[sums:], BLOCK_ROWS)
    x[factors + n] = factor
    factor_inverse = splat(inverse)
    digits = x.view(np.int8)
    i = N_DIGITS * (n // TILE_ROWS * n_in * TILE_ROWS + n % TILE_ROWS * depth)
    for k in range(0, n_in, depth):
        for j in range(0, depth, LANES):
            at = i + k * N_DIGITS * TILE_ROWS + j
            integers = round_to_even(load(row, k + j) * factor_inverse)
            store_digits(digits, at, depth, integers, bits)


@compiled
def _unpack(words: Any, first: int, group_size: int, unpacked: Any, i: int) -> None:
    """Unpack weights of 4 bits to bytes: of each word the even ones, then the odd ones."""
    for j in range(0, group_size // 8 * LANES, LANES):
        prefetch_l1(words, first + j + PREFETCH_BYTES // 4)
        packed = load(words, first + j)
        store(unpacked, i + 2 * j, nibbles_as_bytes(packed, 0))
        store(unpacked, i + 2 * j + LANES, nibbles_as_bytes(packed, 1))


def _make_tile_intrinsics(count: int) -> tuple[Any, Any, Any]:
    """Make the intrinsics for `count` tiles of digits, at most three."""

    @intrinsic
    def load_digits(context: Any, x: Any, i: Any, depth: Any) -> Any:
        """Load tiles of `depth` inputs to registers 3 to 5."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first = byte_pointer(context, builder, sig.args[:2], args[:2])
            depth = to_int64(context, builder, args[2], sig.args[2])
            for n in range(count):
                address = builder.gep(first, [builder.mul(depth, I64(TILE_ROWS * n))])
                emit(builder, "tileloadd64", 3 + n, address, depth)
            return context.get_dummy_value()

        return types.void(x, i, depth), generate

    @intrinsic
    def add_products(context: Any, words: Any, i: Any) -> Any:
        """Add to registers 0 to 2 the products of 3 to 5 with the weights of 16 outputs."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address = byte_pointer(context, builder, sig.args, args)
            emit(builder, "tileloadd64", 6, address, I64(TILE_ROW_BYTES))
            for n in range(count):
                emit(builder, "tdpbsud", n, 3 + n, 6)  # x is signed, weights are not
            return context.get_dummy_value()

        return types.void(words, i), generate

    @intrinsic
    def store_sums(context: Any, int_sums: Any, i: Any) -> Any:
        """Store registers 0 to 2, one after the other."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first = byte_pointer(context, builder, sig.args, args)
            for n in range(count):
                address = builder.gep(first, [I64(4 * TILE_WORDS * n)])
                emit(builder, "tilestored64", n, address, I64(TILE_ROW_BYTES))
            return context.get_dummy_value()

        return types.void(int_sums, i), generate

    return load_digits, add_products, store_sums


@intrinsic
def _join_digits(context: Any, low: Any, middle: Any, high: Any) -> Any:
    """Return low + 2**8 middle + 2**16 high of ints, as floats."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        low, middle, high = args
        middle = builder.shl(middle, ir.Constant(INTS, [8] * LANES))
        low = builder.sitofp(builder.add(low, middle), FLOATS)
        high = builder.fmul(builder.sitofp(high, FLOATS), ir.Constant(FLOATS, [2.0**16] * LANES))
        return builder.fadd(high, low, flags=("contract",))

    return floats(low, middle, high), generate


def _make_group_product(count: int) -> Callable[..., None]:
    """Make the product of one group for `count` tiles of digits and 64 outputs."""
    load_digits, add_products, store_sums = _make_tile_intrinsics(count)

    @compiled
    def multiply_group(
        digits: Any, i: int, words: Any, wi: int, stride: int, group_size: int, depth: int,
        int_sums: Any,
    ) -> None:  # fmt: skip
        """Compute int_sums [4, 16, 3, 16]; strip c of the weights begins at wi + c * stride."""
        for c in range(PANEL_TILES):
            zero_tiles(count)
            for k in range(0, group_size, depth):
                if c == 0 or depth < group_size:
                    load_digits(digits, i + k * N_DIGITS * TILE_ROWS, depth)
                add_products(words, wi + c * stride + k // 4 * LANES)
            store_sums(int_sums, c * N_DIGITS * TILE_WORDS)

    return multiply_group


_multiply_1, _multiply_2, _multiply_3 = (_make_group_product(count) for count in (1, 2, 3))


@compiled
def _add_scaled(
    int_sums: Any, i: int, rows: int, scale: Any, sums: Any, j: int, overwrite: bool
) -> None:
    """Add scale * int_sums [rows, 3, 16] to 16 of the 64 outputs of each row, or overwrite them."""
    for r in range(rows):
        k, n = i + r * N_DIGITS * LANES, j + r * PANEL_OUTPUTS
        low, middle = load(int_sums, k), load(int_sums, k + LANES)
        scaled = _join_digits(low, middle, load(int_sums, k + 2 * LANES)) * scale
        store(sums, n, scaled if overwrite else load(sums, n) + scaled)


@compiled
def multiply(
    matrix: QuantizedMatrix, number: int, x: Any, rows: int, first: int, last: int, y: Matrix,
    workspace: Any,
) -> None:  # fmt: skip
    """Compute rows [first, last) of panel `number` of y = x·W.

    x holds `rows` rows packed by `pack_row`. y begins at the panel, and must have space for a whole
    block of rows after the last.
    """
    n_in, group_size = matrix.n_in, matrix.group_size
    packed, groups, offset_bits = matrix.words, matrix.groups, matrix.offset_bits
    n_groups, depth = n_in // group_size, min(group_size, TILE_ROW_BYTES)
    padded_rows = (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    digits, int_sums = x.view(np.int8), workspace.view(np.int32)
    unpacked = workspace.view(np.uint32)
    factors, first_strip = x[N_DIGITS * padded_rows * n_in // 4 :], number * PANEL_TILES
    scales = stack_vectors(PANEL_TILES)
    configure_tiles(workspace, depth)
    for g in range(n_groups):
        words, stride = packed, n_in // 4 * LANES
        wi = (first_strip * n_in + g * group_size) // 4 * LANES
        if matrix.bits == 8:
            for c in range(PANEL_TILES):
                begin = wi + c * stride
                for line in range(begin, begin + group_size // 4 * LANES, LANES):
                    prefetch_l1(packed, line + PREFETCH_BYTES // 4)
        else:
            words, wi, stride = unpacked, UNPACKED_START, group_size // 4 * LANES
            for c in range(PANEL_TILES):
                begin = ((first_strip + c) * n_in + g * group_size) // 8 * LANES
                _unpack(packed, begin, group_size, unpacked, UNPACKED_START + c * stride)
        for c in range(PANEL_TILES):
            entry = (first_strip + c) * n_groups + g
            put_vector(scales, c, scale_and_offset(groups, entry, offset_bits)[0])
        for row in range(first, last, TILE_ROWS):
            i = (row * n_in + g * group_size * TILE_ROWS) * N_DIGITS
            count = min(TILE_ROWS, last - row)
            if count > TILE_ROWS * 2 // N_DIGITS:
                _multiply_3(digits, i, words, wi, stride, group_size, depth, int_sums)
            elif count > TILE_ROWS // N_DIGITS:
                _multiply_2(digits, i, words, wi, stride, group_size, depth, int_sums)
            else:
                _multiply_1(digits, i, words, wi, stride, group_size, depth, int_sums)
            j = SUMS_START + (row - first) * PANEL_OUTPUTS
            for c in range(PANEL_TILES):
                scale, sums_of_strip = get_vector(scales, c), c * N_DIGITS * TILE_WORDS
                _add_scaled(int_sums, sums_of_strip, count, scale, workspace, j + c * LANES, g == 0)
    release_tiles()
    for row in range(first, last):
        factor, j = broadcast(factors, row), y.start + row * y.row_stride
        i = SUMS_START + (row - first) * PANEL_OUTPUTS
        for c in range(0, PANEL_OUTPUTS, LANES):
            store(y.array, j + c, load(workspace, i + c) * factor)

    # Add the offsets times the sums of the groups
    for c in range(PANEL_TILES):
        for begin in range(0, n_groups, WORKSPACE_GROUPS):
            count = min(WORKSPACE_GROUPS, n_groups - begin)
            for g in range(count):
                entry = (first_strip + c) * n_groups + begin + g
                offset = scale_and_offset(groups, entry, offset_bits)[1]
                store(workspace, g * LANES, offset)
            source = Matrix(workspace, 0, LANES, 1)
            for row in range(first, last, BLOCK_ROWS):
                xi = padded_rows + row * n_groups + begin * BLOCK_ROWS
                sums = Matrix(factors, xi, 1, BLOCK_ROWS)
                yi = y.start + row * y.row_stride + c * LANES
                target = Matrix(y.array, yi, y.row_stride, 1)
                _multiply_sums(sums, source, count, target, False)
