"""Attention for the NumPy backend's kernels: one head and a few rows, by one thread."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptx.backends.cpu.kernels.gemm import (
    NEXT,
    dots_1x1,
    dots_1x4,
    dots_4x1,
    dots_4x4,
    outer_1x1,
    outer_1x4,
    outer_4x1,
    outer_4x4,
)
from gptx.backends.cpu.kernels.simd import (
    compiled,
    exp,
    load,
    maximum,
    number,
    prefetch,
    splat,
    store,
)


@compiled
def _fetch(array: Any, i: int, count: int) -> None:
    """Begin to bring numbers i to i + count."""
    for j in range(i, i + count, 16):
        prefetch(array, j)


def _attend(rows: int, dots_x4: Any, dots_x1: Any, outer_x4: Any, outer_x1: Any) -> Any:
    """Make attention for `rows` rows of one head (the last one fills up); softmax and all."""

    @compiled
    def attend(
        x: Any, x_width: int, first: int, count: int, head: int, D: int, index: Any, keys: Any,
        values: Any, ki: int, room: int, scale: float, y: Any, y_width: int, work: Any,
    ) -> None:  # fmt: skip
        yi, ti = rows * D, 2 * rows * D  # in `work`: queries, results, one vector, weights
        pi = ti + 16
        seen = 0
        for r in range(rows):
            n = first + min(r, count - 1)
            seen = max(seen, index[n] + 1)
            for d in range(D):
                work[r * D + d] = x[n * x_width + head * D + d] * scale
        if rows == 1:
            _fetch(values, ki, min(NEXT, seen) * D)
        for s in range(0, seen - 3, 4):
            if rows == 1:  # there is nothing to do but to wait for memory
                _fetch(keys, ki + min(s + NEXT, seen - 4) * D, 4 * D)
            dots_x4(work, 0, keys, ki + s * D, D, work, pi + s * rows, 1, rows, False)
        for s in range(seen // 4 * 4, seen):
            dots_x1(work, 0, keys, ki + s * D, D, work, pi + s * rows, 1, rows, False)
        for r in range(rows):
            for s in range(index[first + min(r, count - 1)] + 1, seen):
                work[pi + s * rows + r] = -np.inf
        end = (seen * rows + 15) // 16 * 16
        for i in range(seen * rows, end):
            work[pi + i] = -np.inf

        top = splat(-np.inf)  # lane j belongs to row j % rows
        for i in range(0, end, 16):
            top = maximum(top, load(work, pi + i))
        store(work, ti, top)
        for r in range(rows):
            for j in range(r, 16, rows):
                work[ti + r] = max(work[ti + r], work[ti + j])
        for j in range(rows, 16):
            work[ti + j] = work[ti + j % rows]
        top, sums = load(work, ti), splat(0.0)
        for i in range(0, end, 16):
            e = exp(load(work, pi + i) - top)
            store(work, pi + i, e)
            sums += e
        store(work, ti, sums)

        if rows == 1:
            _fetch(keys, ki + room * D, min(NEXT, seen) * D)  # of the next head
        for d in range(0, D - 63, 64):
            outer_x4(work, pi, values, ki + d, D, seen, work, yi + d, D, True)
        for d in range(D // 64 * 64, D - 15, 16):
            outer_x1(work, pi, values, ki + d, D, seen, work, yi + d, D, True)
        for r in range(rows):
            for d in range(D // 16 * 16, D):
                work[yi + r * D + d] = 0
                for s in range(seen):
                    value = number(values, ki + s * D + d)
                    work[yi + r * D + d] += work[pi + s * rows + r] * value
        for r in range(count):
            whole = np.float32(0)
            for j in range(r, 16, rows):
                whole += work[ti + j]
            for d in range(D):
                y[(first + r) * y_width + head * D + d] = work[yi + r * D + d] / whole

    return attend


attend_1 = _attend(1, dots_1x4, dots_1x1, outer_1x4, outer_1x1)
attend_4 = _attend(4, dots_4x4, dots_4x1, outer_4x4, outer_4x1)
