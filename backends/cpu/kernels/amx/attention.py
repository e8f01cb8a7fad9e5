"""Attention of one head on Intel's matrix unit, AMX, by one thread; see `amx_floats.py`.

Keys and values are cut once for all rows of a head. Then 16 rows at a time go through three passes:
their products with the keys, the softmax, and its products with the values.

Room to work in is flat: 64 x 64 numbers, then what was cut of keys, of values, of queries and of
the softmax, and the products with the keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.kernels.amx import tile_unit as amx
from gptx.backends.cpu.kernels.amx.bf16x3 import (
    PANEL_SIZE,
    ROWS_SIZE,
    STEP,
    cut_panel,
    cut_row,
    multiply,
    put_parts,
)
from gptx.backends.cpu.kernels.amx.tile_unit import ROWS, SQUARE
from gptx.backends.cpu.kernels.gemm import TILE
from gptx.backends.cpu.kernels.simd import (
    I32,
    INTS,
    LANES,
    compiled,
    exp,
    get,
    largest,
    load,
    maximum,
    put,
    splat,
    store,
    total,
    vectors,
)

BLOCK_SIZE = TILE * TILE
SUMS = ROWS * TILE  # where those of the softmax are; before them, 16 rows of the result


@intrinsic
def _transpose(context: Any, room: Any) -> Any:
    """Lane i of vector j, of 16 `vectors`, becomes lane j of vector i."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = [builder.gep(args[0], [I32(n)]) for n in range(LANES)]
        rows = [builder.load(place) for place in places]
        for size in (1, 2, 4, 8):  # of what is exchanged, across the diagonal of twice its size
            mine = [i if not i & size else LANES + i - size for i in range(LANES)]
            other = [i + size if not i & size else LANES + i for i in range(LANES)]
            old = rows.copy()
            for n in range(LANES):
                pair = old[n & ~size], old[n | size]
                lanes = ir.Constant(INTS, other if n & size else mine)
                rows[n] = builder.shuffle_vector(*pair, lanes)
        for place, row in zip(places, rows, strict=True):
            builder.store(row, place)
        return context.get_dummy_value()

    return types.void(room), generate


def room_for(D: int, positions: int) -> int:
    """Numbers that a head needs to work in."""
    length = -(-positions // TILE) * TILE
    cut = ROWS_SIZE * (D + length) + 2 * D * length // TILE * PANEL_SIZE
    return BLOCK_SIZE + cut + ROWS * length


@compiled
def _places(D: int, length: int) -> tuple[int, int, int, int]:
    """Where in the room values, queries, softmax and products begin."""
    values = BLOCK_SIZE + D * length // TILE * PANEL_SIZE
    queries = values + D * length // TILE * PANEL_SIZE
    weights = queries + D * ROWS_SIZE
    return values, queries, weights, weights + length * ROWS_SIZE


@compiled
def _copy(source: Any, i: int, D: int, count: int, square: Any) -> None:
    """64 numbers each of `count` rows, and zeros up to 64 rows."""
    for r in range(TILE):
        for j in range(0, TILE, LANES):
            x = load(source, i + r * D + j) if r < count else splat(0.0)
            store(square, r * TILE + j, x)


@compiled
def transpose_square(square: Any) -> None:
    """Exchange the rows and columns of 64 x 64 numbers."""
    for i in range(0, TILE, LANES):
        for j in range(0, i + 1, LANES):
            above, below = vectors(LANES), vectors(LANES)
            for r in range(LANES):
                put(above, r, load(square, (i + r) * TILE + j))
                put(below, r, load(square, (j + r) * TILE + i))
            _transpose(above)
            _transpose(below)
            for r in range(LANES):
                store(square, (j + r) * TILE + i, get(above, r))
                store(square, (i + r) * TILE + j, get(below, r))


@compiled
def cut_head(keys: Any, values: Any, ki: int, D: int, seen: int, work: Any) -> int:
    """Cut the first keys and values [seen, D] of a head, filled up with zeros to whole panels.

    Returns how many there are then.
    """
    length = (seen + TILE - 1) // TILE * TILE
    words, at = work.view(np.uint32), _places(D, length)[0]
    for s in range(0, seen, TILE):
        count = min(TILE, seen - s)
        for d in range(0, D, TILE):
            first = ki + s * D + d
            _copy(keys, first, D, count, work)
            transpose_square(work)
            here = BLOCK_SIZE + (s // TILE * D + d) * PANEL_SIZE
            cut_panel(work, 0, TILE, TILE, words, here)
            _copy(values, first, D, count, work)
            here = at + (d // TILE * length + s) * PANEL_SIZE
            cut_panel(work, 0, TILE, TILE, words, here)
    return length


@compiled
def _softmax(row: Any, seen: int, end: int, words: Any, i: int) -> float:
    """Cut exp(row - its largest number) of the first `seen` numbers; up to `end` there are zeros.

    Returns their sum.
    """
    for s in range(seen, end):
        row[s] = -np.inf
    top, sums = splat(-np.inf), splat(0.0)
    for s in range(0, end, LANES):
        top = maximum(top, load(row, s))
    top = splat(largest(top))
    for s in range(0, end, STEP):
        a, b = exp(load(row, s) - top), exp(load(row, s + LANES) - top)
        sums += a + b
        put_parts(a, b, words, i + s * ROWS_SIZE, SQUARE)
    return total(sums)


@compiled
def attend_16(
    x: Any, x_width: int, first: int, count: int, head: int, D: int, index: Any, length: int,
    scale: float, y: Any, y_width: int, work: Any,
) -> None:  # fmt: skip
    """Rows `first` to `first + count`, at most 16, over what `cut_head` has made."""
    values, queries, weights, products = _places(D, length)
    words = work.view(np.uint32)
    seen = 0
    for r in range(count):
        i = (first + r) * x_width + head * D
        for d in range(D):
            work[d] = x[i + d] * scale
        cut_row(work, D, words[queries:], r)
        seen = max(seen, index[first + r] + 1)
    amx.set_up(work)
    for s in range(0, seen, TILE):
        here = BLOCK_SIZE + s // TILE * D * PANEL_SIZE
        multiply(words, queries, words, here, D, work, products + s, length, True)
    end = (seen + STEP - 1) // STEP * STEP
    for r in range(count):
        row = work[products + r * length :]
        work[SUMS + r] = _softmax(row, index[first + r] + 1, end, words, weights + r * LANES)
    for d in range(0, D, TILE):
        here = values + d // TILE * length * PANEL_SIZE
        multiply(words, weights, words, here, end, work, 0, TILE, True)
        for r in range(count):
            factor = splat(np.float32(1) / work[SUMS + r])
            i = (first + r) * y_width + head * D + d
            for j in range(0, TILE, LANES):
                store(y, i + j, load(work, r * TILE + j) * factor)
    amx.release()
