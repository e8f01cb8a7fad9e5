"""GEMV kernel on vectors (AVX2, AVX-512, NEON): one row times a matrix of floats.

A product with one row is bound by memory bandwidth: each weight is read once, in memory order.
"""

from __future__ import annotations

from typing import Any

from gptx.backends.cpu.kernels.compilation import compiled
from gptx.backends.cpu.kernels.simd import broadcast, load, prefetch_l2, store


@compiled
def multiply_float32(w: Any, x: Any, first: int, last: int, n_out: int, y: Any) -> None:
    """Compute y = x[first:last]·w[first:last] for w [I, O], four rows of w at a time."""
    vector_end = n_out // 16 * 16
    for j in range(n_out):
        y[j] = 0.0
    for k in range(first, last - 3, 4):
        i = k * n_out
        for j in range(0, vector_end, 16):
            sums = load(y, j)
            for r in range(4):
                prefetch_l2(w, i + (r + 4) * n_out + j)  # the next four rows
                sums += load(w, i + r * n_out + j) * broadcast(x, k + r)
            store(y, j, sums)
    for k in range(first, last):
        if k >= last - (last - first) % 4:
            for j in range(vector_end):
                y[j] += x[k] * w[k * n_out + j]
        for j in range(vector_end, n_out):
            y[j] += x[k] * w[k * n_out + j]
