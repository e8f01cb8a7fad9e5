"""The stages of LINEAR for several rows on AMX: one thread's share of each.

`prepare_amx` packs the rows once for all outputs; `run_amx` multiplies them. Float matrices take
bf16x3 (`bf16x3.py`), quantized ones bytes (`quantized_gemm.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptx.backends.cpu.interface.instructions import (
    FLOAT32,
    FLOAT32_TRANSPOSED,
    FORMAT,
    GROUP_SIZE,
    INT8,
    N_IN,
    N_OUT,
    SOURCE_WIDTH,
    TARGET_WIDTH,
    WEIGHT,
)
from gptx.backends.cpu.interface.sizes import (
    INCOMPLETE_PANEL_START,
    PACKED_PANEL_INPUTS,
    PANEL_OUTPUTS,
    QUANTIZED_CHUNK_ROWS,
    ROWS_WORDS,
    TILE_INPUTS,
    TILE_ROWS,
)
from gptx.backends.cpu.interface.variant import HAS_FLOATS, HAS_QUANTIZED
from gptx.backends.cpu.kernels.amx import bf16x3, quantized_gemm
from gptx.backends.cpu.kernels.amx.tile_unit import configure_tiles, release_tiles
from gptx.backends.cpu.kernels.arguments import (
    LinearTask,
    Matrix,
    quantized_matrix,
    source_row,
)
from gptx.backends.cpu.kernels.barrier import split_blocks, split_range
from gptx.backends.cpu.kernels.compilation import float_array, inlined
from gptx.backends.cpu.kernels.elementwise import apply_epilogue, normalize_row
from gptx.backends.cpu.kernels.gemm import expand_float32

MIN_FLOAT_ROWS = 64  # for fewer rows of a float matrix, vectors read the matrix faster
FLOAT_CHUNK_ROWS = 256  # rows that are multiplied by a panel of floats while it is in the cache


@inlined
def uses_amx(op: Any, rows: int) -> bool:
    """Return True if several rows of this instruction are multiplied on AMX."""
    if op[FORMAT] == FLOAT32:
        return rows >= MIN_FLOAT_ROWS and op[N_IN] % TILE_INPUTS == 0
    return op[FORMAT] != FLOAT32_TRANSPOSED


@inlined
def prepare_amx(task: LinearTask) -> None:
    """Normalize and pack a share of the rows."""
    op, prepared, rows, row = task.op, task.prepared, task.rows, task.workspace[task.thread]
    n_in, padded_rows = op[N_IN], (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    first, last = split_range(rows, task.thread, task.threads)
    for n in range(first, last):
        normalize_row(op, task.x, source_row(task, n) * op[SOURCE_WIDTH], row, 0, 1)
        if HAS_FLOATS and op[FORMAT] == FLOAT32:
            bf16x3.pack_row(row, n_in, prepared.view(np.uint32), n)
        if HAS_QUANTIZED and op[FORMAT] != FLOAT32:
            bits = 8 if op[FORMAT] == INT8 else 4
            quantized_gemm.pack_row(row, n_in, op[GROUP_SIZE], bits, prepared, n, padded_rows)


@inlined
def run_amx(task: LinearTask) -> None:
    """Compute a share of the product: of its panels of outputs, in each chunk of rows."""
    if HAS_FLOATS and task.op[FORMAT] == FLOAT32:
        _run_float_gemm(task)
    if HAS_QUANTIZED and task.op[FORMAT] != FLOAT32:
        _run_quantized_gemm(task)


@inlined
def _run_float_gemm(task: LinearTask) -> None:
    """Compute all outputs of the share from `PACKED_PANEL_INPUTS` inputs at a time."""
    op, y, rows, workspace = task.op, task.y, task.rows, task.workspace[task.thread]
    n_in, n_out, width = op[N_IN], op[N_OUT], op[TARGET_WIDTH]
    w = float_array(op[WEIGHT], n_in * (n_out + PANEL_OUTPUTS))
    x, panel = task.prepared.view(np.uint32), workspace.view(np.uint32)
    incomplete = workspace[INCOMPLETE_PANEL_START:]
    chunks = (rows + FLOAT_CHUNK_ROWS - 1) // FLOAT_CHUNK_ROWS
    panels = (n_out + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS
    first, last = split_range(panels * chunks, task.thread, task.threads)
    configure_tiles(workspace)
    for chunk in range(chunks):
        first_panel = max(first - chunk * panels, 0)
        last_panel = min(last - chunk * panels, panels)
        begin, end = split_blocks(rows, TILE_ROWS, chunk, chunks)
        for k in range(0, n_in, PACKED_PANEL_INPUTS):
            depth = min(PACKED_PANEL_INPUTS, n_in - k)
            for number in range(first_panel, last_panel):
                j = number * PANEL_OUTPUTS
                if j + PANEL_OUTPUTS <= n_out:
                    bf16x3.pack_panel(w, k * n_out + j, n_out, depth, panel, 0)
                else:
                    expand_float32(w, n_out, j, k, depth, incomplete)
                    bf16x3.pack_panel(incomplete, 0, PANEL_OUTPUTS, depth, panel, 0)
                for row in range(begin, end, TILE_ROWS):
                    xi = (row // TILE_ROWS * n_in + k) * ROWS_WORDS
                    target = Matrix(y, row * width + j, width, 1)
                    bf16x3.multiply(x, xi, panel, 0, depth, target, k == 0)
        for row in range(begin, end):
            for number in range(first_panel, last_panel):
                j = number * PANEL_OUTPUTS
                apply_epilogue(op, y, row * width, j, j + PANEL_OUTPUTS, task.residual)
    release_tiles()


@inlined
def _run_quantized_gemm(task: LinearTask) -> None:
    """Compute the panels of outputs one after the other."""
    op, y, rows, workspace = task.op, task.y, task.rows, task.workspace[task.thread]
    n_out, width, matrix = op[N_OUT], op[TARGET_WIDTH], quantized_matrix(op)
    chunks = (rows + QUANTIZED_CHUNK_ROWS - 1) // QUANTIZED_CHUNK_ROWS
    panels = (n_out + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS
    first, last = split_range(panels * chunks, task.thread, task.threads)
    for item in range(first, last):
        chunk, number = item // panels, item % panels
        begin, end = split_blocks(rows, TILE_ROWS, chunk, chunks)
        j = number * PANEL_OUTPUTS
        target = Matrix(y, j, width, 1)
        quantized_gemm.multiply(matrix, number, task.prepared, rows, begin, end, target, workspace)
        for row in range(begin, end):
            apply_epilogue(op, y, row * width, j, j + PANEL_OUTPUTS, task.residual)
