"""Attention of a prompt on AMX, by bf16x3 (`bf16x3.py`): one head and 16 rows, by one thread.

Keys and values are packed once for all rows of a head. Each 16 rows take three passes: the products
with the keys, the softmax, the products with the values.

The workspace is flat: a square [64, 64]; packed keys, values, queries and softmax; scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptx.backends.cpu.interface.sizes import (
    LANES,
    PANEL_OUTPUTS,
    PANEL_WORDS,
    ROWS_WORDS,
    SQUARE_SIZE,
    TILE_INPUTS,
    TILE_ROWS,
    TILE_WORDS,
)
from gptx.backends.cpu.kernels.amx.bf16x3 import (
    multiply,
    pack_panel,
    pack_row,
    store_parts,
)
from gptx.backends.cpu.kernels.amx.tile_unit import (
    configure_tiles,
    release_tiles,
)
from gptx.backends.cpu.kernels.arguments import AttentionTask, Matrix
from gptx.backends.cpu.kernels.compilation import compiled
from gptx.backends.cpu.kernels.simd import (
    exp,
    get_vector,
    load,
    max_lanes,
    maximum,
    put_vector,
    splat,
    stack_vectors,
    store,
    sum_lanes,
    transpose_vectors,
)

SOFTMAX_SUMS_START = TILE_ROWS * PANEL_OUTPUTS  # the sums of the softmax begin here


@compiled
def _workspace_offsets(D: int, length: int) -> tuple[int, int, int, int]:
    """Return where packed values, packed queries, the packed softmax and the scores begin."""
    values = SQUARE_SIZE + D * length // PANEL_OUTPUTS * PANEL_WORDS
    queries = values + D * length // PANEL_OUTPUTS * PANEL_WORDS
    softmax = queries + D * ROWS_WORDS
    return values, queries, softmax, softmax + length * ROWS_WORDS


@compiled
def _copy_square(source: Any, i: int, D: int, count: int, square: Any) -> None:
    """Copy 64 numbers of each of `count` rows to square [64, 64], and fill the rest with zeros."""
    for r in range(PANEL_OUTPUTS):
        for j in range(0, PANEL_OUTPUTS, LANES):
            x = load(source, i + r * D + j) if r < count else splat(0.0)
            store(square, r * PANEL_OUTPUTS + j, x)


@compiled
def transpose_square(square: Any) -> None:
    """Transpose 64 x 64 numbers in place."""
    for i in range(0, PANEL_OUTPUTS, LANES):
        for j in range(0, i + 1, LANES):
            lower, upper = stack_vectors(LANES), stack_vectors(LANES)
            for r in range(LANES):
                put_vector(lower, r, load(square, (i + r) * PANEL_OUTPUTS + j))
                put_vector(upper, r, load(square, (j + r) * PANEL_OUTPUTS + i))
            transpose_vectors(lower)
            transpose_vectors(upper)
            for r in range(LANES):
                store(square, (j + r) * PANEL_OUTPUTS + i, get_vector(lower, r))
                store(square, (i + r) * PANEL_OUTPUTS + j, get_vector(upper, r))


@compiled
def pack_head(task: AttentionTask, cache_start: int, n_keys: int) -> int:
    """Pack the first keys and values [n_keys, D] of a head, padded with zeros to whole panels.

    Returns the padded number of keys.
    """
    D, workspace = task.D, task.workspace
    length = (n_keys + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS * PANEL_OUTPUTS
    words, values = workspace.view(np.uint32), _workspace_offsets(D, length)[0]
    for s in range(0, n_keys, PANEL_OUTPUTS):
        count = min(PANEL_OUTPUTS, n_keys - s)
        for d in range(0, D, PANEL_OUTPUTS):
            first = cache_start + s * D + d
            _copy_square(task.keys, first, D, count, workspace)
            transpose_square(workspace)
            target = SQUARE_SIZE + (s // PANEL_OUTPUTS * D + d) * PANEL_WORDS
            pack_panel(workspace, 0, PANEL_OUTPUTS, PANEL_OUTPUTS, words, target)
            _copy_square(task.values, first, D, count, workspace)
            target = values + (d // PANEL_OUTPUTS * length + s) * PANEL_WORDS
            pack_panel(workspace, 0, PANEL_OUTPUTS, PANEL_OUTPUTS, words, target)
    return length


@compiled
def _pack_softmax(row: Any, n_keys: int, end: int, words: Any, i: int) -> float:
    """Pack exp(row - max(row)) of the first `n_keys` scores, with zeros up to `end`.

    Returns the sum.
    """
    for s in range(n_keys, end):
        row[s] = -np.inf
    highest, sums = splat(-np.inf), splat(0.0)
    for s in range(0, end, LANES):
        highest = maximum(highest, load(row, s))
    highest = splat(max_lanes(highest))
    for s in range(0, end, TILE_INPUTS):
        a, b = exp(load(row, s) - highest), exp(load(row, s + LANES) - highest)
        sums += a + b
        store_parts(a, b, words, i + s * ROWS_WORDS, TILE_WORDS)
    return sum_lanes(sums)


@compiled
def prompt_attention(task: AttentionTask, head: int, length: int, first: int, count: int) -> None:
    """Compute rows [first, first + count) of y, at most 16, for one head.

    `length` is the result of `pack_head`.
    """
    x, y, D, workspace = task.x, task.y, task.D, task.workspace
    values, queries, softmax, scores = _workspace_offsets(D, length)
    words = workspace.view(np.uint32)
    n_keys = 0
    for r in range(count):
        i = (first + r) * task.x_width + head * D
        for d in range(D):
            workspace[d] = x[i + d] * task.scale
        pack_row(workspace, D, words[queries:], r)
        n_keys = max(n_keys, task.positions[first + r] + 1)
    configure_tiles(workspace)
    for s in range(0, n_keys, PANEL_OUTPUTS):
        panel = SQUARE_SIZE + s // PANEL_OUTPUTS * D * PANEL_WORDS
        multiply(words, queries, words, panel, D, Matrix(workspace, scores + s, length, 1), True)
    end = (n_keys + TILE_INPUTS - 1) // TILE_INPUTS * TILE_INPUTS
    for r in range(count):
        row, packed = workspace[scores + r * length :], softmax + r * LANES
        total = _pack_softmax(row, task.positions[first + r] + 1, end, words, packed)
        workspace[SOFTMAX_SUMS_START + r] = total
    for d in range(0, D, PANEL_OUTPUTS):
        panel = values + d // PANEL_OUTPUTS * length * PANEL_WORDS
        target = Matrix(workspace, 0, PANEL_OUTPUTS, 1)
        multiply(words, softmax, words, panel, end, target, True)
        for r in range(count):
            factor = splat(np.float32(1) / workspace[SOFTMAX_SUMS_START + r])
            i = (first + r) * task.y_width + head * D + d
            for j in range(0, PANEL_OUTPUTS, LANES):
                store(y, i + j, load(workspace, r * PANEL_OUTPUTS + j) * factor)
    release_tiles()
