"""The interpreter: a whole forward pass, or one product, in one compiled call.

`run_program` executes a program (see `../interface/instructions.py`) on rows: the new tokens of B
sequences, one sequence after the other. LINEAR and ATTENTION have stages, with a barrier between
them. `_run_stage` computes one thread's share of a stage. Each thread of a run is in `join_runs`,
which calls the code of `run_program` by its address: threads serve all variants of the code.
`../machine_code.py` compiles both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.interface.cpu_features import HAS_AMX
from gptx.backends.cpu.interface.instructions import (
    ATTENTION,
    EMBED,
    FLOAT32,
    FORMAT,
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
from gptx.backends.cpu.interface.run_words import (
    COUNTER_START,
    MAILBOX_WORDS,
    N_INSTRUCTIONS,
    PROGRAM_CODE,
    RUN_WORDS,
    THREADS,
    WORKERS,
    is_serial,
)
from gptx.backends.cpu.interface.sizes import PANEL_OUTPUTS, QUERIES, TILE_ROWS
from gptx.backends.cpu.interface.variant import HAS_FLOAT16_CACHE, HAS_FLOATS
from gptx.backends.cpu.kernels.amx.attention import pack_head
from gptx.backends.cpu.kernels.amx.attention import prompt_attention as amx_prompt_attention
from gptx.backends.cpu.kernels.amx.linear import prepare_amx, run_amx, uses_amx
from gptx.backends.cpu.kernels.arguments import (
    AttentionTask,
    LinearTask,
    Run,
)
from gptx.backends.cpu.kernels.attention import (
    convert_head,
    decode_attention,
    prompt_attention,
)
from gptx.backends.cpu.kernels.barrier import split_range, wait_at_barrier
from gptx.backends.cpu.kernels.compilation import (
    I8,
    I32,
    I64,
    compiled,
    float16_array,
    float_array,
    inlined,
    int_array,
    to_int64,
)
from gptx.backends.cpu.kernels.elementwise import embed_tokens
from gptx.backends.cpu.kernels.linear import (
    prepare_gemm,
    run_gemm,
    run_gemv,
    sum_partial_results,
)
from gptx.backends.cpu.kernels.mailbox import post_run, read_run, wait_for_run
from gptx.backends.cpu.kernels.simd import load, store, store_scalar

cache_array = float16_array if HAS_FLOAT16_CACHE else float_array
_is_serial = inlined(is_serial)


# ATTENTION


@inlined
def _cache_start(task: AttentionTask, b: int, head: int) -> int:
    """Return where the cache of a head of sequence b begins."""
    return (task.slots[b] * task.H + head) * task.capacity * task.D


@inlined
def _write_cache(task: AttentionTask, thread: int, threads: int) -> None:
    """Copy the keys and values of the new tokens to the cache, for a share of rows and heads."""
    x, keys, values, positions = task.x, task.keys, task.values, task.positions
    first_rows, H, D = task.first_rows, task.H, task.D
    first, last = split_range(task.rows * H, thread, threads)
    for b in range(task.B):
        for n in range(first_rows[b], first_rows[b + 1]):
            for head in range(max(first - n * H, 0), min(last - n * H, H)):
                i = _cache_start(task, b, head) + positions[n] * D
                j = n * task.x_width + head * D
                for d in range(0, D - 15, 16):
                    store(keys, i + d, load(x, j + H * D + d))
                    store(values, i + d, load(x, j + 2 * H * D + d))
                for d in range(D // 16 * 16, D):
                    store_scalar(keys, i + d, x[j + H * D + d])
                    store_scalar(values, i + d, x[j + 2 * H * D + d])


@inlined
def _count_blocks(task: AttentionTask, b: int, single: bool) -> int:
    """Return the blocks of rows of a sequence; 0 unless it has a single row, or `single` is off."""
    rows = task.first_rows[b + 1] - task.first_rows[b]
    return (rows + QUERIES - 1) // QUERIES if (rows == 1) == single else 0


@inlined
def _read_blocks(task: AttentionTask, b: int, amx: bool, first: int, last: int) -> None:
    """Compute attention for blocks [first, last) of a sequence, one head after the other."""
    first_row, end = task.first_rows[b], task.first_rows[b + 1]
    rows = end - first_row
    on_amx = HAS_AMX and amx and rows >= TILE_ROWS and task.D % PANEL_OUTPUTS == 0
    blocks = (rows + QUERIES - 1) // QUERIES
    length = 0
    for item in range(first, last):
        head, n = item // blocks, first_row + item % blocks * QUERIES
        cache_start, count = _cache_start(task, b, head), min(QUERIES, end - n)
        if rows == 1:
            decode_attention(task, head, cache_start, n)
            continue
        if n == first_row or item == first:
            n_keys = task.positions[end - 1] + 1
            if HAS_AMX and on_amx:
                length = pack_head(task, cache_start, n_keys)
            elif HAS_FLOAT16_CACHE:
                convert_head(task, cache_start, n_keys)
        if not on_amx:
            prompt_attention(task, head, cache_start, n, count)
        elif HAS_AMX:
            amx_prompt_attention(task, head, length, n, count)


@inlined
def _read_cache(task: AttentionTask, amx: bool, single: bool, thread: int, threads: int) -> None:
    """Compute attention for a share of the heads and, in each, of the blocks of rows.

    `single` selects the sequences with a single row, else the others: a block of them takes longer.
    """
    n_blocks = 0
    for b in range(task.B):
        n_blocks += task.H * _count_blocks(task, b, single)
    first, last = split_range(n_blocks, thread, threads)
    start = 0
    for b in range(task.B):
        end = start + task.H * _count_blocks(task, b, single)
        if start < last and first < end:
            _read_blocks(task, b, amx, max(first, start) - start, min(last, end) - start)
        start = end


@inlined
def _run_attention(task: AttentionTask, stage: int, amx: bool, thread: int, threads: int) -> None:
    """Run one stage of ATTENTION.

    With one new token to a sequence a thread reads the heads that it has written, in one stage.
    """
    if stage == 0:
        _write_cache(task, thread, threads)
    if stage == 1 or task.rows == task.B:
        _read_cache(task, amx, True, thread, threads)
        _read_cache(task, amx, False, thread, threads)


# The program


@compiled
def _run_stage(op: Any, stage: int, run: Run, thread: int, threads: int) -> None:
    """Compute one thread's share of one stage of an instruction."""
    B, H, D = run.B, run.H, run.D
    rows = B if op[LAST_ONLY] else run.rows
    padded_rows = run.rows + TILE_ROWS
    x_width, y_width = op[SOURCE_WIDTH], op[TARGET_WIDTH]
    x = float_array(run.buffers[op[SOURCE]], padded_rows * x_width)
    y = float_array(run.buffers[op[TARGET]], padded_rows * y_width)
    residual = float_array(run.buffers[max(op[RESIDUAL], 0)], padded_rows * y_width)
    linear = LinearTask(
        op, x, y, residual, rows, run.first_rows, run.prepared, run.workspace, thread, threads
    )
    if op[INSTRUCTION] == EMBED:
        embed_tokens(op, run.tokens, run.positions, y)
    elif op[INSTRUCTION] == ATTENTION:
        k, v = run.keys[op[LAYER]], run.values[op[LAYER]]
        size, scale = B * H * run.capacity * D, np.float32(op.view(np.float64)[SCALE])
        keys, values = cache_array(k, size), cache_array(v, size)
        task = AttentionTask(
            x, x_width, y, y_width, run.positions, run.first_rows, run.slots, keys, values,
            run.rows, B, H, D, run.capacity, scale, run.workspace[thread],
        )  # fmt: skip
        _run_attention(task, stage, run.amx, thread, threads)
    elif rows == 1 and stage == 0:
        run_gemv(linear)
    elif rows == 1:
        if HAS_FLOATS:
            sum_partial_results(linear)
    elif HAS_AMX and run.amx and uses_amx(op, rows):
        if stage == 0:
            prepare_amx(linear)
        else:
            run_amx(linear)
    elif stage == 0:
        prepare_gemm(linear)
    else:
        run_gemm(linear)


