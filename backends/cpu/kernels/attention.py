"""Attention on vectors (AVX2, AVX-512, NEON): one head, by one thread.

On AMX, `amx/attention.py` computes the attention of a prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptx.backends.cpu.interface.sizes import (
    BLOCK_ROWS,
    LANES,
    QUERIES,
    TALL_KEYS,
)
from gptx.backends.cpu.interface.variant import HAS_FLOAT16_CACHE
from gptx.backends.cpu.kernels.arguments import AttentionTask, Matrix
from gptx.backends.cpu.kernels.compilation import compiled
from gptx.backends.cpu.kernels.gemm import (
    PREFETCH_INPUTS,
    dot_product_1x1,
    dot_product_1x4,
    make_outer_product,
)
from gptx.backends.cpu.kernels.simd import (
    exp,
    load,
    load_scalar,
    max_lanes,
    maximum,
    minimum,
    prefetch_l1,
    splat,
    store,
    sum_lanes,
)

FAR = 1e30  # score of a key after the query, negative

_multiply_tall = make_outer_product(TALL_KEYS, 1)
_multiply_short = make_outer_product(BLOCK_ROWS, 1)
_multiply_row = make_outer_product(1, 1)
_multiply_row_x4 = make_outer_product(1, 4)


# One token


@compiled
def _prefetch_range(array: Any, i: int, count: int) -> None:
    for j in range(i, i + count, 16):
        prefetch_l1(array, j)


@compiled
def decode_attention(task: AttentionTask, head: int, cache_start: int, n: int) -> None:
    """Compute row n of y for one head, whose keys and values begin at `cache_start`.

    The workspace holds the query [D], the result [D] and the scores.
    """
    x, y, D, workspace = task.x, task.y, task.D, task.workspace
    keys, values, n_keys = task.keys, task.values, task.positions[n] + 1
    result, scores = D, 2 * D
    for d in range(D):
        workspace[d] = x[n * task.x_width + head * D + d] * task.scale

    # Scores
    _prefetch_range(values, cache_start, min(PREFETCH_INPUTS, n_keys) * D)
    for s in range(0, n_keys - 3, 4):
        ahead = min(s + PREFETCH_INPUTS, n_keys - 4)  # bound by memory latency
        _prefetch_range(keys, cache_start + ahead * D, 4 * D)
        target = Matrix(workspace, scores + s, 1, 1)
        dot_product_1x4(workspace, 0, keys, cache_start + s * D, D, target, False)
    for s in range(n_keys // 4 * 4, n_keys):
        target = Matrix(workspace, scores + s, 1, 1)
        dot_product_1x1(workspace, 0, keys, cache_start + s * D, D, target, False)
    end = (n_keys + LANES - 1) // LANES * LANES
    for s in range(n_keys, end):
        workspace[scores + s] = -np.inf

    # Softmax, not yet divided by its sum
    highest, sums = splat(-np.inf), splat(0.0)
    for s in range(scores, scores + end, LANES):
        highest = maximum(highest, load(workspace, s))
    highest = splat(max_lanes(highest))
    for s in range(scores, scores + end, LANES):
        e = exp(load(workspace, s) - highest)
        store(workspace, s, e)
        sums += e
    factor = np.float32(1) / sum_lanes(sums)

    # Products with the values
    next_head = cache_start + task.capacity * D
    _prefetch_range(keys, next_head, min(PREFETCH_INPUTS, n_keys) * D)
    p = Matrix(workspace, scores, 0, 1)
    for d in range(0, D - 63, 64):
        v, target = Matrix(values, cache_start + d, D, 1), Matrix(workspace, result + d, D, 1)
        _multiply_row_x4(p, v, n_keys, target, True)
    for d in range(D // 64 * 64, D - 15, 16):
        v, target = Matrix(values, cache_start + d, D, 1), Matrix(workspace, result + d, D, 1)
        _multiply_row(p, v, n_keys, target, True)
    for d in range(D // 16 * 16, D):
        workspace[result + d] = 0
        for s in range(n_keys):
            value = load_scalar(values, cache_start + s * D + d)
            workspace[result + d] += workspace[scores + s] * value
    for d in range(D):
        y[n * task.y_width + head * D + d] = workspace[result + d] * factor


# A prompt


@compiled
def convert_head(task: AttentionTask, cache_start: int, n_keys: int) -> None:
    """Copy the first float16 keys and values [n_keys, D] of a head to the workspace, as float32."""
    size, workspace = n_keys * task.D, task.workspace
    values = task.capacity * task.D
    for i in range(0, size - 15, LANES):
        store(workspace, i, load(task.keys, cache_start + i))
        store(workspace, values + i, load(task.values, cache_start + i))
    for i in range(size // LANES * LANES, size):
        workspace[i] = load_scalar(task.keys, cache_start + i)
        workspace[values + i] = load_scalar(task.values, cache_start + i)


@compiled
def _multiply_rows(x: Matrix, rows: int, w: Matrix, depth: int, y: Any, yi: int) -> None:
    """Compute y [rows, 16] = x·w from yi on; x is [rows, depth], w is [depth, 16]."""
    row = 0
    while row < rows:
        source = Matrix(x.array, x.start + row * x.row_stride, x.row_stride, x.column_stride)
        target = Matrix(y, yi + row * QUERIES, QUERIES, 1)
        if rows - row >= TALL_KEYS:
            _multiply_tall(source, w, depth, target, True)
            row += TALL_KEYS
        elif rows - row >= BLOCK_ROWS:
            _multiply_short(source, w, depth, target, True)
            row += BLOCK_ROWS
        else:
            _multiply_row(source, w, depth, target, True)
            row += 1


@compiled
def prompt_attention(
    task: AttentionTask, head: int, cache_start: int, first: int, count: int
) -> None:
    """Compute rows [first, first + count) of y for one head, at most 16.

    A lane belongs to a row: scores are [keys, 16], the result is [D, 16], and keys and values are
    read as they are in the cache, or in the workspace after `convert_head`.
    """
    x, y, D, positions, workspace = task.x, task.y, task.D, task.positions, task.workspace
    values = task.capacity * D
    queries = 2 * values
    result = queries + D * QUERIES
    last_keys = result + D * QUERIES  # position of each row, as a float
    scores = last_keys + QUERIES
    n_keys, n_common = 0, task.capacity
    for r in range(QUERIES):
        n = first + min(r, count - 1)
        n_keys, n_common = max(n_keys, positions[n] + 1), min(n_common, positions[n] + 1)
        workspace[last_keys + r] = positions[n]
        for d in range(D):
            query = x[n * task.x_width + head * D + d] * task.scale
            workspace[queries + d * QUERIES + r] = query

    if HAS_FLOAT16_CACHE:
        k, v = Matrix(workspace, 0, D, 1), Matrix(workspace, values, 1, D)
    else:
        k, v = Matrix(task.keys, cache_start, D, 1), Matrix(task.values, cache_start, 1, D)

    # Scores; those of keys after the row's own are very low
    w = Matrix(workspace, queries, QUERIES, 1)
    _multiply_rows(k, n_keys, w, D, workspace, scores)
    for s in range(n_common, n_keys):
        after = minimum(load(workspace, last_keys) - splat(s), splat(0.0))
        i = scores + s * QUERIES
        store(workspace, i, load(workspace, i) + after * splat(FAR))

    # Softmax, not yet divided by its sums
    highest, sums = splat(-np.inf), splat(0.0)
    for i in range(scores, scores + n_keys * QUERIES, QUERIES):
        highest = maximum(highest, load(workspace, i))
    for i in range(scores, scores + n_keys * QUERIES, QUERIES):
        e = exp(load(workspace, i) - highest)
        store(workspace, i, e)
        sums += e

    # Products with the values
    w = Matrix(workspace, scores, QUERIES, 1)
    _multiply_rows(v, D, w, n_keys, workspace, result)
    factors = splat(1.0) / sums
    for i in range(result, result + D * QUERIES, QUERIES):
        store(workspace, i, load(workspace, i) * factors)
    for r in range(count):
        for d in range(D):
            value = workspace[result + d * QUERIES + r]
            y[(first + r) * task.y_width + head * D + d] = value
