"""GEMM kernel for float32 on AMX by bf16x3: a float32 is split into the sum of three bfloat16.

The unit multiplies bfloat16, the upper halves of float32, and adds in float32. The split is exact.
Of the nine products between the parts of two numbers the six largest suffice for float32's
precision. That takes half the time of the vectors.

A word holds two inputs: input k and input k + 16 of 32. The order does not matter as long as both
factors pair the same inputs, and with this one no number has to move to another lane.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.interface.sizes import (
    LANES,
    N_PARTS,
    PANEL_TILES,
    PANEL_WORDS,
    ROWS_WORDS,
    TILE_INPUTS,
    TILE_ROW_BYTES,
    TILE_ROWS,
    TILE_WORDS,
)
from gptx.backends.cpu.kernels.amx.tile_unit import (
    byte_pointer,
    emit,
    zero_tiles,
)
from gptx.backends.cpu.kernels.arguments import Matrix
from gptx.backends.cpu.kernels.compilation import I64, compiled, to_int64
from gptx.backends.cpu.kernels.simd import FLOATS, INTS, floats, ints, load, store

UPPER_HALF = ir.Constant(INTS, [0xFFFF0000] * LANES)


@intrinsic
def _clear_lower_half(context: Any, x: Any) -> Any:
    """Return floats x with the lower half of their bits cleared."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.and_(builder.bitcast(args[0], INTS), UPPER_HALF), FLOATS)

    return floats(x), generate


@intrinsic
def _pair_upper_halves(context: Any, a: Any, b: Any) -> Any:
    """Return words with the upper half of a's bits below, and of b's bits above."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = (builder.bitcast(x, INTS) for x in args)
        a = builder.lshr(a, ir.Constant(INTS, [16] * LANES))
        return builder.or_(a, builder.and_(b, UPPER_HALF))

    return ints(a, b), generate


@compiled
def store_parts(a: Any, b: Any, words: Any, i: int, stride: int) -> None:
    """Store the parts of two vectors as words, at words[i], words[i + stride], ..."""
    for part in range(N_PARTS):
        store(words, i + part * stride, _pair_upper_halves(a, b))
        a = a - _clear_lower_half(a)
        b = b - _clear_lower_half(b)


@compiled
def pack_row(row: Any, n_in: int, words: Any, n: int) -> None:
    """Pack a row [I] as row n of `words`: [rows / 16, I / 32, 3, 16, 16]."""
    i = n // TILE_ROWS * ROWS_WORDS * n_in + n % TILE_ROWS * LANES
    for k in range(0, n_in, TILE_INPUTS):
        store_parts(load(row, k), load(row, k + LANES), words, i + k * ROWS_WORDS, TILE_WORDS)


@compiled
def pack_panel(w: Any, wi: int, stride: int, depth: int, words: Any, i: int) -> None:
    """Pack w [depth, 64] to words[i:]: [depth / 32, 3, 4, 16, 16].

    Rows of w begin at wi and every `stride` numbers.
    """
    for k in range(0, depth, TILE_INPUTS):
        for j in range(LANES):
            for c in range(PANEL_TILES):
                source = wi + (k + j) * stride + c * LANES
                target = i + k * PANEL_WORDS + c * TILE_WORDS + j * LANES
                a, b = load(w, source), load(w, source + LANES * stride)
                store_parts(a, b, words, target, PANEL_TILES * TILE_WORDS)


@intrinsic
def _multiply_tiles(context: Any, x: Any, xi: Any, w: Any, wi: Any) -> Any:
    """Add to registers 0 to 3 the products of 32 inputs of 16 rows and 64 outputs."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def load_tile(register: int, first: Any, n: int) -> None:
            address = builder.gep(first, [I64(4 * n * TILE_WORDS)])
            emit(builder, "tileloadd64", register, address, I64(TILE_ROW_BYTES))

        rows = byte_pointer(context, builder, sig.args[:2], args[:2])
        panel = byte_pointer(context, builder, sig.args[2:], args[2:])
        for part in range(N_PARTS):
            load_tile(4 + part, rows, part)
        for part in range(N_PARTS):
            for column in range(PANEL_TILES):
                load_tile(7, panel, PANEL_TILES * part + column)
                for other in range(N_PARTS - part):
                    emit(builder, "tdpbf16ps", column, 4 + other, 7)
        return context.get_dummy_value()

    return types.void(x, xi, w, wi), generate


def _make_tile_access(name: str) -> Any:
    """Make an intrinsic that moves registers 0 to 3 from or to a matrix [16, 64]."""

    @intrinsic
    def access(context: Any, y: Any, i: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first = byte_pointer(context, builder, sig.args, args)
            stride = builder.mul(to_int64(context, builder, args[2], sig.args[2]), I64(4))
            for column in range(PANEL_TILES):
                address = builder.gep(first, [I64(4 * LANES * column)])
                emit(builder, name, column, address, stride)
            return context.get_dummy_value()

        return types.void(y, i, width), generate

    return access


_load_tiles, _store_tiles = _make_tile_access("tileloadd64"), _make_tile_access("tilestored64")


@compiled
def multiply(x: Any, xi: int, w: Any, wi: int, depth: int, y: Matrix, overwrite: bool) -> None:
    """Compute y [16, 64] += x·w, or y = x·w to overwrite.

    x is packed by `pack_row` and w by `pack_panel`, from xi and wi on.
    """
    if overwrite:
        zero_tiles(PANEL_TILES)
    else:
        _load_tiles(y.array, y.start, y.row_stride)
    for k in range(0, depth, TILE_INPUTS):
        _multiply_tiles(x, xi + k * ROWS_WORDS, w, wi + k * PANEL_WORDS)
    _store_tiles(y.array, y.start, y.row_stride)
