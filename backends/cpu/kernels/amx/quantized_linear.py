"""Products of quantized weights with several rows on Intel's matrix unit, AMX.

The unit multiplies tiles of bytes, too, 16 x 64 by 64 x 16 at once, and adds in whole numbers.
Codes are bytes already, and a row of x is cut into three rows of bytes (`fixed_point.py`), which
lie side by side: 16 rows are three tiles, and 5 are one. The sums are made floats and are scaled.

Without this unit, panels of floats do the same (`numpy_products.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
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
    release,
    set_up,
    zero,
)
from gptx.backends.cpu.kernels.fixed_point import PARTS, digits, measure
from gptx.backends.cpu.kernels.gemm import BLOCK, TILE, outer_4x1
from gptx.backends.cpu.kernels.group_scales import scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    AHEAD,
    FLOATS,
    INTS,
    LANES,
    compiled,
    floats,
    get,
    int64,
    load,
    nearest,
    prefetch,
    put,
    splat,
    spread,
    store,
    to_bytes,
    vectors,
)

COLUMNS = TILE // LANES  # tiles of outputs that are multiplied at once
WHOLE = COLUMNS * PARTS * SQUARE  # numbers of their sums
SUMS = WHOLE + TILE * 128 // 4  # where, in room to work in, they are added up; between, codes
CHUNK = 128  # rows at once, at most
ROOM = SUMS + CHUNK * TILE
GROUPS = ROOM // LANES  # whose offsets go there at once, when the sums are done


@compiled
def cut(row: Any, n_in: int, group: int, bits: int, x: Any, n: int, rows: int) -> None:
    """Put a row [I] of floats into x as row n of `rows`: its bytes, its factor, its sums.

    x holds tiles of bytes, [rows / 16, I / depth, 16, 3, depth], factors [rows] and the sums of the
    groups, [rows / 4, G, 4]. In codes of 4 bits the even inputs of a word come before the odd ones,
    and so they do here.
    """
    first, depth = PARTS * rows * n_in // 4, min(group, DEPTH)
    sums = x[first + rows + n // BLOCK * BLOCK * (n_in // group) + n % BLOCK :]
    factor, inverse = measure(row, n_in, group, sums, BLOCK)
    x[first + n] = factor
    grow = splat(inverse)
    tiles, i = x.view(np.int8), PARTS * (n // ROWS * n_in * ROWS + n % ROWS * depth)
    for k in range(0, n_in, depth):
        for j in range(0, depth, LANES):
            at = i + k * PARTS * ROWS + j
            digits(tiles, at, depth, nearest(load(row, k + j) * grow), bits)


@compiled
def _unpack(codes: Any, first: int, group: int, words: Any, i: int) -> None:
    """Codes of 4 bits as bytes: of each word first the even codes, then the odd ones."""
    for j in range(0, group // 8 * LANES, LANES):
        prefetch(codes, first + j + AHEAD // 4)
        packed = load(codes, first + j)
        store(words, i + 2 * j, to_bytes(packed, 0))
        store(words, i + 2 * j + LANES, to_bytes(packed, 1))


def _instructions(count: int) -> tuple[Any, Any, Any]:
    """Make what is done with so many tiles of bytes, up to three."""

    @intrinsic
    def fetch(context: Any, x: Any, i: Any, depth: Any) -> Any:
        """They, of so many inputs, to tiles 3 to 5."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first = place(context, builder, sig.args[:2], args[:2])
            depth = int64(context, builder, args[2], sig.args[2])
            for n in range(count):
                here = builder.gep(first, [builder.mul(depth, I64(ROWS * n))])
                instruction(builder, "tileloadd64", 3 + n, here, depth)
            return context.get_dummy_value()

        return types.void(x, i, depth), generate

    @intrinsic
    def add_up(context: Any, words: Any, i: Any) -> Any:
        """Add to tiles 0 to 2 the products of tiles 3 to 5 with codes of 16 outputs."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            here = place(context, builder, sig.args, args)
            instruction(builder, "tileloadd64", 6, here, I64(DEPTH))
            for n in range(count):
                instruction(builder, "tdpbsud", n, 3 + n, 6)  # x signed, codes not
            return context.get_dummy_value()

        return types.void(words, i), generate

    @intrinsic
    def unload(context: Any, whole: Any, i: Any) -> Any:
        """QuantizedWeight 0 to 2, one after the other."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first = place(context, builder, sig.args, args)
            for n in range(count):
                here = builder.gep(first, [I64(4 * SQUARE * n)])
                instruction(builder, "tilestored64", n, here, I64(DEPTH))
            return context.get_dummy_value()

        return types.void(whole, i), generate

    return fetch, add_up, unload