@compiled
def _count_stages(op: Any, run: Run) -> int:
    """Return the number of stages of an instruction."""
    rows = run.B if op[LAST_ONLY] else run.rows
    if op[INSTRUCTION] == EMBED or (op[INSTRUCTION] == ATTENTION and run.rows == run.B):
        return 1
    return 2 if op[INSTRUCTION] == ATTENTION or rows > 1 or op[FORMAT] == FLOAT32 else 1


@compiled
def run_program(address: int, first: int, last: int) -> None:
    """Compute the shares of threads [first, last) in the program of the mailbox at an address.

    One thread that computes all shares needs no barrier, and its results are the same bits.
    """
    mailbox = int_array(address, MAILBOX_WORDS)
    run = read_run(mailbox)
    target = mailbox[RUN_WORDS + COUNTER_START]
    for i in range(len(run.program)):
        op = run.program[i]
        threads = 1 if _is_serial(run.rows * op[WORK], run.threads) else run.threads
        for stage in range(_count_stages(op, run)):
            for thread in range(first, min(last, threads)):
                _run_stage(op, stage, run, thread, threads)
            if last - first < run.threads:
                target += run.threads
                wait_at_barrier(mailbox, target)


@intrinsic
def _call_program(context: Any, code: Any, address: Any, first: Any, last: Any) -> Any:
    """Call the machine code of `run_program`, in Numba's calling convention."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = I8.as_pointer()
        kind = ir.FunctionType(I32, [pointer.as_pointer(), pointer.as_pointer(), I64, I64, I64])
        with builder.goto_entry_block():
            result, error = builder.alloca(pointer), builder.alloca(pointer)
        numbers = (
            to_int64(context, builder, value, kind)
            for value, kind in zip(args[1:], sig.args[1:], strict=True)
        )
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [result, error, *numbers])
        return context.get_dummy_value()

    return types.void(code, address, first, last), generate


@compiled
def join_runs(address: int, thread: int) -> None:
    """Execute the run in the mailbox as thread 0, or each run that is posted, as a worker."""
    mailbox = int_array(address, MAILBOX_WORDS)
    while True:
        if thread > 0:
            wait_for_run(mailbox, thread)
        else:
            post_run(mailbox)
        words = mailbox[RUN_WORDS:]
        last = thread + 1 if words[WORKERS] > 0 else words[THREADS]
        if words[N_INSTRUCTIONS] > 0:
            _call_program(words[PROGRAM_CODE], address, thread, last)
        if thread == 0:
            return
