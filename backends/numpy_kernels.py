"""The NumPy backend's kernels, in Numba: a whole forward pass in one compiled call.

`run` reads a program (see `numpy_program.py`). Rows are the N = B·T new tokens. LINEAR and
ATTENTION go through stages, between which the threads wait for each other. A stage says what thread
t does; `_everywhere` is the only parallel loop there is.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange

from gptx.backends import numpy_products, vnni
from gptx.backends.amx import ROWS as AMX_ROWS
from gptx.backends.amx import cut, multiply
from gptx.backends.numpy_attend import attend_1, attend_4
from gptx.backends.numpy_products import (
    BLOCK,
    TILE,
    compiled,
    dots_1x1,
    dots_1x4,
    dots_4x1,
    dots_4x4,
    expand_floats,
    outer_4x4,
    shrink_row,
    times_rows,
)
from gptx.backends.numpy_program import (
    ATTENTION,
    EMBED,
    FORMAT,
    GROUP,
    INT4,
    INT8,
    KIND,
    LAST,
    LAYER,
    LINEAR,
    MATRIX,
    N_IN,
    N_OUT,
    OFFSETS,
    RESIDUAL,
    SCALE,
    SCALES,
    SOURCE,
    SOURCE_WIDTH,
    TABLE,
    TARGET,
    TARGET_WIDTH,
    WEIGHT,
    WORK,
    embed,
    expand,
    finish,
    inlined,
    norm_row,
)
from gptx.backends.processor import HALF
from gptx.backends.simd import (
    FAST,
    float_array,
    half_array,
    load,
    put_number,
    splat,
    store,
    word_array,
)

LITTLE = 2**18  # multiplications that are done before another thread has begun
DEPTH = 128  # inputs of a panel: 128 x 64 floats are 32 KB
CHUNK = 32  # blocks of rows that share a panel

# Keys and values in float16, if the processor converts them.
cached_half = half_array if HALF else float_array

# One row times codes: in bytes if the processor has that, else in floats.
by_bytes = vnni.COMPILED
prepare_row = vnni.cut_row if by_bytes else shrink_row
times_int8 = vnni.times_int8 if by_bytes else numpy_products.times_int8
times_int4 = vnni.times_int4 if by_bytes else numpy_products.times_int4


@compiled
def _share(n: int, t: int, threads: int) -> tuple[int, int]:
    """From where to where, of n, is thread t's part."""
    return n * t // threads, n * (t + 1) // threads


# LINEAR


@inlined
def _prepare_row(op: Any, x: Any, xi: int, normed: Any) -> None:
    """The norm of one row, as the product wants it. Each thread for itself: that takes less time
    than waiting for another."""
    n_in, group = op[N_IN], op[GROUP]
    norm_row(op, x, xi, normed, 0, 1)
    if op[FORMAT] == INT8:
        prepare_row(normed, n_in, group, 8)
    elif op[FORMAT] == INT4:
        prepare_row(normed, n_in, group, 4)


