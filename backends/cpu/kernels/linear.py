"""The stages of LINEAR on vectors (AVX2, AVX-512, VNNI, NEON): one thread's share of each.

A GEMV has the stages `run_gemv` and, for a float matrix [I, O], of which the threads split the
inputs, `sum_partial_results`. A GEMM has `prepare_gemm` and `run_gemm`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptx.backends.cpu.interface.cpu_features import (
    HAS_AVX512,
    HAS_BYTE_PRODUCTS,
    HAS_PAIR_PRODUCTS,
    HAS_VNNI,
)
from gptx.backends.cpu.interface.instructions import (
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
from gptx.backends.cpu.interface.sizes import (
    BLOCK_ROWS,
    BYTE_ROWS,
    CHUNK_BLOCKS,
    LANES,
    MAX_WORD_ROWS,
    PANEL_OUTPUTS,
    QUANTIZED_CHUNK_ROWS,
    STRIP_INPUTS,
    STRIP_OUTPUTS,
)
from gptx.backends.cpu.interface.variant import HAS_FLOATS, HAS_INT4, HAS_INT8, HAS_QUANTIZED
from gptx.backends.cpu.kernels import (
    gemm_bytes,
    gemm_words,
    gemv,
    gemv_bytes,
    gemv_pairs,
    gemv_words,
)
from gptx.backends.cpu.kernels.arguments import (
    LinearTask,
    Matrix,
    quantized_matrix,
    source_row,
)
from gptx.backends.cpu.kernels.barrier import split_blocks, split_range
from gptx.backends.cpu.kernels.compilation import float_array, inlined
from gptx.backends.cpu.kernels.elementwise import apply_epilogue, normalize_row
from gptx.backends.cpu.kernels.gemm import (
    DOT_COLUMNS,
    count_blocks,
    dot_product_1x1,
    dot_product_1x4,
    dot_product_4x1,
    expand_weights,
    first_row,
    multiply_columns,
    multiply_strip,
)
from gptx.backends.cpu.kernels.simd import load, splat, store

MIN_STRIP_ROWS = 24  # for fewer rows, a matrix [O, I] is not transposed

MULTIPLIES_BYTES = HAS_VNNI and HAS_QUANTIZED
MULTIPLIES_WORDS = HAS_QUANTIZED and not MULTIPLIES_BYTES
quantized_gemv: Any = gemv_words
if HAS_BYTE_PRODUCTS:
    quantized_gemv = gemv_bytes
elif HAS_PAIR_PRODUCTS and not HAS_AVX512:
    quantized_gemv = gemv_pairs


@inlined
def is_quantized(op: Any) -> bool:
    """Return True if the matrix is packed."""
    return op[FORMAT] == INT8 or op[FORMAT] == INT4


@inlined
def count_strips(op: Any) -> int:
    """Return the number of strips of 16 outputs in a packed matrix."""
    return (op[N_OUT] + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS * PANEL_OUTPUTS // LANES


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
    normalize_row(op, x, source_row(task, 0) * op[SOURCE_WIDTH], row, 0, 1)
    if HAS_FLOATS:
        w = float_array(op[WEIGHT], size)
        if op[FORMAT] == FLOAT32_TRANSPOSED:
            first, last = split_range(n_out // 4, thread, threads)
            for o in range(first * 4, last * 4, 4):
                dot_product_1x4(row, 0, w, o * n_in, n_in, Matrix(y, o, 0, 1), False)
            for o in range(n_out if thread < threads - 1 else n_out // 4 * 4, n_out):
                dot_product_1x1(row, 0, w, o * n_in, n_in, Matrix(y, o, 0, 1), False)
        elif op[FORMAT] == FLOAT32:
            first, last = split_range(n_in, thread, threads)
            gemv.multiply_float32(w, row, first, last, n_out, task.workspace[thread])
    if HAS_QUANTIZED and is_quantized(op):
        first, last = split_range(count_strips(op), thread, threads)
        if HAS_INT8 and op[FORMAT] == INT8:
            quantized_gemv.prepare_row(row, n_in, group_size, 8)
            quantized_gemv.multiply_int8(quantized_matrix(op), first, last, row, y)
        if HAS_INT4 and op[FORMAT] == INT4:
            quantized_gemv.prepare_row(row, n_in, group_size, 4)
            quantized_gemv.multiply_int4(quantized_matrix(op), first, last, row, y)
        apply_epilogue(op, y, 0, first * LANES, last * LANES, task.residual)


@inlined
def sum_partial_results(task: LinearTask) -> None:
    """Sum the threads' partial results for a share of the outputs, and apply the epilogue."""
    op, y, workspace = task.op, task.y, task.workspace
    panels = (op[N_OUT] + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS
    first, last = split_range(panels, task.thread, task.threads)
    first, last = first * PANEL_OUTPUTS, last * PANEL_OUTPUTS
    for j in range(first, last, LANES):
        s = splat(0.0)
        for n in range(task.threads):
            s += load(workspace[n], j)
        store(y, j, s)
    apply_epilogue(op, y, 0, first, last, task.residual)


# GEMM


@inlined
def uses_dot_products(op: Any, rows: int) -> bool:
    """Return True if a matrix [O, I] is multiplied as it is, not as strips."""
    return op[FORMAT] == FLOAT32_TRANSPOSED and rows < MIN_STRIP_ROWS


@inlined
def uses_words(op: Any, rows: int) -> bool:
    """Return True if quantized weights become floats in registers, not strips of floats."""
    return is_quantized(op) and rows <= MAX_WORD_ROWS


@inlined
def prepare_gemm(task: LinearTask) -> None:
    """Normalize a share of the rows, and pack each block of rows as [I, rows] for outer products.

    The last row fills up the last block. For dot products the rows stay [rows, I].
    """
    op, prepared, rows = task.op, task.prepared, task.rows
    if MULTIPLIES_BYTES and is_quantized(op):
        _pack_bytes(task)
        return
    if MULTIPLIES_WORDS and uses_words(op, rows):
        _pack_words(task)
        return
    n_in, dots = op[N_IN], uses_dot_products(op, rows)
    tall, short = count_blocks(rows)
    if dots:
        tall, short = 0, (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    first, last = split_range(tall + short, task.thread, task.threads)
    for block in range(first, last):
        start, end = first_row(block, tall), first_row(block + 1, tall)
        for row in range(start, end):
            i = source_row(task, min(row, rows - 1)) * op[SOURCE_WIDTH]
            if dots:
                normalize_row(op, task.x, i, prepared, row * n_in, 1)
            else:
                normalize_row(op, task.x, i, prepared, start * n_in + row - start, end - start)


@inlined
def run_gemm(task: LinearTask) -> None:
    """Compute a share of the product: of its outputs, or of its strips in each chunk of rows."""
    if MULTIPLIES_BYTES and is_quantized(task.op):
        _run_bytes(task)
    elif MULTIPLIES_WORDS and uses_words(task.op, task.rows):
        _run_words(task)
    elif not uses_dot_products(task.op, task.rows):
        _run_strips(task)
    elif HAS_FLOATS:
        _run_dot_products(task)


@inlined
def _run_dot_products(task: LinearTask) -> None:
    op, x, y, rows = task.op, task.prepared, task.y, task.rows
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    w = float_array(op[WEIGHT], n_in * n_out)
    first, last = split_range(n_out // DOT_COLUMNS, task.thread, task.threads)
    for o in range(first * DOT_COLUMNS, last * DOT_COLUMNS, DOT_COLUMNS):
        for row in range(0, rows, BLOCK_ROWS):
            target = Matrix(y, row * width + o, width, 1)
            multiply_columns(x, row * n_in, w, o * n_in, n_in, target, row == 0)
    end = n_out // DOT_COLUMNS * DOT_COLUMNS
    for o in range(n_out if task.thread < task.threads - 1 else end, n_out):
        for row in range(0, rows, BLOCK_ROWS):
            target = Matrix(y, row * width + o, width, 1)
            dot_product_4x1(x, row * n_in, w, o * n_in, n_in, target, row == 0)


@inlined
def _run_strips(task: LinearTask) -> None:
    """Compute all outputs of the share from `STRIP_INPUTS` inputs at a time, in each chunk of rows.

    While a strip is multiplied, weights of the next panel of a float matrix are prefetched.
    """
    op, x, y, rows, strip = task.op, task.prepared, task.y, task.rows, task.workspace[task.thread]
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    w = float_array(op[WEIGHT], n_in * (n_out + PANEL_OUTPUTS))
    tall, short = count_blocks(rows)
    chunks = (tall + short + CHUNK_BLOCKS - 1) // CHUNK_BLOCKS
    panels = (n_out + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS
    first, last = split_range(panels * chunks, task.thread, task.threads)
    for chunk in range(chunks):
        first_output = max(first - chunk * panels, 0) * PANEL_OUTPUTS
        last_output = min(last - chunk * panels, panels) * PANEL_OUTPUTS
        begin, end = split_range(tall + short, chunk, chunks)
        for k in range(0, n_in, STRIP_INPUTS):
            depth = min(STRIP_INPUTS, n_in - k)
            for j in range(first_output, last_output, STRIP_OUTPUTS):
                is_strip = op[FORMAT] != FLOAT32 or j + STRIP_OUTPUTS > n_out
                weights = Matrix(w, k * n_out + j, n_out, 1)
                if is_strip:
                    weights = Matrix(strip, 0, STRIP_OUTPUTS, 1)
                    expand_weights(op, j, k, depth, strip)
                ahead, n_ahead = _weights_ahead(op, w, j, k, depth, first_output, last_output)
                multiply_strip(
                    x, n_in, k, rows, begin, end, weights, is_strip, depth,
                    Matrix(y, j, width, 1), k == 0, strip, ahead, n_ahead,
                )  # fmt: skip
        for row in range(first_row(begin, tall), min(first_row(end, tall), rows)):
            for j in range(first_output, last_output, PANEL_OUTPUTS):
                apply_epilogue(op, y, row * width, j, j + PANEL_OUTPUTS, task.residual)


@inlined
def _weights_ahead(
    op: Any, w: Any, j: int, k: int, depth: int, first_output: int, last_output: int
) -> tuple[Matrix, int]:
    """Return the rows to prefetch at strip j of inputs [k, k + depth), and their number.

    They are a part of the next panel of the share: each strip of a panel prefetches its own.
    """
    n_out, n_rows = op[N_OUT], depth if op[FORMAT] == FLOAT32 else 0
    strip = j % PANEL_OUTPUTS // STRIP_OUTPUTS
    first, last = split_range(n_rows, strip, PANEL_OUTPUTS // STRIP_OUTPUTS)
    j += PANEL_OUTPUTS - j % PANEL_OUTPUTS
    if j >= last_output:
        j, k = first_output, k + depth
    return Matrix(w, (k + first) * n_out + j, n_out, 1), last - first


# GEMM on VNNI


@inlined
def _pack_bytes(task: LinearTask) -> None:
    """Normalize and pack a share of the rows."""
    op, workspace = task.op, task.workspace[task.thread]
    n_in, bits = op[N_IN], 8 if op[FORMAT] == INT8 else 4
    digits = workspace[n_in:].view(np.int8)
    first, last = split_range(task.rows, task.thread, task.threads)
    for n in range(first, last):
        normalize_row(op, task.x, source_row(task, n) * op[SOURCE_WIDTH], workspace, 0, 1)
        gemm_bytes.pack_row(workspace, n_in, op[GROUP_SIZE], bits, task.prepared, n, digits)


@inlined
def _run_bytes(task: LinearTask) -> None:
    """Compute a share of the strips, in each chunk of rows."""
    op, x, y, rows = task.op, task.prepared, task.y, task.rows
    width, matrix, strips = op[TARGET_WIDTH], quantized_matrix(op), count_strips(op)
    chunks = (rows + QUANTIZED_CHUNK_ROWS - 1) // QUANTIZED_CHUNK_ROWS
    first, last = split_range(strips * chunks, task.thread, task.threads)
    for chunk in range(chunks):
        begin, end = split_blocks(rows, BYTE_ROWS, chunk, chunks)
        first_strip, last_strip = max(first - chunk * strips, 0), min(last - chunk * strips, strips)
        for strip in range(first_strip, last_strip):
            for n in range(begin, end, BYTE_ROWS):
                target = Matrix(y, n * width + strip * LANES, width, 1)
                if HAS_INT8 and op[FORMAT] == INT8:
                    gemm_bytes.multiply_int8(matrix, strip, x, rows, n, target)
                if HAS_INT4 and op[FORMAT] == INT4:
                    gemm_bytes.multiply_int4(matrix, strip, x, rows, n, target)
        for row in range(begin, end):
            i = row * width
            apply_epilogue(op, y, i, first_strip * LANES, last_strip * LANES, task.residual)


# GEMM of a few rows with quantized weights that become floats in registers


@inlined
def _pack_words(task: LinearTask) -> None:
    """Normalize a share of the rows, and pack each block of prepared rows as [I + G, rows]."""
    op, rows, row = task.op, task.rows, task.workspace[task.thread]
    n_in, group_size, bits = op[N_IN], op[GROUP_SIZE], 8 if op[FORMAT] == INT8 else 4
    first, last = split_range(rows, task.thread, task.threads)
    for n in range(first, last):
        normalize_row(op, task.x, source_row(task, n) * op[SOURCE_WIDTH], row, 0, 1)
        gemv_words.prepare_row(row, n_in, group_size, bits)
        gemm_words.pack_row(row, n_in + n_in // group_size, n, rows, task.prepared)


@inlined
def _run_words(task: LinearTask) -> None:
    """Compute a share of the strips."""
    op, x, y, rows = task.op, task.prepared, task.y, task.rows
    width, matrix = op[TARGET_WIDTH], quantized_matrix(op)
    first, last = split_range(count_strips(op), task.thread, task.threads)
    target = Matrix(y, 0, width, 1)
    for strip in range(first, last):
        if HAS_INT8 and op[FORMAT] == INT8:
            gemm_words.multiply_int8(matrix, strip, x, rows, target)
        if HAS_INT4 and op[FORMAT] == INT4:
            gemm_words.multiply_int4(matrix, strip, x, rows, target)
    for row in range(rows):
        apply_epilogue(op, y, row * width, first * LANES, last * LANES, task.residual)
