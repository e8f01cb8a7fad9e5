"""The interpreter: a whole forward pass, or one product, in one compiled call.

`run_program` executes a program (see `instructions.py`) on N = B·T rows, the new tokens. LINEAR and
ATTENTION have stages, with a barrier between them. `_run_stage` computes one thread's share of a
stage. Each thread of a run calls `_run_threads` for a whole program.
"""

from __future__ import annotations

import sys
import zlib
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numba.core import event as events

from gptx.backends.cpu.kernels.amx.attention import pack_head
from gptx.backends.cpu.kernels.amx.attention import prompt_attention as amx_prompt_attention
from gptx.backends.cpu.kernels.amx.linear import prepare_amx, run_amx, uses_amx
from gptx.backends.cpu.kernels.amx.tile_unit import TILE_ROWS
from gptx.backends.cpu.kernels.arguments import (
    PANEL_OUTPUTS,
    AttentionTask,
    LinearTask,
    Run,
)
from gptx.backends.cpu.kernels.attention import (
    QUERIES,
    convert_head,
    decode_attention,
    prompt_attention,
)
from gptx.backends.cpu.kernels.barrier import split_range, wait_at_barrier
from gptx.backends.cpu.kernels.compilation import (
    FAST_MATH,
    compiled,
    float16_array,
    float_array,
    inlined,
)
from gptx.backends.cpu.kernels.cpu_features import HAS_FLOAT16
from gptx.backends.cpu.kernels.elementwise import embed_tokens
from gptx.backends.cpu.kernels.instructions import (
    ATTENTION,
    EMBED,
    INSTRUCTION,
    LAST_ONLY,
    LAYER,
    RESIDUAL,
    SCALE,
    SOURCE,
    SOURCE_WIDTH,
    TARGET,
    TARGET_WIDTH,
    WORK,
)
from gptx.backends.cpu.kernels.linear import (
    prepare_gemm,
    run_gemm,
    run_gemv,
    run_split_gemm,
    splits_inputs,
    sum_partial_results,
)
from gptx.backends.cpu.kernels.mailbox import (
    COUNTER_START,
    RUN_WORDS,
    WORKERS,
    post_run,
    read_run,
    wait_for_run,
)
from gptx.backends.cpu.kernels.simd import load, store, store_scalar
from gptx.file_lock import lock

MIN_WORK_PER_THREAD = 2**14  # multiplications that take about as long as a barrier

# A processor that does not convert float16 never has such a cache; LLVM could not link it.
cache_array = float16_array if HAS_FLOAT16 else float_array


def is_serial(work: int, threads: int) -> bool:
    """Return True if one thread does `work` multiplications faster than `threads` threads."""
    return work < MIN_WORK_PER_THREAD * threads


_is_serial = inlined(is_serial)


# ATTENTION