@inlined
def _multiply_row(
    op: Any, normed: Any, y: Any, residual: Any, work: Any, t: int, threads: int
) -> None:
    """A share of the outputs of one row, or of a float matrix's inputs."""
    n_in, n_out, group = op[N_IN], op[N_OUT], op[GROUP]
    tiles, size = (n_out + TILE - 1) // TILE, n_in * (n_out + TILE)
    if op[FORMAT] == TABLE:
        w = float_array(op[WEIGHT], size)
        first, last = _share(n_out // 4, t, threads)
        for o in range(first * 4, last * 4, 4):
            dots_1x4(normed, 0, w, o * n_in, n_in, y, o, 0, 1)
        for o in range(n_out if t < threads - 1 else n_out // 4 * 4, n_out):
            dots_1x1(normed, 0, w, o * n_in, n_in, y, o, 0, 1)
    elif op[FORMAT] == MATRIX:
        # Whole rows, since that is how they lie; `_add_row` adds what the threads have.
        first, last = _share(n_in, t, threads)
        times_rows(float_array(op[WEIGHT], size), normed, first, last, n_out, work[t])
    else:
        scales, offsets = float_array(op[SCALES], size), float_array(op[OFFSETS], size)
        first, last = _share(tiles, t, threads)
        codes = word_array(op[WEIGHT], size)
        for tile in range(first, last):
            if op[FORMAT] == INT8:
                times_int8(codes, scales, offsets, normed, tile, n_in, group, y)
            else:
                times_int4(codes, scales, offsets, normed, tile, n_in, group, y)
            finish(op, y, 0, tile, residual)


@inlined
def _add_row(op: Any, y: Any, residual: Any, work: Any, t: int, threads: int) -> None:
    """For a share of the outputs, the sum of what the threads made of a float matrix's inputs."""
    first, last = _share((op[N_OUT] + TILE - 1) // TILE, t, threads)
    for tile in range(first, last):
        for j in range(tile * TILE, tile * TILE + TILE, 16):
            s = splat(0.0)
            for part in range(threads):
                s += load(work[part], j)
            store(y, j, s)
        finish(op, y, 0, tile, residual)


@inlined
def _prepare_rows(
    op: Any, x: Any, rows: int, step: int, normed: Any, amx: bool, room: Any, t: int, threads: int
) -> None:
    """The norm of a share of the rows; for `outer`, the rows of a block side by side."""
    n_in = op[N_IN]
    if amx:
        padded = (rows + AMX_ROWS - 1) // AMX_ROWS * AMX_ROWS
        first, last = _share(rows, t, threads)
        for row in range(first, last):
            norm_row(op, x, ((row + 1) * step - 1) * op[SOURCE_WIDTH], room, 0, 1)
            cut(room, n_in, op[GROUP], 8 if op[FORMAT] == INT8 else 4, normed, row, padded)
        return
    first, last = _share((rows + BLOCK - 1) // BLOCK, t, threads)
    for row in range(first * BLOCK, last * BLOCK):
        i = ((min(row, rows - 1) + 1) * step - 1) * op[SOURCE_WIDTH]  # the last one fills up
        if op[FORMAT] == TABLE:
            norm_row(op, x, i, normed, row * n_in, 1)
        else:
            norm_row(op, x, i, normed, row // BLOCK * BLOCK * n_in + row % BLOCK, BLOCK)


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
    first, last = _share(tiles * chunks, t, threads)
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
                finish(op, y, row * width, tile, residual)


@inlined
def _multiply_rows(
    op: Any, rows: int, normed: Any, y: Any, residual: Any, amx: bool, room: Any, t: int,
    threads: int,
) -> None:  # fmt: skip
    """A share of the outputs of several rows and, if there are many, of those."""
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    size = n_in * (n_out + TILE)
    if op[FORMAT] == TABLE:
        w = float_array(op[WEIGHT], n_in * n_out)
        first, last = _share(n_out // 4, t, threads)
        for o in range(first * 4, last * 4, 4):
            for row in range(0, rows, BLOCK):
                dots_4x4(normed, row * n_in, w, o * n_in, n_in, y, row * width + o, width, 1)
        for o in range(n_out if t < threads - 1 else n_out // 4 * 4, n_out):
            for row in range(0, rows, BLOCK):
                dots_4x1(normed, row * n_in, w, o * n_in, n_in, y, row * width + o, width, 1)
        return
    if op[FORMAT] == MATRIX:
        _multiply_floats(op, rows, normed, y, residual, room, t, threads)
        return
    blocks = (rows + BLOCK - 1) // BLOCK
    chunks, tiles = (blocks + CHUNK - 1) // CHUNK, (n_out + TILE - 1) // TILE
    first, last = _share(tiles * chunks, t, threads)
    for task in range(first, last):
        chunk, tile = task // tiles, task % tiles
        begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, blocks)
        if amx:
            codes, bits = word_array(op[WEIGHT], size), 8 if op[FORMAT] == INT8 else 4
            scales, offsets = float_array(op[SCALES], size), float_array(op[OFFSETS], size)
            for part in range(4 * tile, 4 * tile + 4):
                multiply(codes, scales, offsets, bits, part, n_in, op[GROUP], normed, rows,
                         begin * BLOCK, min(end * BLOCK, rows), y, width, room)  # fmt: skip
        else:
            for k in range(0, n_in, DEPTH):
                depth = min(DEPTH, n_in - k)
                expand(op, tile, k, depth, room)
                for block in range(begin, end):
                    xi = block * BLOCK * n_in + k * BLOCK
                    yi = block * BLOCK * width + tile * TILE
                    outer_4x4(normed, xi, room, 0, TILE, depth, y, yi, width, k == 0)
        for row in range(begin * BLOCK, min(end * BLOCK, rows)):
            finish(op, y, row * width, tile, residual)


# ATTENTION


@inlined
def _write(
    op: Any, x: Any, index: Any, keys: Any, values: Any, shape: Any, t: int, threads: int
) -> None:
    """Keys and values of a share of the new tokens into the cache."""
    B, T, H, D, room = shape
    first, last = _share(B * T, t, threads)
    for n in range(first, last):
        for h in range(H):
            i = ((n // T * H + h) * room + index[n]) * D
            j = n * op[SOURCE_WIDTH] + h * D
            for d in range(0, D - 15, 16):
                store(keys, i + d, load(x, j + H * D + d))
                store(values, i + d, load(x, j + 2 * H * D + d))
            for d in range(D // 16 * 16, D):
                put_number(keys, i + d, x[j + H * D + d])
                put_number(values, i + d, x[j + 2 * H * D + d])


@inlined
def _attention(
    op: Any, stage: int, x: Any, y: Any, index: Any, keys: Any, values: Any, shape: Any, work: Any,
    t: int, threads: int,
) -> None:  # fmt: skip
    """First what is new goes into the cache, then heads read it."""
    if stage == 0:
        _write(op, x, index, keys, values, shape, t, threads)
    else:
        _read(op, x, y, index, keys, values, shape, work, t, threads)


@inlined
def _read(
    op: Any, x: Any, y: Any, index: Any, keys: Any, values: Any, shape: Any, work: Any, t: int,
    threads: int,
) -> None:  # fmt: skip
    """A share of the heads, and of each the blocks of rows."""
    B, T, H, D, room = shape
    x_width, y_width = op[SOURCE_WIDTH], op[TARGET_WIDTH]
    scale = np.float32(op.view(np.float64)[SCALE])
    size = 1 if T == 1 else BLOCK
    blocks = (T + size - 1) // size
    first, last = _share(B * H * blocks, t, threads)
    for task in range(first, last):
        head, row = task // blocks, task % blocks * size
        count, n, ki = min(size, T - row), head // H * T + row, head * room * D
        if T == 1:
            attend_1(x, x_width, n, count, head % H, D, index, keys, values, ki, scale, y,
                      y_width, work)  # fmt: skip
        else:
            attend_4(x, x_width, n, count, head % H, D, index, keys, values, ki, scale, y,
                      y_width, work)  # fmt: skip


# The program


@compiled
def _part(
    op: Any, stage: int, buffers: Any, index: Any, keys: Any, values: Any, shape: Any, normed: Any,
    work: Any, amx: bool, half: bool, t: int, threads: int,
) -> None:  # fmt: skip
    """What thread t does in one stage of LINEAR or ATTENTION."""
    B, T, H, D, room = shape
    step = T if op[LAST] else 1
    rows = B * T // step
    padded = B * T + BLOCK
    x = float_array(buffers[op[SOURCE]], padded * op[SOURCE_WIDTH])
    y = float_array(buffers[op[TARGET]], padded * op[TARGET_WIDTH])
    residual = float_array(buffers[max(op[RESIDUAL], 0)], padded * op[TARGET_WIDTH])
    if op[KIND] == ATTENTION:
        k, v, size = keys[op[LAYER]], values[op[LAYER]], B * H * room * D
        if half:
            k16, v16 = cached_half(k, size), cached_half(v, size)
            _attention(op, stage, x, y, index, k16, v16, shape, work[t], t, threads)
        else:
            k32, v32 = float_array(k, size), float_array(v, size)
            _attention(op, stage, x, y, index, k32, v32, shape, work[t], t, threads)
    elif rows > 1:
        codes = amx and (op[FORMAT] == INT8 or op[FORMAT] == INT4)
        if stage == 0:
            _prepare_rows(op, x, rows, step, normed, codes, work[t], t, threads)
        else:
            _multiply_rows(op, rows, normed, y, residual, codes, work[t], t, threads)
    elif stage == 0:
        own = normed[t * (len(normed) // threads) :]
        _prepare_row(op, x, (step - 1) * op[SOURCE_WIDTH], own)
        _multiply_row(op, own, y, residual, work, t, threads)
    else:
        _add_row(op, y, residual, work, t, threads)


@njit(parallel=True, fastmath=FAST, error_model="numpy")
def _everywhere(
    op: Any, stage: int, buffers: Any, index: Any, keys: Any, values: Any, shape: Any, normed: Any,
    work: Any, amx: bool, half: bool, threads: int,
) -> None:  # fmt: skip
    for t in prange(threads):
        _part(op, stage, buffers, index, keys, values, shape, normed, work, amx, half, t, threads)


def _runner(sources: int) -> Any:
    """Make `run`. To see whether what it has cached is still right, Numba looks at the file of a
    function and at what it closes over: the checksum of all these files."""

    def run(
        program: Any, buffers: Any, tokens: Any, index: Any, keys: Any, values: Any, shape: Any,
        normed: Any, work: Any, amx: bool, half: bool, threads: int,
    ) -> None:  # fmt: skip
        """Run a program on tokens and positions [B·T].

        `buffers` are the addresses of the activations, `keys` and `values` those of a layer's
        [B, H, room, D], `shape` is (B, T, H, D, room); `normed` and `work` [threads, ...] are room
        to work in; `amx` is whether there is that unit (see `amx.py`), `half` whether keys and
        values are float16.
        """
        if sources < 0:  # it never is
            return
        B, T = shape[0], shape[1]
        for i in range(len(program)):
            op = program[i]
            if op[KIND] == EMBED:
                y = float_array(buffers[op[TARGET]], B * T * op[TARGET_WIDTH])
                embed(op, tokens, index, y)
                continue
            one_row = op[KIND] == LINEAR and B == 1 and (T == 1 or op[LAST] == 1)
            alone = threads == 1 or B * T * op[WORK] < LITTLE
            for stage in range(1 if one_row and op[FORMAT] != MATRIX else 2):
                if alone:
                    _part(op, stage, buffers, index, keys, values, shape, normed, work, amx, half,
                          0, 1)  # fmt: skip
                else:
                    _everywhere(op, stage, buffers, index, keys, values, shape, normed, work, amx,
                                half, threads)  # fmt: skip

    options = {"fastmath": FAST, "error_model": "numpy", "nogil": True}
    try:
        return njit(cache=True, **options)(run)
    except RuntimeError:  # no folder can be written
        return njit(**options)(run)


COMPILED = """
amx fixed_point numpy_attend numpy_kernels numpy_products numpy_program simd vnni
"""
FILES = [Path(__file__).with_name(f"{name}.py") for name in COMPILED.split()]
run = _runner(zlib.crc32(b"".join(path.read_bytes() for path in FILES)))
