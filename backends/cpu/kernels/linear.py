"""The stages of LINEAR on vectors (AVX2, AVX-512, NEON, VNNI): one thread's share of each.

A GEMV has the stages `run_gemv` and, for a float matrix [I, O], `sum_partial_results`. A GEMM has
`prepare_gemm` and `run_gemm`. For up to `MAX_SPLIT_ROWS` rows and a float matrix, the threads split
the inputs (split-K): `prepare_gemm`, `run_split_gemm`, `sum_partial_results`.
"""

from __future__ import annotations

from typing import Any

from gptx.backends.cpu.kernels import gemv, gemv_vnni
from gptx.backends.cpu.kernels.arguments import (
    BLOCK_ROWS,
    PANEL_OUTPUTS,
    LinearTask,
    Matrix,
    quantized_matrix,
)
from gptx.backends.cpu.kernels.barrier import split_range
from gptx.backends.cpu.kernels.compilation import float_array, inlined
from gptx.backends.cpu.kernels.cpu_features import HAS_VNNI
from gptx.backends.cpu.kernels.elementwise import apply_epilogue, normalize_row
from gptx.backends.cpu.kernels.gemm import (
    dot_product_1x1,
    dot_product_1x4,
    dot_product_4x1,
    dot_product_4x4,
    expand_float32,
    expand_int4,
    expand_int8,
    outer_product_4x4,
)
from gptx.backends.cpu.kernels.instructions import (
    FLOAT32,
    FLOAT32_TRANSPOSED,
    FORMAT,
    GROUP_SIZE,
    INT4,
    INT8,
    N_IN,
    N_OUT,
    SOURCE_WIDTH,
    TARGET_WIDTH,
    WEIGHT,
)
from gptx.backends.cpu.kernels.simd import LANES, load, prefetch_l2, splat, store

PANEL_INPUTS = 128  # 128 x 64 floats are 32 KB
CHUNK_BLOCKS = 32  # blocks of rows that are multiplied by a panel while it is in the cache
SPLIT_PANEL_INPUTS = 16  # inputs of a panel of `run_split_gemm`: streams that the CPU prefetches
MAX_SPLIT_ROWS = 64  # rows up to which the threads may split the inputs of a float matrix

quantized_gemv = gemv_vnni if HAS_VNNI else gemv


@inlined
def splits_inputs(op: Any, rows: int, threads: int) -> bool:
    """Return True if each thread takes a share of the inputs, for all outputs.

    For more than one row the partial results of all threads must be small beside the matrix.
    """
    small = rows <= MAX_SPLIT_ROWS and rows * threads * 8 <= op[N_IN]
    return op[FORMAT] == FLOAT32 and (rows == 1 or small)