@inlined
def _write_cache(task: AttentionTask, B: int, thread: int, threads: int) -> None:
    """Copy the keys and values of the new tokens to the cache, for a share of the heads."""
    x, keys, values, positions, D = task.x, task.keys, task.values, task.positions, task.D
    first, last = split_range(B * task.H, thread, threads)
    for head in range(first, last):
        for n in range(head // task.H * task.T, (head // task.H + 1) * task.T):
            i = (head * task.capacity + positions[n]) * D
            j = n * task.x_width + head % task.H * D
            for d in range(0, D - 15, 16):
                store(keys, i + d, load(x, j + task.H * D + d))
                store(values, i + d, load(x, j + 2 * task.H * D + d))
            for d in range(D // 16 * 16, D):
                store_scalar(keys, i + d, x[j + task.H * D + d])
                store_scalar(values, i + d, x[j + 2 * task.H * D + d])


@inlined
def _read_cache(task: AttentionTask, B: int, amx: bool, thread: int, threads: int) -> None:
    """Compute attention for a share of the heads and, in each, of the blocks of rows."""
    T, H, D = task.T, task.H, task.D
    on_amx = amx and T >= TILE_ROWS and D % PANEL_OUTPUTS == 0
    block_rows = TILE_ROWS if on_amx else 1 if T == 1 else QUERIES
    blocks = (T + block_rows - 1) // block_rows
    first, last = split_range(B * H * blocks, thread, threads)
    length = 0
    for item in range(first, last):
        head, row = item // blocks, item % blocks * block_rows
        n, count = head // H * T + row, min(block_rows, T - row)
        cache_start = head * task.capacity * D
        if T == 1:
            decode_attention(task, head % H, cache_start, n)
            continue
        if row == 0 or item == first:
            n_keys = task.positions[n - row : n - row + T].max() + 1
            if on_amx:
                length = pack_head(task, cache_start, n_keys)
            else:
                convert_head(task, cache_start, n_keys)
        if on_amx:
            amx_prompt_attention(task, head % H, length, n, count)
        else:
            prompt_attention(task, head % H, n, count)


@inlined
def _run_attention(
    task: AttentionTask, stage: int, B: int, amx: bool, thread: int, threads: int
) -> None:
    """Run one stage of ATTENTION.

    With one new token to a sequence a thread reads the heads that it has written, in one stage.
    """
    if stage == 0:
        _write_cache(task, B, thread, threads)
    if stage == 1 or task.T == 1:
        _read_cache(task, B, amx, thread, threads)


# The program


@compiled
def _run_stage(op: Any, stage: int, run: Run, thread: int, threads: int) -> None:
    """Compute one thread's share of one stage of an instruction."""
    B, T, H, D = run.B, run.T, run.H, run.D
    stride = T if op[LAST_ONLY] else 1
    rows = B * T // stride
    padded_rows = B * T + TILE_ROWS
    x_width, y_width = op[SOURCE_WIDTH], op[TARGET_WIDTH]
    x = float_array(run.buffers[op[SOURCE]], padded_rows * x_width)
    y = float_array(run.buffers[op[TARGET]], padded_rows * y_width)
    residual = float_array(run.buffers[max(op[RESIDUAL], 0)], padded_rows * y_width)
    linear = LinearTask(
        op, x, y, residual, rows, stride, run.prepared, run.workspace, thread, threads
    )
    if op[INSTRUCTION] == EMBED:
        embed_tokens(op, run.tokens, run.positions, y)
    elif op[INSTRUCTION] == ATTENTION:
        k, v = run.keys[op[LAYER]], run.values[op[LAYER]]
        size, scale = B * H * run.capacity * D, np.float32(op.view(np.float64)[SCALE])
        if run.float16:
            k16, v16 = cache_array(k, size), cache_array(v, size)
            task16 = AttentionTask(
                x, x_width, y, y_width, run.positions, k16, v16, T, H, D, run.capacity, scale,
                run.workspace[thread],
            )  # fmt: skip
            _run_attention(task16, stage, B, run.amx, thread, threads)
        else:
            k32, v32 = float_array(k, size), float_array(v, size)
            task32 = AttentionTask(
                x, x_width, y, y_width, run.positions, k32, v32, T, H, D, run.capacity, scale,
                run.workspace[thread],
            )  # fmt: skip
            _run_attention(task32, stage, B, run.amx, thread, threads)
    elif rows == 1 and stage == 0:
        run_gemv(linear)
    elif stage == (1 if rows == 1 else 2):
        sum_partial_results(linear)
    elif run.amx and uses_amx(op, rows):
        if stage == 0:
            prepare_amx(linear)
        else:
            run_amx(linear)
    elif stage == 0:
        prepare_gemm(linear)
    elif splits_inputs(op, rows, threads):
        run_split_gemm(linear)
    else:
        run_gemm(linear)


@compiled
def _count_stages(op: Any, run: Run, threads: int) -> int:
    """Return the number of stages of an instruction."""
    rows = run.B if op[LAST_ONLY] else run.B * run.T
    if op[INSTRUCTION] == EMBED or (op[INSTRUCTION] == ATTENTION and run.T == 1):
        return 1
    if op[INSTRUCTION] == ATTENTION:
        return 2
    if run.amx and rows > 1 and uses_amx(op, rows):
        return 2
    return (1 if rows == 1 else 2) + splits_inputs(op, rows, threads)


@inlined
def _run_threads(run: Run, mailbox: Any, first: int, last: int) -> None:
    """Compute the shares of threads [first, last) in the whole program.

    One thread that computes all shares needs no barrier, and its results are the same bits.
    """
    target = mailbox[RUN_WORDS + COUNTER_START]
    for i in range(len(run.program)):
        op = run.program[i]
        threads = 1 if _is_serial(run.B * run.T * op[WORK], run.threads) else run.threads
        for stage in range(_count_stages(op, run, threads)):
            for thread in range(first, min(last, threads)):
                _run_stage(op, stage, run, thread, threads)
            if last - first < run.threads:
                target += run.threads
                wait_at_barrier(mailbox, target)


def _make_run_program(sources_checksum: int) -> Any:
    """Make `run_program`, compiled once and cached on disk.

    To detect stale code, Numba compares the file of the function and the values that it closes
    over. With the checksum, these depend on all files of the kernels.
    """

    def run_program(mailbox: Any, thread: int) -> None:
        """Execute the run in the mailbox as thread 0, or each run that is posted, as a worker."""
        if sources_checksum < 0:  # never true; makes the function close over it
            return
        while True:
            if thread > 0:
                wait_for_run(mailbox, thread)
            else:
                post_run(mailbox)
            run = read_run(mailbox)
            last = thread + 1 if mailbox[RUN_WORDS + WORKERS] > 0 else run.threads
            _run_threads(run, mailbox, thread, last)
            if thread == 0:
                return

    options = {"fastmath": FAST_MATH, "error_model": "numpy", "nogil": True}
    try:
        return njit(cache=True, **options)(run_program)
    except RuntimeError:  # no cache folder is writable
        return njit(**options)(run_program)


def _compile_in_one_process(function: Any) -> None:
    """Let one process compile a function at a time; the others wait, then load its result."""
    compile = function.compile

    def compile_alone(signature: Any) -> Any:
        with ExitStack() as stack:
            with suppress(OSError):  # a folder that is read-only, for one
                stack.enter_context(lock(Path(function.stats.cache_path, "kernels.lock")))
            return compile(signature)

    function.compile = compile_alone


_files = sorted(Path(__file__).parent.rglob("*.py"))
run_program = _make_run_program(zlib.crc32(b"".join(path.read_bytes() for path in _files)))
if run_program.stats.cache_path:
    _compile_in_one_process(run_program)


class _CompilationNotice(events.Listener):
    """Prints a line to standard error when Numba compiles `run_program`."""

    def on_start(self, event: Any) -> None:
        if (event.data or {}).get("dispatcher") is run_program:
            print("gptx: compiling the kernels for this processor, once ...", file=sys.stderr)

    def on_end(self, event: Any) -> None:
        pass


events.register("numba:compile", _CompilationNotice())
