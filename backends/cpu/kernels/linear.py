"""LINEAR for the NumPy backend's kernels: what one thread does, on vectors."""

from __future__ import annotations

from typing import Any

from gptx.backends.cpu.kernels import gemm as numpy_products
from gptx.backends.cpu.kernels import vnni
from gptx.backends.cpu.kernels.gemm import (
    BLOCK,
    TILE,
    dots_1x1,
    dots_1x4,
    dots_4x1,
    dots_4x4,
    expand_floats,
    outer_4x4,
    shrink_row,
    times_rows,
)
from gptx.backends.cpu.kernels.instructions import (
    FORMAT,
    GROUP,
    INT4,
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
    expand,
    finish,
    inlined,
    norm_row,
    share,
)
from gptx.backends.cpu.kernels.simd import (
    LANES,
    float_array,
    load,
    prefetch_once,
    splat,
    store,
    word_array,
)

DEPTH = 128  # inputs of a panel: 128 x 64 floats are 32 KB
CHUNK = 32  # blocks of rows that share a panel
PART = 16  # inputs of a panel for few rows: about as many streams as a processor follows
FEW = 64  # rows up to which the threads may share the inputs of a float matrix

# One row times codes: in bytes if the processor has that, else in floats.
by_bytes = vnni.COMPILED
prepare_row = vnni.cut_row if by_bytes else shrink_row
times_int8 = vnni.times_int8 if by_bytes else numpy_products.times_int8
times_int4 = vnni.times_int4 if by_bytes else numpy_products.times_int4


@inlined
def prepare_one(op: Any, x: Any, xi: int, normed: Any) -> None:
    """The norm of one row, as the product wants it. Each thread for itself: that takes less time
    than waiting for another."""
    n_in, group = op[N_IN], op[GROUP]
    norm_row(op, x, xi, normed, 0, 1)
    if op[FORMAT] == INT8:
        prepare_row(normed, n_in, group, 8)
    elif op[FORMAT] == INT4:
        prepare_row(normed, n_in, group, 4)


