"""Attention on vectors (AVX2, AVX-512, NEON): one head and one or four rows, by one thread.

On AMX, `amx/attention.py` computes the attention of a prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptx.backends.cpu.kernels.arguments import BLOCK_ROWS, AttentionTask, Matrix
from gptx.backends.cpu.kernels.compilation import compiled
from gptx.backends.cpu.kernels.gemm import (
    PREFETCH_INPUTS,
    dot_product_1x1,
    dot_product_1x4,
    dot_product_4x1,
    dot_product_4x4,
    outer_product_1x1,
    outer_product_1x4,
    outer_product_4x1,
    outer_product_4x4,
)
from gptx.backends.cpu.kernels.simd import (
    LANES,
    exp,
    load,
    load_scalar,
    maximum,
    prefetch_l1,
    splat,
    store,
)


def workspace_size(D: int, capacity: int) -> int:
    """Return the floats of a thread's workspace for `prompt_attention`."""
    return BLOCK_ROWS * (2 * D + capacity) + 2 * LANES


@compiled
def _prefetch_range(array: Any, i: int, count: int) -> None:
    for j in range(i, i + count, 16):
        prefetch_l1(array, j)


def _make_attention(rows: int, dot_products: Any, outer_products: Any) -> Any:
    """Make attention for `rows` rows of one head; fewer repeat the last one.

    The products are given for 4 and for 1 keys, and for 4 vectors and for 1 vector of a value.
    """
    dot_product_x4, dot_product_x1 = dot_products
    outer_product_x4, outer_product_x1 = outer_products

    @compiled
    def attention(task: AttentionTask, head: int, cache_start: int, first: int, count: int) -> None:
        """Compute rows [first, first + count) of y for one head.

        The head's keys and values begin at `cache_start`. The workspace holds queries [rows, D],
        results [rows, D], one vector, and scores [keys, rows].
        """
        x, y, D, positions, workspace = task.x, task.y, task.D, task.positions, task.workspace
        keys, values = task.keys, task.values
        results, vector = rows * D, 2 * rows * D
        scores = vector + 16
        n_keys = 0
        for r in range(rows):
            n = first + min(r, count - 1)
            n_keys = max(n_keys, positions[n] + 1)
            for d in range(D):
                workspace[r * D + d] = x[n * task.x_width + head * D + d] * task.scale

        # Scores, masked
        if rows == 1:
            _prefetch_range(values, cache_start, min(PREFETCH_INPUTS, n_keys) * D)
        for s in range(0, n_keys - 3, 4):
            if rows == 1:  # bound by memory latency
                ahead = min(s + PREFETCH_INPUTS, n_keys - 4)
                _prefetch_range(keys, cache_start + ahead * D, 4 * D)
            target = Matrix(workspace, scores + s * rows, 1, rows)
            dot_product_x4(workspace, 0, keys, cache_start + s * D, D, target, False)
        for s in range(n_keys // 4 * 4, n_keys):
            target = Matrix(workspace, scores + s * rows, 1, rows)
            dot_product_x1(workspace, 0, keys, cache_start + s * D, D, target, False)
        for r in range(rows):
            for s in range(positions[first + min(r, count - 1)] + 1, n_keys):
                workspace[scores + s * rows + r] = -np.inf
        end = (n_keys * rows + 15) // 16 * 16
        for i in range(n_keys * rows, end):
            workspace[scores + i] = -np.inf

        # Softmax, not yet divided by its sums; lane j of a vector belongs to row j % rows
        highest = splat(-np.inf)
        for i in range(0, end, 16):
            highest = maximum(highest, load(workspace, scores + i))
        store(workspace, vector, highest)
        for r in range(rows):
            for j in range(r, 16, rows):
                workspace[vector + r] = max(workspace[vector + r], workspace[vector + j])
        for j in range(rows, 16):
            workspace[vector + j] = workspace[vector + j % rows]
        highest, sums = load(workspace, vector), splat(0.0)
        for i in range(0, end, 16):
            e = exp(load(workspace, scores + i) - highest)
            store(workspace, scores + i, e)
            sums += e
        store(workspace, vector, sums)

        # Products with the values
        if rows == 1:
            next_head = cache_start + task.capacity * D
            _prefetch_range(keys, next_head, min(PREFETCH_INPUTS, n_keys) * D)
        for d in range(0, D - 63, 64):
            v = Matrix(values, cache_start + d, D, 1)
            target = Matrix(workspace, results + d, D, 1)
            outer_product_x4(workspace, scores, v, n_keys, target, True)
        for d in range(D // 64 * 64, D - 15, 16):
            v = Matrix(values, cache_start + d, D, 1)
            target = Matrix(workspace, results + d, D, 1)
            outer_product_x1(workspace, scores, v, n_keys, target, True)
        for r in range(rows):
            for d in range(D // 16 * 16, D):
                workspace[results + r * D + d] = 0
                for s in range(n_keys):
                    value = load_scalar(values, cache_start + s * D + d)
                    workspace[results + r * D + d] += workspace[scores + s * rows + r] * value
        for r in range(count):
            total = np.float32(0)
            for j in range(r, 16, rows):
                total += workspace[vector + j]
            for d in range(D):
                result = workspace[results + r * D + d] / total
                y[(first + r) * task.y_width + head * D + d] = result

    return attention


decode_attention = _make_attention(
    1, (dot_product_1x4, dot_product_1x1), (outer_product_1x4, outer_product_1x1)
)
prompt_attention = _make_attention(
    4, (dot_product_4x4, dot_product_4x1), (outer_product_4x4, outer_product_4x1)
)
