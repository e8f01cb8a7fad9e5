"""Products of several rows with floats on Intel's matrix unit, AMX.

The unit multiplies bfloat16, the upper halves of floats, and adds in float32. A float is the sum of
three of them, without a remainder, and of the nine products between the parts of two floats the six
largest are all that float32 can tell. That takes half the time of the vectors.

Two inputs make a word. It does not matter which, so long as both factors pair the same ones: here
an input and the 16th after it, so that no number has to move to another lane.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.kernels.amx.tile_unit import (
    DEPTH,
    I64,
    ROWS,
    SQUARE,
    instruction,
    place,
    zero,
)
from gptx.backends.cpu.kernels.gemm import TILE
from gptx.backends.cpu.kernels.simd import (
    FLOATS,
    INTS,
    LANES,
    compiled,
    floats,
    int64,
    ints,
    load,
    store,
)

PARTS = 3  # bfloat16 to a float
STEP = 32  # inputs to a tile
COLUMNS = TILE // LANES  # tiles side by side
ROWS_SIZE = PARTS * SQUARE // STEP  # words of 16 rows, for each input
PANEL_SIZE = COLUMNS * ROWS_SIZE  # words of 64 columns, for each input

UPPER = ir.Constant(INTS, [0xFFFF0000] * LANES)


@intrinsic
def _upper(context: Any, x: Any) -> Any:
    """x without the lower half of its bits."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.and_(builder.bitcast(args[0], INTS), UPPER), FLOATS)

    return floats(x), generate


@intrinsic
def _pair(context: Any, a: Any, b: Any) -> Any:
    """Words of the upper halves of a's and of b's bits, b's above."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = (builder.bitcast(x, INTS) for x in args)
        a = builder.lshr(a, ir.Constant(INTS, [16] * LANES))
        return builder.or_(a, builder.and_(b, UPPER))

    return ints(a, b), generate


@compiled
def put_parts(a: Any, b: Any, words: Any, i: int, size: int) -> None:
    """The parts of two vectors as words, to words[i], words[i + size] and so on."""
    for part in range(PARTS):
        store(words, i + part * size, _pair(a, b))
        a = a - _upper(a)
        b = b - _upper(b)


@compiled
def cut_row(row: Any, n_in: int, words: Any, n: int) -> None:
    """Put a row [I] into `words` as row n: [rows / 16, I / 32, 3, 16, 16]."""
    i = n // ROWS * ROWS_SIZE * n_in + n % ROWS * LANES
    for k in range(0, n_in, STEP):
        put_parts(load(row, k), load(row, k + LANES), words, i + k * ROWS_SIZE, SQUARE)


@compiled
def cut_panel(w: Any, wi: int, stride: int, depth: int, words: Any, i: int) -> None:
    """Put w [depth, 64], whose rows begin at wi and every `stride` numbers, into words from i on:
    [depth / 32, 3, 4, 16, 16]."""
    for k in range(0, depth, STEP):
        for j in range(LANES):
            for c in range(COLUMNS):
                at = wi + (k + j) * stride + c * LANES
                here = i + k * PANEL_SIZE + c * SQUARE + j * LANES
                a, b = load(w, at), load(w, at + LANES * stride)
                put_parts(a, b, words, here, COLUMNS * SQUARE)


@intrinsic
def _step(context: Any, x: Any, xi: Any, w: Any, wi: Any) -> Any:
    """Add to tiles 0 to 3 the products of 32 inputs of 16 rows and of 64 columns."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def fetch(tile: int, first: Any, n: int) -> None:
            here = builder.gep(first, [I64(4 * n * SQUARE)])
            instruction(builder, "tileloadd64", tile, here, I64(DEPTH))

        rows = place(context, builder, sig.args[:2], args[:2])
        panel = place(context, builder, sig.args[2:], args[2:])
        for part in range(PARTS):
            fetch(4 + part, rows, part)
        for part in range(PARTS):
            for column in range(COLUMNS):
                fetch(7, panel, COLUMNS * part + column)
                for other in range(PARTS - part):
                    instruction(builder, "tdpbf16ps", column, 4 + other, 7)
        return context.get_dummy_value()

    return types.void(x, xi, w, wi), generate


def _access(name: str) -> Any:
    """Make an intrinsic that moves tiles 0 to 3 from or to a matrix [16, 64]."""

    @intrinsic
    def access(context: Any, y: Any, i: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first = place(context, builder, sig.args, args)
            stride = builder.mul(int64(context, builder, args[2], sig.args[2]), I64(4))
            for column in range(COLUMNS):
                here = builder.gep(first, [I64(4 * LANES * column)])
                instruction(builder, name, column, here, stride)
            return context.get_dummy_value()

        return types.void(y, i, width), generate

    return access


_fetch, _put = _access("tileloadd64"), _access("tilestored64")


@compiled
def multiply(
    x: Any, xi: int, w: Any, wi: int, depth: int, y: Any, yi: int, y_width: int, fresh: bool
) -> None:
    """y [16, 64] += x·w, or = x·w: x of `cut_row` and w of `cut_panel`, from xi and wi on."""
    if fresh:
        zero(COLUMNS)
    else:
        _fetch(y, yi, y_width)
    for k in range(0, depth, STEP):
        _step(x, xi + k * ROWS_SIZE, w, wi + k * PANEL_SIZE)
    _put(y, yi, y_width)