@intrinsic
def _join(context: Any, low: Any, middle: Any, high: Any) -> Any:
    """low + 2**8 middle + 2**16 high of ints, as floats."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        low, middle, high = args
        middle = builder.shl(middle, ir.Constant(INTS, [8] * LANES))
        low = builder.sitofp(builder.add(low, middle), FLOATS)
        high = builder.fmul(builder.sitofp(high, FLOATS), ir.Constant(FLOATS, [2.0**16] * LANES))
        return builder.fadd(high, low, flags=("contract",))

    return floats(low, middle, high), generate


def _group(count: int) -> Callable[..., None]:
    """Make whole sums of a group for so many tiles of bytes and 64 outputs."""
    fetch, add_up, unload = _instructions(count)

    @compiled
    def multiply_group(
        digits: Any, i: int, words: Any, wi: int, apart: int, group: int, depth: int, whole: Any
    ) -> None:
        """Sums [4, 16, 3, 16]; the codes of 16 outputs begin at wi and every `apart` words."""
        for c in range(COLUMNS):
            zero(count)
            for k in range(0, group, depth):
                if c == 0 or depth < group:
                    fetch(digits, i + k * PARTS * ROWS, depth)
                add_up(words, wi + c * apart + k // 4 * LANES)
            unload(whole, c * PARTS * SQUARE)

    return multiply_group


_multiply_1, _multiply_2, _multiply_3 = _group(1), _group(2), _group(3)


@compiled
def _add_scaled(whole: Any, i: int, rows: int, scale: Any, sums: Any, j: int, fresh: bool) -> None:
    """scale · whole sums [rows, 3, 16] for rows of 16 outputs, in rows of 64; added, or fresh."""
    for r in range(rows):
        k, n = i + r * PARTS * LANES, j + r * TILE
        z = _join(load(whole, k), load(whole, k + LANES), load(whole, k + 2 * LANES)) * scale
        store(sums, n, z if fresh else load(sums, n) + z)


@compiled
def multiply(
    codes: Any, scales: Any, steps: int, bits: int, tile: int, n_in: int, group: int, x: Any,
    rows: int, first: int, last: int, y: Any, y_width: int, room: Any,
) -> None:  # fmt: skip
    """Rows first to last of 64 outputs of y = x·W; x is what `cut` made of `rows` rows.

    In y there is room up to a whole block of rows after the last.
    """
    groups, depth = n_in // group, min(group, DEPTH)
    padded = (rows + ROWS - 1) // ROWS * ROWS
    digits, whole, unpacked = x.view(np.int8), room.view(np.int32), room.view(np.uint32)
    factors, part = x[PARTS * padded * n_in // 4 :], tile * COLUMNS
    scale_of = vectors(COLUMNS)
    set_up(room, depth)
    for g in range(groups):
        words, wi, apart = codes, (part * n_in + g * group) // 4 * LANES, n_in // 4 * LANES
        if bits == 8:
            for c in range(COLUMNS):
                for line in range(wi + c * apart, wi + c * apart + group // 4 * LANES, LANES):
                    prefetch(codes, line + AHEAD // 4)
        else:
            words, wi, apart = unpacked, WHOLE, group // 4 * LANES
            for c in range(COLUMNS):
                here = ((part + c) * n_in + g * group) // 8 * LANES
                _unpack(codes, here, group, unpacked, WHOLE + c * apart)
        for c in range(COLUMNS):
            put(scale_of, c, scale_and_offset(scales, (part + c) * groups + g, steps)[0])
        for row in range(first, last, ROWS):
            i, count = (row * n_in + g * group * ROWS) * PARTS, min(ROWS, last - row)
            if count > ROWS * 2 // PARTS:
                _multiply_3(digits, i, words, wi, apart, group, depth, whole)
            elif count > ROWS // PARTS:
                _multiply_2(digits, i, words, wi, apart, group, depth, whole)
            else:
                _multiply_1(digits, i, words, wi, apart, group, depth, whole)
            sums = SUMS + (row - first) * TILE
            for c in range(COLUMNS):
                _add_scaled(whole, c * PARTS * SQUARE, count, get(scale_of, c), room,
                            sums + c * LANES, g == 0)  # fmt: skip
    release()
    for row in range(first, last):
        factor, j = spread(factors, row), row * y_width + tile * TILE
        i = SUMS + (row - first) * TILE
        for c in range(0, TILE, LANES):
            store(y, j + c, load(room, i + c) * factor)
    for c in range(COLUMNS):
        for begin in range(0, groups, GROUPS):
            count = min(GROUPS, groups - begin)
            for g in range(count):
                n = (part + c) * groups + begin + g
                store(room, g * LANES, scale_and_offset(scales, n, steps)[1])
            for row in range(first, last, BLOCK):
                outer_4x1(factors, padded + row * groups + begin * BLOCK, room, 0, LANES, count, y,
                          row * y_width + tile * TILE + c * LANES, y_width, False)  # fmt: skip