@inlined
def multiply_one(
    op: Any, normed: Any, y: Any, residual: Any, work: Any, t: int, threads: int
) -> None:
    """A share of the outputs of one row, or of a float matrix's inputs."""
    n_in, n_out, group = op[N_IN], op[N_OUT], op[GROUP]
    tiles, size = (n_out + TILE - 1) // TILE, n_in * (n_out + TILE)
    if op[FORMAT] == TABLE:
        w = float_array(op[WEIGHT], size)
        first, last = share(n_out // 4, t, threads)
        for o in range(first * 4, last * 4, 4):
            dots_1x4(normed, 0, w, o * n_in, n_in, y, o, 0, 1, False)
        for o in range(n_out if t < threads - 1 else n_out // 4 * 4, n_out):
            dots_1x1(normed, 0, w, o * n_in, n_in, y, o, 0, 1, False)
    elif op[FORMAT] == MATRIX:
        # Whole rows, since that is how they lie; `add_parts` adds what the threads have.
        first, last = share(n_in, t, threads)
        times_rows(float_array(op[WEIGHT], size), normed, first, last, n_out, work[t])
    else:
        scales, steps = word_array(op[SCALES], size), op[STEPS]
        codes = word_array(op[WEIGHT], size)
        first, last = share(tiles * TILE // LANES, t, threads)
        for tile in range(first, last):
            if op[FORMAT] == INT8:
                times_int8(codes, scales, steps, normed, tile, n_in, group, y)
            else:
                times_int4(codes, scales, steps, normed, tile, n_in, group, y)
            finish(op, y, 0, tile * LANES, (tile + 1) * LANES, residual)


@inlined
def add_parts(op: Any, rows: int, y: Any, residual: Any, work: Any, t: int, threads: int) -> None:
    """For a share of the outputs, the sum of what the threads made of a float matrix's inputs."""
    width = op[TARGET_WIDTH]
    first, last = share((op[N_OUT] + TILE - 1) // TILE, t, threads)
    for row in range(rows):
        for tile in range(first, last):
            for j in range(row * width + tile * TILE, row * width + (tile + 1) * TILE, LANES):
                s = splat(0.0)
                for part in range(threads):
                    s += load(work[part], j)
                store(y, j, s)
            finish(op, y, row * width, tile * TILE, (tile + 1) * TILE, residual)


@inlined
def prepare_rows(op: Any, x: Any, rows: int, step: int, normed: Any, t: int, threads: int) -> None:
    """The norm of a share of the rows; for `outer`, the rows of a block side by side."""
    n_in = op[N_IN]
    first, last = share((rows + BLOCK - 1) // BLOCK, t, threads)
    for row in range(first * BLOCK, last * BLOCK):
        i = ((min(row, rows - 1) + 1) * step - 1) * op[SOURCE_WIDTH]  # the last one fills up
        if op[FORMAT] == TABLE:
            norm_row(op, x, i, normed, row * n_in, 1)
        else:
            norm_row(op, x, i, normed, row // BLOCK * BLOCK * n_in + row % BLOCK, BLOCK)


@inlined
def shares_inputs(op: Any, rows: int, threads: int) -> bool:
    """Whether each thread takes some of the inputs, for all the outputs: as long as the sums of all
    threads are small beside the matrix."""
    few = rows <= FEW and rows * threads * 8 <= op[N_IN]
    return op[FORMAT] == MATRIX and (rows == 1 or few)


@inlined
def multiply_few(op: Any, rows: int, normed: Any, room: Any, t: int, threads: int) -> None:
    """A share of the inputs of few rows and a float matrix, for `add_parts`.

    So a thread reads whole rows of the matrix, as they lie, some of them side by side. While a
    panel of those is multiplied with one block of rows after the other, the panel below it comes.
    """
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    w = float_array(op[WEIGHT], n_in * (n_out + TILE))
    blocks, tiles = (rows + BLOCK - 1) // BLOCK, (n_out + TILE - 1) // TILE
    panel = room[blocks * BLOCK * width :]
    first, last = share(n_in, t, threads)
    for k in range(first, last, PART):
        depth = min(PART, last - k)
        for tile in range(tiles):
            expand_floats(w, n_out, tile, k, depth, panel)
            for block in range(blocks):
                for i in range(PART * block // blocks, PART * (block + 1) // blocks):
                    for c in range(4):
                        prefetch_once(w, (k + PART + i) * n_out + tile * TILE + LANES * c)
                xi, yi = (block * n_in + k) * BLOCK, block * BLOCK * width + tile * TILE
                outer_4x4(normed, xi, panel, 0, TILE, depth, room, yi, width, k == first)


@inlined
def _multiply_floats(
    op: Any, rows: int, normed: Any, y: Any, residual: Any, room: Any, t: int, threads: int
) -> None:
    """A share of the outputs of several rows and a float matrix: some inputs for all of them, then
    the next. So the matrix is read along a few of its rows at a time, as memory likes it."""
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    w = float_array(op[WEIGHT], n_in * (n_out + TILE))
    blocks = (rows + BLOCK - 1) // BLOCK
    chunks, tiles = (blocks + CHUNK - 1) // CHUNK, (n_out + TILE - 1) // TILE
    first, last = share(tiles * chunks, t, threads)
    for chunk in range(chunks):
        here, there = max(first - chunk * tiles, 0), min(last - chunk * tiles, tiles)
        begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, blocks)
        for k in range(0, n_in, DEPTH):
            depth = min(DEPTH, n_in - k)
            for tile in range(here, there):
                expand_floats(w, n_out, tile, k, depth, room)
                for block in range(begin, end):
                    xi = block * BLOCK * n_in + k * BLOCK
                    yi = block * BLOCK * width + tile * TILE
                    outer_4x4(normed, xi, room, 0, TILE, depth, y, yi, width, k == 0)
        for row in range(begin * BLOCK, min(end * BLOCK, rows)):
            for tile in range(here, there):
                finish(op, y, row * width, tile * TILE, (tile + 1) * TILE, residual)


@inlined
def multiply_rows(
    op: Any, rows: int, normed: Any, y: Any, residual: Any, room: Any, t: int, threads: int
) -> None:
    """A share of the outputs of several rows and, if there are many, of those."""
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    if op[FORMAT] == TABLE:
        w = float_array(op[WEIGHT], n_in * n_out)
        first, last = share(n_out // 4, t, threads)
        for o in range(first * 4, last * 4, 4):
            for row in range(0, rows, BLOCK):
                yi = row * width + o
                dots_4x4(normed, row * n_in, w, o * n_in, n_in, y, yi, width, 1, row == 0)
        for o in range(n_out if t < threads - 1 else n_out // 4 * 4, n_out):
            for row in range(0, rows, BLOCK):
                yi = row * width + o
                dots_4x1(normed, row * n_in, w, o * n_in, n_in, y, yi, width, 1, row == 0)
        return
    if op[FORMAT] == MATRIX:
        _multiply_floats(op, rows, normed, y, residual, room, t, threads)
        return
    blocks = (rows + BLOCK - 1) // BLOCK
    chunks, tiles = (blocks + CHUNK - 1) // CHUNK, (n_out + TILE - 1) // TILE
    first, last = share(tiles * chunks, t, threads)
    for task in range(first, last):
        chunk, tile = task // tiles, task % tiles
        begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, blocks)
        for k in range(0, n_in, DEPTH):
            depth = min(DEPTH, n_in - k)
            expand(op, tile, k, depth, room)
            for block in range(begin, end):
                xi = block * BLOCK * n_in + k * BLOCK
                yi = block * BLOCK * width + tile * TILE
                outer_4x4(normed, xi, room, 0, TILE, depth, y, yi, width, k == 0)
        for row in range(begin * BLOCK, min(end * BLOCK, rows)):
            finish(op, y, row * width, tile * TILE, (tile + 1) * TILE, residual)
