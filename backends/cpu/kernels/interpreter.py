"""The NumPy backend's kernels, in Numba: a whole forward pass in one compiled call.

`run` reads a program (see `numpy_program.py`). Rows are the N = B·T new tokens. LINEAR and
ATTENTION go through stages, between which the threads wait for each other. A stage says what thread
t does; `_everywhere` is the only parallel loop there is, around all of a program.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange
from numba.core import event as events

from gptx.backends.cpu.kernels.amx.attention import attend_16, cut_head
from gptx.backends.cpu.kernels.amx.linear import cut_rows, fits, multiply_codes, multiply_floats
from gptx.backends.cpu.kernels.amx.tile_unit import ROWS
from gptx.backends.cpu.kernels.attention import attend_1, attend_4
from gptx.backends.cpu.kernels.barrier import all_begin, meet
from gptx.backends.cpu.kernels.cpu_features import HALF
from gptx.backends.cpu.kernels.gemm import BLOCK, TILE
from gptx.backends.cpu.kernels.instructions import (
    ATTENTION,
    EMBED,
    FORMAT,
    KIND,
    LAST,
    LAYER,
    MATRIX,
    RESIDUAL,
    SCALE,
    SOURCE,
    SOURCE_WIDTH,
    TARGET,
    TARGET_WIDTH,
    WORK,
    embed,
    inlined,
    share,
)
from gptx.backends.cpu.kernels.linear import (
    add_parts,
    multiply_few,
    multiply_one,
    multiply_rows,
    prepare_one,
    prepare_rows,
    shares_inputs,
)
from gptx.backends.cpu.kernels.simd import (
    FAST,
    compiled,
    float_array,
    half_array,
    load,
    put_number,
    store,
)

LITTLE = 2**14  # multiplications that are done before threads have met

# Keys and values in float16, if the processor converts them.
cached_half = half_array if HALF else float_array


# ATTENTION


@inlined
def _write(
    op: Any, x: Any, index: Any, keys: Any, values: Any, shape: Any, t: int, threads: int
) -> None:
    """The new tokens' keys and values of a share of the heads into the cache."""
    B, T, H, D, room = shape
    first, last = share(B * H, t, threads)
    for head in range(first, last):
        for n in range(head // H * T, (head // H + 1) * T):
            i = (head * room + index[n]) * D
            j = n * op[SOURCE_WIDTH] + head % H * D
            for d in range(0, D - 15, 16):
                store(keys, i + d, load(x, j + H * D + d))
                store(values, i + d, load(x, j + 2 * H * D + d))
            for d in range(D // 16 * 16, D):
                put_number(keys, i + d, x[j + H * D + d])
                put_number(values, i + d, x[j + 2 * H * D + d])


@inlined
def _read(
    op: Any, x: Any, y: Any, index: Any, keys: Any, values: Any, shape: Any, work: Any, amx: bool,
    t: int, threads: int,
) -> None:  # fmt: skip
    """A share of the heads, and of each the blocks of rows."""
    B, T, H, D, room = shape
    x_width, y_width = op[SOURCE_WIDTH], op[TARGET_WIDTH]
    scale = np.float32(op.view(np.float64)[SCALE])
    squares = amx and T >= ROWS and D % TILE == 0
    size = ROWS if squares else 1 if T == 1 else BLOCK
    blocks = (T + size - 1) // size
    first, last = share(B * H * blocks, t, threads)
    length = 0
    for task in range(first, last):
        head, row = task // blocks, task % blocks * size
        count, n, ki = min(size, T - row), head // H * T + row, head * room * D
        if squares:
            if row == 0 or task == first:
                seen = index[n - row : n - row + T].max() + 1
                length = cut_head(keys, values, ki, D, seen, work)
            attend_16(x, x_width, n, count, head % H, D, index, length, scale, y, y_width, work)
        elif T == 1:
            attend_1(x, x_width, n, count, head % H, D, index, keys, values, ki, room, scale, y,
                     y_width, work)  # fmt: skip
        else:
            attend_4(x, x_width, n, count, head % H, D, index, keys, values, ki, room, scale, y,
                     y_width, work)  # fmt: skip


@inlined
def _attend(
    op: Any, stage: int, x: Any, y: Any, index: Any, keys: Any, values: Any, shape: Any, work: Any,
    amx: bool, t: int, threads: int,
) -> None:  # fmt: skip
    """One stage of ATTENTION. A thread reads the heads that it has written if there is one token to
    each; else the threads wait for each other in between."""
    one = shape[1] == 1
    if stage == 0:
        _write(op, x, index, keys, values, shape, t, threads)
    if stage == 1 or one:
        _read(op, x, y, index, keys, values, shape, work, amx, t, threads)


# The program


@compiled
def _part(
    op: Any, stage: int, buffers: Any, tokens: Any, index: Any, keys: Any, values: Any, shape: Any,
    normed: Any, work: Any, amx: bool, half: bool, t: int, threads: int,
) -> None:  # fmt: skip
    """What thread t does in one stage of an instruction."""
    B, T, H, D, room = shape
    step = T if op[LAST] else 1
    rows = B * T // step
    padded = B * T + ROWS
    x = float_array(buffers[op[SOURCE]], padded * op[SOURCE_WIDTH])
    y = float_array(buffers[op[TARGET]], padded * op[TARGET_WIDTH])
    residual = float_array(buffers[max(op[RESIDUAL], 0)], padded * op[TARGET_WIDTH])
    if op[KIND] == EMBED:
        embed(op, tokens, index, y)
    elif op[KIND] == ATTENTION:
        k, v, size = keys[op[LAYER]], values[op[LAYER]], B * H * room * D
        if half:
            k16, v16 = cached_half(k, size), cached_half(v, size)
            _attend(op, stage, x, y, index, k16, v16, shape, work[t], amx, t, threads)
        else:
            k32, v32 = float_array(k, size), float_array(v, size)
            _attend(op, stage, x, y, index, k32, v32, shape, work[t], amx, t, threads)
    elif rows == 1 and stage == 0:
        own = normed[t * (len(normed) // threads) :]
        prepare_one(op, x, (step - 1) * op[SOURCE_WIDTH], own)
        multiply_one(op, own, y, residual, work, t, threads)
    elif stage == (1 if rows == 1 else 2):
        add_parts(op, rows, y, residual, work, t, threads)
    elif amx and fits(op, rows):
        if stage == 0:
            cut_rows(op, x, rows, step, normed, work[t], t, threads)
        elif op[FORMAT] == MATRIX:
            multiply_floats(op, rows, normed, y, residual, work[t], t, threads)
        else:
            multiply_codes(op, rows, normed, y, residual, work[t], t, threads)
    elif stage == 0:
        prepare_rows(op, x, rows, step, normed, t, threads)
    elif shares_inputs(op, rows, threads):
        multiply_few(op, rows, normed, work[t], t, threads)
    else:
        multiply_rows(op, rows, normed, y, residual, work[t], t, threads)


@compiled
def _stages(op: Any, shape: Any, amx: bool, threads: int) -> int:
    """How many stages an instruction has."""
    B, T = shape[0], shape[1]
    rows = B if op[LAST] else B * T
    if op[KIND] == EMBED or (op[KIND] == ATTENTION and T == 1):
        return 1
    if op[KIND] == ATTENTION:
        return 2
    if amx and rows > 1 and fits(op, rows):
        return 2
    return (1 if rows == 1 else 2) + shares_inputs(op, rows, threads)


@inlined
def _is_little(work: int, threads: int) -> bool:
    """Whether one thread does so many multiplications by itself."""
    return work < LITTLE * threads


@inlined
def _parts(
    program: Any, buffers: Any, tokens: Any, index: Any, keys: Any, values: Any, shape: Any,
    normed: Any, work: Any, amx: bool, half: bool, counter: Any, first: int, last: int,
    threads: int,
) -> None:  # fmt: skip
    """A range of the threads' parts, from the first instruction to the last. Who does them all has
    nobody to wait for, and gets the very numbers that they would."""
    goal = threads  # of the counter: all have begun
    for i in range(len(program)):
        op = program[i]
        some = 1 if _is_little(shape[0] * shape[1] * op[WORK], threads) else threads
        for stage in range(_stages(op, shape, amx, some)):
            for t in range(first, min(last, some)):
                _part(op, stage, buffers, tokens, index, keys, values, shape, normed, work, amx,
                      half, t, some)  # fmt: skip
            if last - first < threads:
                goal += threads
                meet(counter, goal)


@njit(parallel=True, fastmath=FAST, error_model="numpy")
def _everywhere(
    program: Any, buffers: Any, tokens: Any, index: Any, keys: Any, values: Any, shape: Any,
    normed: Any, work: Any, amx: bool, half: bool, counter: Any, threads: int,
) -> None:  # fmt: skip
    for t in prange(threads):
        if all_begin(counter, threads):
            # An int64 here and below: for a uint64, or a constant, all would be compiled anew.
            first = np.int64(t)
            _parts(program, buffers, tokens, index, keys, values, shape, normed, work, amx, half,
                   counter, first, first + 1, threads)  # fmt: skip


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
        counter = np.zeros(1, np.int64)
        most = shape[0] * shape[1] * program[:, WORK].max()
        if threads > 1 and not _is_little(most, threads):
            _everywhere(program, buffers, tokens, index, keys, values, shape, normed, work, amx,
                        half, counter, threads)  # fmt: skip
        if counter[0] <= 0:  # not begun, or given up since not all threads came
            _parts(program, buffers, tokens, index, keys, values, shape, normed, work, amx, half,
                   counter, np.int64(0), threads, threads)  # fmt: skip

    options = {"fastmath": FAST, "error_model": "numpy", "nogil": True}
    try:
        return njit(cache=True, **options)(run)
    except RuntimeError:  # no folder can be written
        return njit(**options)(run)


_files = sorted(Path(__file__).parent.rglob("*.py"))
run = _runner(zlib.crc32(b"".join(path.read_bytes() for path in _files)))


class _Announcement(events.Listener):
    """Says on standard error that `run` is being compiled, when it is."""

    def on_start(self, event: Any) -> None:
        if (event.data or {}).get("dispatcher") is run:
            print("gptx: compiling the kernels for this processor, once ...", file=sys.stderr)

    def on_end(self, event: Any) -> None:
        pass


events.register("numba:compile", _Announcement())
