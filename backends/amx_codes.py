"""Products of quantized weights with several rows on Intel's matrix unit, AMX.

The unit multiplies tiles of bytes, too, 16 x 64 by 64 x 16 at once, and adds in whole numbers.
Codes are bytes already, and the rows of x are cut into three (`fixed_point.py`): a product takes
three tile instructions a group. Then the sum is made a float and is scaled.

Without this unit, panels of floats do the same (`numpy_products.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from gptx.backends.amx import (
    COMPILED,
    DEPTH,
    I64,
    ROWS,
    SQUARE,
    instruction,
    place,
    release,
    set_up,
    zero,
)
from gptx.backends.fixed_point import PARTS, digits, measure
from gptx.backends.numpy_products import AHEAD, BLOCK, compiled, outer_4x1
from gptx.backends.simd import (
    LANES,
    int64,
    load,
    nearest,
    prefetch,
    splat,
    spread,
    store,
    to_bytes,
    to_floats,
)

ROOM = 2 * PARTS * SQUARE  # numbers that `multiply` needs, and 4 for each input


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
def _unpack(codes: Any, tile: int, n_in: int, words: Any, i: int) -> None:
    """A tile of codes of 4 bits as bytes: of each word first the even codes, then the odd ones."""
    for j in range(n_in // 8):
        at = (tile * n_in // 8 + j) * LANES
        prefetch(codes, at + AHEAD // 4)
        packed = load(codes, at)
        store(words, i + 2 * j * LANES, to_bytes(packed, 0))
        store(words, i + (2 * j + 1) * LANES, to_bytes(packed, 1))


@intrinsic
def _step(context: Any, x: Any, xi: Any, depth: Any, w: Any, wi: Any) -> Any:
    """Add to tiles 0 to 2 the products of the three bytes of 16 rows, of so many inputs, and 16
    outputs."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        first = place(context, builder, sig.args[:2], args[:2])
        depth = int64(context, builder, args[2], sig.args[2])
        codes = place(context, builder, sig.args[3:], args[3:])
        instruction(builder, "tileloadd64", 6, codes, I64(DEPTH))
        for part in range(PARTS):
            here = builder.gep(first, [builder.mul(depth, I64(ROWS * part))])
            instruction(builder, "tileloadd64", 3 + part, here, depth)
            instruction(builder, "tdpbsud", part, 3 + part, 6)  # x signed, codes not
        return context.get_dummy_value()

    return types.void(x, xi, depth, w, wi), generate


@intrinsic
def _put(context: Any, whole: Any, i: Any) -> Any:
    """Tiles 0 to 2, one after the other."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        first = place(context, builder, sig.args, args)
        for part in range(PARTS):
            here = builder.gep(first, [I64(4 * SQUARE * part)])
            instruction(builder, "tilestored64", part, here, I64(DEPTH))
        return context.get_dummy_value()

    return types.void(whole, i), generate


@compiled
def _add_up(
    digits: Any, i: int, words: Any, wi: int, group: int, depth: int, whole: Any, at: int
) -> None:
    """Whole sums of a group for 16 rows and 16 outputs, [3, 16, 16] to whole[at] on."""
    zero()
    for k in range(0, group, depth):
        _step(digits, i + k * PARTS * ROWS, depth, words, wi + k // 4 * LANES)
    _put(whole, at)


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
    set_up(room, depth)
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
    release()


@compiled
def _nothing(
    codes: Any, scales: Any, offsets: Any, bits: int, tile: int, n_in: int, group: int, x: Any,
    rows: int, first: int, last: int, y: Any, y_width: int, room: Any,
) -> None:  # fmt: skip
    """Where there is no such unit the compiler knows no tiles; nobody calls this."""


multiply = _multiply_rows if COMPILED else _nothing
