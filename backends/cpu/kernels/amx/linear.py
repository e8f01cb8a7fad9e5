"""LINEAR for several rows on Intel's matrix unit, AMX: what one thread does.

Floats take one way and codes another, `amx_floats.py` and `amx_codes.py`. Either cuts the rows
once for all the outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptx.backends.cpu.kernels.amx import bf16x3 as amx_floats
from gptx.backends.cpu.kernels.amx import quantized_linear as amx_codes
from gptx.backends.cpu.kernels.amx.bf16x3 import PANEL_SIZE, PARTS, ROWS_SIZE, STEP
from gptx.backends.cpu.kernels.amx.tile_unit import ROWS, release, set_up
from gptx.backends.cpu.kernels.gemm import TILE, expand_floats
from gptx.backends.cpu.kernels.instructions import (
    FORMAT,
    GROUP,
    INT8,
    MATRIX,
    N_IN,
    N_OUT,
    SCALES,
    SOURCE_WIDTH,
    STEPS,
    TABLE,
    TARGET_WIDTH,
    WEIGHT,
    finish,
    inlined,
    norm_row,
    share,
)
from gptx.backends.cpu.kernels.simd import float_array, word_array

DEPTH = 64  # inputs of a panel of floats: 24 KB
MANY = 64  # rows from which on floats go here: for fewer, vectors read the matrix faster
CHUNK = 256  # rows that share a panel of floats

# A thread's room for floats: a panel, and what it is cut from at the end of a matrix.
EDGE = DEPTH * PANEL_SIZE
ROOM = EDGE + DEPTH * TILE


def size_of_rows(rows: int, n_in: int) -> int:
    """Numbers that rows take that are cut."""
    return -(-rows // ROWS) * ROWS * n_in * PARTS // 2


@inlined
def fits(op: Any, rows: int) -> bool:
    """Whether this is for the unit."""
    if op[FORMAT] == MATRIX:
        return rows >= MANY and op[N_IN] % STEP == 0
    return op[FORMAT] != TABLE


@inlined
def cut_rows(
    op: Any, x: Any, rows: int, step: int, normed: Any, room: Any, t: int, threads: int
) -> None:
    """The norm of a share of the rows, cut."""
    n_in, padded = op[N_IN], (rows + ROWS - 1) // ROWS * ROWS
    first, last = share(rows, t, threads)
    for row in range(first, last):
        norm_row(op, x, ((row + 1) * step - 1) * op[SOURCE_WIDTH], room, 0, 1)
        if op[FORMAT] == MATRIX:
            amx_floats.cut_row(room, n_in, normed.view(np.uint32), row)
        else:
            bits = 8 if op[FORMAT] == INT8 else 4
            amx_codes.cut(room, n_in, op[GROUP], bits, normed, row, padded)


@inlined
def multiply_floats(
    op: Any, rows: int, normed: Any, y: Any, residual: Any, room: Any, t: int, threads: int
) -> None:
    """A share of the outputs of several rows and, if there are many, of those: some inputs for all
    of them, then the next."""
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    w = float_array(op[WEIGHT], n_in * (n_out + TILE))
    x, panel, edge = normed.view(np.uint32), room.view(np.uint32), room[EDGE:]
    chunks, tiles = (rows + CHUNK - 1) // CHUNK, (n_out + TILE - 1) // TILE
    first, last = share(tiles * chunks, t, threads)
    set_up(room)
    for chunk in range(chunks):
        here, there = max(first - chunk * tiles, 0), min(last - chunk * tiles, tiles)
        begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, rows)
        for k in range(0, n_in, DEPTH):
            depth = min(DEPTH, n_in - k)
            for tile in range(here, there):
                if (tile + 1) * TILE <= n_out:
                    amx_floats.cut_panel(w, k * n_out + tile * TILE, n_out, depth, panel, 0)
                else:
                    expand_floats(w, n_out, tile, k, depth, edge)
                    amx_floats.cut_panel(edge, 0, TILE, depth, panel, 0)
                for row in range(begin, end, ROWS):
                    xi, yi = (row // ROWS * n_in + k) * ROWS_SIZE, row * width + tile * TILE
                    amx_floats.multiply(x, xi, panel, 0, depth, y, yi, width, k == 0)
        for row in range(begin, end):
            for tile in range(here, there):
                finish(op, y, row * width, tile * TILE, (tile + 1) * TILE, residual)
    release()


@inlined
def multiply_codes(
    op: Any, rows: int, normed: Any, y: Any, residual: Any, room: Any, t: int, threads: int
) -> None:
    """The same for codes, one panel after the other."""
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    size, bits = n_in * (n_out + TILE), 8 if op[FORMAT] == INT8 else 4
    codes = word_array(op[WEIGHT], size)
    scales, steps = word_array(op[SCALES], size), op[STEPS]
    chunks, tiles = (rows + amx_codes.CHUNK - 1) // amx_codes.CHUNK, (n_out + TILE - 1) // TILE
    first, last = share(tiles * chunks, t, threads)
    for task in range(first, last):
        chunk, tile = task // tiles, task % tiles
        begin, end = chunk * amx_codes.CHUNK, min((chunk + 1) * amx_codes.CHUNK, rows)
        amx_codes.multiply(codes, scales, steps, bits, tile, n_in, op[GROUP], normed, rows, begin,
                           end, y, width, room)  # fmt: skip
        for row in range(begin, end):
            finish(op, y, row * width, tile * TILE, (tile + 1) * TILE, residual)
