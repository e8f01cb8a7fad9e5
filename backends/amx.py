"""Products of quantized weights with several rows on Intel's matrix unit, AMX.

The unit multiplies tiles of bytes, 16 x 64 by 64 x 16 at once, and adds in whole numbers. Codes
are bytes already, and the rows of x are cut into three (`fixed_point.py`): a product takes three
tile instructions a group. Then the sum is made a float and is scaled.

Tiles are named by their numbers, 0 to 7, and belong to the thread. Without this unit, panels of
floats do the same (`numpy_products.py`).
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.fixed_point import PARTS, digits, measure
from gptx.backends.numpy_products import AHEAD, BLOCK, compiled, outer_4x1
from gptx.backends.processor import has
from gptx.backends.simd import (
    I8,
    LANES,
    call,
    int64,
    load,
    nearest,
    pointer,
    prefetch,
    splat,
    spread,
    store,
    to_bytes,
    to_floats,
)

ROWS = 16  # of a tile
DEPTH = 64  # bytes to a row of a tile
SQUARE = ROWS * ROWS
ROOM = 2 * PARTS * SQUARE  # numbers that `multiply` needs, and 4 for each input

# What the processor has; the code is there if so. Whether Linux lets a process use it, `allowed`
# finds out.
COMPILED = has("amx-int8")
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18


@cache
def allowed() -> bool:
    """Ask Linux for the tiles, whose state it has to keep for each thread; False if it refuses."""
    if not COMPILED or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0


def _tile_instruction(name: str, n_tiles: int, memory: bool) -> Callable[..., Any]:
    """An intrinsic of tile numbers (constants) and, for loads and stores, of a place in an array
    and the bytes from one row to the next."""

    def generator(*tiles: Any) -> Callable[..., Any]:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            values = [I8(tile.literal_value) for tile in tiles]
            if memory:
                place = pointer(context, builder, sig.args[n_tiles:], args[n_tiles:])
                place = builder.bitcast(place, I8.as_pointer())
                values += [place, int64(context, builder, args[-1], sig.args[-1])]
            call(builder, name, ir.VoidType(), *values)
            return context.get_dummy_value()

        return generate

    def literal(*tiles: Any) -> bool:
        return all(isinstance(tile, types.IntegerLiteral) for tile in tiles)

    if memory:

        @intrinsic
        def access(context: Any, tile: Any, array: Any, i: Any, stride: Any) -> Any:
            return (types.void(tile, array, i, stride), generator(tile)) if literal(tile) else None

        return access
    if n_tiles == 1:

        @intrinsic
        def single(context: Any, tile: Any) -> Any:
            return (types.void(tile), generator(tile)) if literal(tile) else None

        return single

    @intrinsic
    def triple(context: Any, c: Any, a: Any, b: Any) -> Any:
        return (types.void(c, a, b), generator(c, a, b)) if literal(c, a, b) else None

    return triple


_zero = _tile_instruction("llvm.x86.tilezero", 1, False)
_load = _tile_instruction("llvm.x86.tileloadd64", 1, True)
_store = _tile_instruction("llvm.x86.tilestored64", 1, True)
_dot = _tile_instruction("llvm.x86.tdpbsud", 3, False)  # c += a·b, a signed, b not


@intrinsic
def _configure(context: Any, array: Any, i: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = builder.bitcast(pointer(context, builder, sig.args, args), I8.as_pointer())
        call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), place)
        return context.get_dummy_value()

    return types.void(array, i), generate


@intrinsic
def _release(context: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def cut(row: Any, n_in: int, group: int, bits: int, x: Any, n: int, rows: int) -> None:
    """Put a row [I] of floats into x as row n of `rows`: its bytes, its factor, its sums.

    x holds tiles of bytes, [rows / 16, I / depth, 3, 16, depth], factors [rows] and the sums of the
    groups, [rows / 4, G, 4]. In codes of 4 bits the even inputs of a word come before the odd ones,
    and so they do here.
    """
    first, depth = PARTS * rows * n_in // 4, min(group, DEPTH)
    sums = x[first + rows + n // BLOCK * BLOCK * (n_in // group) + n % BLOCK :]
    factor, inverse = measure(row, n_in, group, sums, BLOCK)
    x[first + n] = factor
    grow = splat(inverse)
    tiles, i = x.view(np.int8), n // ROWS * n_in * PARTS * ROWS + n % ROWS * depth
    for k in range(0, n_in, depth):
        for j in range(0, depth, LANES):
            at = i + k * PARTS * ROWS + j
            digits(tiles, at, ROWS * depth, nearest(load(row, k + j) * grow), bits)


@compiled
def _set_up(room: Any, i: int, depth: int) -> None:
    """Tiles 0 to 2 for sums, 3 to 5 for bytes of x, 6 for codes; the setting goes to room[i:]."""
    setting = room[i : i + 16].view(np.uint8)
    setting[:] = 0
    setting[0] = 1  # the only palette there is; then bytes to a row, and rows, of each tile
    for n in range(7):
        setting[16 + 2 * n] = depth if 3 <= n < 6 else DEPTH
        setting[48 + n] = depth // 4 if n == 6 else ROWS
    _configure(room, i)


@compiled
def _unpack(codes: Any, tile: int, n_in: int, words: Any, i: int) -> None:
    """A tile of codes of 4 bits as bytes: of each word first the even codes, then the odd ones."""
    for j in range(n_in // 8):
        at = (tile * n_in // 8 + j) * LANES
        prefetch(codes, at + AHEAD // 4)
        packed = load(codes, at)
        store(words, i + 2 * j * LANES, to_bytes(packed, 0))
        store(words, i + (2 * j + 1) * LANES, to_bytes(packed, 1))


@compiled
def _add_up(
    digits: Any, i: int, words: Any, wi: int, group: int, depth: int, whole: Any, at: int
) -> None:
    """Whole sums of a group for 16 rows and 16 outputs, [3, 16, 16] to whole[at] on."""
    _zero(0)
    _zero(1)
    _zero(2)
    size = ROWS * depth
    for k in range(0, group, depth):
        a, w = i + k * PARTS * ROWS, wi + k // 4 * LANES
        _load(6, words, w, 4 * LANES)
        _load(3, digits, a, depth)
        _dot(0, 3, 6)
        _load(4, digits, a + size, depth)
        _dot(1, 4, 6)
        _load(5, digits, a + 2 * size, depth)
        _dot(2, 5, 6)
    _store(0, whole, at, 64)
    _store(1, whole, at + SQUARE, 64)
    _store(2, whole, at + 2 * SQUARE, 64)


@compiled
def _scale(
    whole: Any, at: int, scale: Any, count: int, y: Any, yi: int, y_width: int, fresh: bool
) -> None:
    """y += scale · the sums of a group, for `count` rows and 16 outputs."""
    for r in range(count):
        low = to_floats(load(whole, at + r * ROWS))
        middle = to_floats(load(whole, at + SQUARE + r * ROWS))
        high = to_floats(load(whole, at + 2 * SQUARE + r * ROWS))
        whole_sum = (high * splat(2.0**8) + middle) * splat(2.0**8) + low
        j = yi + r * y_width
        store(y, j, whole_sum * scale if fresh else load(y, j) + whole_sum * scale)


@compiled
def _multiply_rows(
    codes: Any, scales: Any, offsets: Any, bits: int, tile: int, n_in: int, group: int, x: Any,
    rows: int, first: int, last: int, y: Any, y_width: int, room: Any,
) -> None:  # fmt: skip
    """Rows first to last of 16 outputs of y = x·W; x is what `cut` made of `rows` rows.

    In y there is room up to a whole block of rows after the last.
    """
    groups, depth = n_in // group, min(group, DEPTH)
    padded = (rows + ROWS - 1) // ROWS * ROWS
    digits, whole = x.view(np.int8), room.view(np.int32)
    factors = x[PARTS * padded * n_in // 4 :]
    words, base = codes, tile * n_in // 4 * LANES
    if bits == 4:
        words, base = room.view(np.uint32), ROOM
        _unpack(codes, tile, n_in, words, base)
    _set_up(room, 0, depth)
    s = tile * groups * LANES
    for row in range(first, last, ROWS):
        count, yi = min(ROWS, last - row), row * y_width + tile * LANES
        # The sums of one group are scaled while the tiles work at the next.
        for g in range(groups + 1):
            if g < groups:
                k = g * group
                i, wi = row * n_in * PARTS + k * PARTS * ROWS, base + k // 4 * LANES
                if row == first and bits == 8:
                    for line in range(wi + AHEAD // 4, wi + (AHEAD + group * LANES) // 4, LANES):
                        prefetch(words, line)
                _add_up(digits, i, words, wi, group, depth, whole, g % 2 * PARTS * SQUARE)
            if g > 0:
                at, scale = (g - 1) % 2 * PARTS * SQUARE, load(scales, s + (g - 1) * LANES)
                _scale(whole, at, scale, count, y, yi, y_width, g == 1)
        for r in range(count):
            j = yi + r * y_width
            store(y, j, load(y, j) * spread(factors, row + r))
        for r in range(0, count, BLOCK):
            outer_4x1(factors, padded + (row + r) * groups, offsets, s, LANES, groups, y,
                      yi + r * y_width, y_width, False)  # fmt: skip
    _release()


@compiled
def _nothing(
    codes: Any, scales: Any, offsets: Any, bits: int, tile: int, n_in: int, group: int, x: Any,
    rows: int, first: int, last: int, y: Any, y_width: int, room: Any,
) -> None:  # fmt: skip
    """Where there is no such unit the compiler knows no tiles; nobody calls this."""


multiply = _multiply_rows if COMPILED else _nothing