def workspace_size(rows: int, width: int) -> int:
    """Return the floats of a thread's workspace; `width` is that of the widest FLOAT32 target."""
    partial_rows = (min(rows, MAX_SPLIT_ROWS) + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
    return partial_rows * width + PANEL_INPUTS * PANEL_OUTPUTS


# GEMV


@inlined
def run_gemv(task: LinearTask) -> None:
    """Prepare the row, then compute a share of the outputs, or of the inputs of a FLOAT32 matrix.

    Each thread prepares a copy of the row, which takes less time than a barrier.
    """
    op, x, y = task.op, task.x, task.y
    n_in, n_out, group_size = op[N_IN], op[N_OUT], op[GROUP_SIZE]
    thread, threads = task.thread, task.threads
    size = n_in * (n_out + PANEL_OUTPUTS)
    row = task.prepared[thread * (len(task.prepared) // threads) :]
    normalize_row(op, x, (task.stride - 1) * op[SOURCE_WIDTH], row, 0, 1)
    if op[FORMAT] == FLOAT32_TRANSPOSED:
        w = float_array(op[WEIGHT], size)
        first, last = split_range(n_out // 4, thread, threads)
        for o in range(first * 4, last * 4, 4):
            dot_product_1x4(row, 0, w, o * n_in, n_in, Matrix(y, o, 0, 1), False)
        for o in range(n_out if thread < threads - 1 else n_out // 4 * 4, n_out):
            dot_product_1x1(row, 0, w, o * n_in, n_in, Matrix(y, o, 0, 1), False)
    elif op[FORMAT] == FLOAT32:
        first, last = split_range(n_in, thread, threads)
        w, partial = float_array(op[WEIGHT], size), task.workspace[thread]
        gemv.multiply_float32(w, row, first, last, n_out, partial)
    else:
        matrix = quantized_matrix(op)
        if op[FORMAT] == INT8:
            quantized_gemv.prepare_row(row, n_in, group_size, 8)
        elif op[FORMAT] == INT4:
            quantized_gemv.prepare_row(row, n_in, group_size, 4)
        strips = (n_out + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS * PANEL_OUTPUTS // LANES
        first, last = split_range(strips, thread, threads)
        if op[FORMAT] == INT8:
            quantized_gemv.multiply_int8(matrix, first, last, row, y)
        else:
            quantized_gemv.multiply_int4(matrix, first, last, row, y)
        apply_epilogue(op, y, 0, first * LANES, last * LANES, task.residual)


# GEMM


@inlined
def prepare_gemm(task: LinearTask) -> None:
    """Normalize a share of the rows, and pack each block of rows as [I, 4] for outer products.

    The last row fills up the last block. The rows of FLOAT32_TRANSPOSED stay [rows, I].
    """
    op, prepared, rows = task.op, task.prepared, task.rows
    n_in = op[N_IN]
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    first, last = split_range(blocks, task.thread, task.threads)
    for row in range(first * BLOCK_ROWS, last * BLOCK_ROWS):
        i = ((min(row, rows - 1) + 1) * task.stride - 1) * op[SOURCE_WIDTH]
        if op[FORMAT] == FLOAT32_TRANSPOSED:
            normalize_row(op, task.x, i, prepared, row * n_in, 1)
        else:
            block, r = row // BLOCK_ROWS, row % BLOCK_ROWS
            normalize_row(op, task.x, i, prepared, block * BLOCK_ROWS * n_in + r, BLOCK_ROWS)


@inlined
def run_gemm(task: LinearTask) -> None:
    """Compute a share of the product: of its panels of outputs, in each chunk of rows."""
    op = task.op
    if op[FORMAT] == FLOAT32_TRANSPOSED:
        _run_transposed_gemm(task)
    elif op[FORMAT] == FLOAT32:
        _run_float_gemm(task)
    else:
        _run_quantized_gemm(task)


@inlined
def _run_transposed_gemm(task: LinearTask) -> None:
    op, x, y, rows = task.op, task.prepared, task.y, task.rows
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    w = float_array(op[WEIGHT], n_in * n_out)
    first, last = split_range(n_out // 4, task.thread, task.threads)
    for o in range(first * 4, last * 4, 4):
        for row in range(0, rows, BLOCK_ROWS):
            target = Matrix(y, row * width + o, width, 1)
            dot_product_4x4(x, row * n_in, w, o * n_in, n_in, target, row == 0)
    for o in range(n_out if task.thread < task.threads - 1 else n_out // 4 * 4, n_out):
        for row in range(0, rows, BLOCK_ROWS):
            target = Matrix(y, row * width + o, width, 1)
            dot_product_4x1(x, row * n_in, w, o * n_in, n_in, target, row == 0)


@inlined
def _run_float_gemm(task: LinearTask) -> None:
    """Compute all outputs of the share from `PANEL_INPUTS` inputs at a time.

    Thus the thread reads that many rows of the matrix at a time, almost in memory order.
    """
    op, x, y, rows, panel = task.op, task.prepared, task.y, task.rows, task.workspace[task.thread]
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    w = float_array(op[WEIGHT], n_in * (n_out + PANEL_OUTPUTS))
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    chunks = (blocks + CHUNK_BLOCKS - 1) // CHUNK_BLOCKS
    panels = (n_out + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS
    first, last = split_range(panels * chunks, task.thread, task.threads)
    for chunk in range(chunks):
        first_panel = max(first - chunk * panels, 0)
        last_panel = min(last - chunk * panels, panels)
        begin, end = chunk * CHUNK_BLOCKS, min((chunk + 1) * CHUNK_BLOCKS, blocks)
        for k in range(0, n_in, PANEL_INPUTS):
            depth = min(PANEL_INPUTS, n_in - k)
            for number in range(first_panel, last_panel):
                expand_float32(w, n_out, number, k, depth, panel)
                for block in range(begin, end):
                    xi = block * BLOCK_ROWS * n_in + k * BLOCK_ROWS
                    yi = block * BLOCK_ROWS * width + number * PANEL_OUTPUTS
                    source = Matrix(panel, 0, PANEL_OUTPUTS, 1)
                    outer_product_4x4(x, xi, source, depth, Matrix(y, yi, width, 1), k == 0)
        for row in range(begin * BLOCK_ROWS, min(end * BLOCK_ROWS, rows)):
            for number in range(first_panel, last_panel):
                j = number * PANEL_OUTPUTS
                apply_epilogue(op, y, row * width, j, j + PANEL_OUTPUTS, task.residual)


@inlined
def _run_quantized_gemm(task: LinearTask) -> None:
    """Compute the panels of outputs one after the other."""
    op, x, y, rows, panel = task.op, task.prepared, task.y, task.rows, task.workspace[task.thread]
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    matrix = quantized_matrix(op)
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    chunks = (blocks + CHUNK_BLOCKS - 1) // CHUNK_BLOCKS
    panels = (n_out + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS
    first, last = split_range(panels * chunks, task.thread, task.threads)
    for item in range(first, last):
        chunk, number = item // panels, item % panels
        begin, end = chunk * CHUNK_BLOCKS, min((chunk + 1) * CHUNK_BLOCKS, blocks)
        for k in range(0, n_in, PANEL_INPUTS):
            depth = min(PANEL_INPUTS, n_in - k)
            if op[FORMAT] == INT8:
                expand_int8(matrix, number, k, depth, panel)
            else:
                expand_int4(matrix, number, k, depth, panel)
            for block in range(begin, end):
                xi = block * BLOCK_ROWS * n_in + k * BLOCK_ROWS
                yi = block * BLOCK_ROWS * width + number * PANEL_OUTPUTS
                source = Matrix(panel, 0, PANEL_OUTPUTS, 1)
                outer_product_4x4(x, xi, source, depth, Matrix(y, yi, width, 1), k == 0)
        for row in range(begin * BLOCK_ROWS, min(end * BLOCK_ROWS, rows)):
            j = number * PANEL_OUTPUTS
            apply_epilogue(op, y, row * width, j, j + PANEL_OUTPUTS, task.residual)


# Split-K


@inlined
def run_split_gemm(task: LinearTask) -> None:
    """Compute partial results of all rows from a share of the inputs of a FLOAT32 matrix.

    Thus a thread reads whole rows of the matrix, in memory order. While one panel is multiplied by
    one block of rows after the other, the panel below it is prefetched.
    """
    op, x, partial = task.op, task.prepared, task.workspace[task.thread]
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    w = float_array(op[WEIGHT], n_in * (n_out + PANEL_OUTPUTS))
    blocks = (task.rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    panels = (n_out + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS
    panel = partial[blocks * BLOCK_ROWS * width :]
    first, last = split_range(n_in, task.thread, task.threads)
    for k in range(first, last, SPLIT_PANEL_INPUTS):
        depth = min(SPLIT_PANEL_INPUTS, last - k)
        for number in range(panels):
            expand_float32(w, n_out, number, k, depth, panel)
            for block in range(blocks):
                prefetch_first, prefetch_last = split_range(SPLIT_PANEL_INPUTS, block, blocks)
                for i in range(prefetch_first, prefetch_last):
                    j = (k + SPLIT_PANEL_INPUTS + i) * n_out + number * PANEL_OUTPUTS
                    for c in range(4):
                        prefetch_l2(w, j + LANES * c)
                xi = (block * n_in + k) * BLOCK_ROWS
                yi = block * BLOCK_ROWS * width + number * PANEL_OUTPUTS
                source = Matrix(panel, 0, PANEL_OUTPUTS, 1)
                target = Matrix(partial, yi, width, 1)
                outer_product_4x4(x, xi, source, depth, target, k == first)


@inlined
def sum_partial_results(task: LinearTask) -> None:
    """Sum the threads' partial results for a share of the outputs, and apply the epilogue."""
    op, y, workspace = task.op, task.y, task.workspace
    width, panels = op[TARGET_WIDTH], (op[N_OUT] + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS
    first, last = split_range(panels, task.thread, task.threads)
    for row in range(task.rows):
        for number in range(first, last):
            begin = number * PANEL_OUTPUTS
            for j in range(row * width + begin, row * width + begin + PANEL_OUTPUTS, LANES):
                s = splat(0.0)
                for n in range(task.threads):
                    s += load(workspace[n], j)
                store(y, j, s)
            apply_epilogue(op, y, row * width, begin, begin + PANEL_OUTPUTS, task.residual)
