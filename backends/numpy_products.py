"""Products for the NumPy backend's kernels, in registers: parts that one thread computes.

With one row a product waits for memory, so each weight is read once, in the order in which it lies
(`times_...`). With more rows it waits for arithmetic: the weights are expanded into panels of
floats that fit the nearest cache (`expand_...`), and 4 rows by 64 columns of the result stay in
registers (`outer`). Arrays are flat, and an index beside one says where a matrix in it begins.

Quantized matrices lie in tiles of 64 outputs, input by input (see `numpy_step.Tiles`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from gptx.backends.simd import (
    FAST,
    get,
    load,
    nibble,
    prefetch,
    put,
    splat,
    spread,
    store,
    total,
    vectors,
)

TILE = 64  # outputs of a quantized tile, and of a panel
BLOCK = 4  # rows of a block
AHEAD = 4096  # bytes by which a stream of weights is fetched before it is needed

# What `nibble` multiplied by 16**n.
SHRINK = np.array([16.0**-n for n in range(7)] + [1.0], np.float32)

compiled = njit(fastmath=FAST, error_model="numpy")


def outer(rows: int, columns: int) -> Callable[..., None]:
    """Make y += x·w for `rows` rows and 16 · `columns` columns, one input after the other."""
    size = rows * columns

    @compiled
    def outer(
        x: Any, xi: int, w: Any, wi: int, w_stride: int, depth: int, y: Any, yi: int, y_stride: int,
        fresh: bool,
    ) -> None:  # fmt: skip
        """x [depth, rows] and w [depth, 16·columns] from xi and wi on, y [rows, 16·columns]."""
        acc = vectors(size)
        for r in range(rows):
            for c in range(columns):
                if fresh:
                    put(acc, r * columns + c, splat(0.0))
                else:
                    put(acc, r * columns + c, load(y, yi + r * y_stride + 16 * c))
        for k in range(depth):
            for c in range(columns):
                column = load(w, wi + k * w_stride + 16 * c)
                for r in range(rows):
                    n = r * columns + c
                    put(acc, n, get(acc, n) + column * spread(x, xi + k * rows + r))
        for r in range(rows):
            for c in range(columns):
                store(y, yi + r * y_stride + 16 * c, get(acc, r * columns + c))

    return outer


def dots(rows: int, columns: int) -> Callable[..., None]:
    """Make y = x·wᵀ for `rows` rows and `columns` columns, 16 inputs at a time."""
    size = rows * columns

    @compiled
    def dots(
        x: Any, xi: int, w: Any, wi: int, depth: int, y: Any, yi: int, y_row: int, y_column: int
    ) -> None:
        """x [rows, depth] and w [columns, depth], y with strides y_row and y_column."""
        acc = vectors(size)
        for n in range(size):
            put(acc, n, splat(0.0))
        whole = depth // 16 * 16
        for k in range(0, whole, 16):
            for c in range(columns):
                column = load(w, wi + c * depth + k)
                for r in range(rows):
                    n = r * columns + c
                    put(acc, n, get(acc, n) + column * load(x, xi + r * depth + k))
        for r in range(rows):
            for c in range(columns):
                s = total(get(acc, r * columns + c))
                for k in range(whole, depth):
                    s += x[xi + r * depth + k] * w[wi + c * depth + k]
                y[yi + r * y_row + c * y_column] = s

    return dots


outer_4x4, outer_4x1, outer_1x4, outer_1x1 = outer(4, 4), outer(4, 1), outer(1, 4), outer(1, 1)
dots_4x4, dots_4x1, dots_1x4, dots_1x1 = dots(4, 4), dots(4, 1), dots(1, 4), dots(1, 1)


# LINEAR, one row: each weight is read once, as it lies


@compiled
def times_int8(
    w: Any, scales: Any, offsets: Any, x: Any, tile: int, n_in: int, group: int, y: Any
) -> None:
    """One tile of y = W·x; behind x there are its sums over the groups."""
    groups = n_in // group
    result = vectors(4)
    for c in range(4):
        put(result, c, splat(0.0))
    for g in range(groups):
        acc = vectors(4)
        for c in range(4):
            put(acc, c, splat(0.0))
        for k in range(g * group, (g + 1) * group):
            i = (tile * n_in + k) * TILE
            prefetch(w, i + AHEAD)
            for c in range(4):
                put(acc, c, get(acc, c) + load(w, i + 16 * c) * spread(x, k))
        i = (tile * groups + g) * TILE
        for c in range(4):
            scaled = load(scales, i + 16 * c) * get(acc, c)
            put(
                result, c, get(result, c) + scaled + load(offsets, i + 16 * c) * spread(x, n_in + g)
            )
    for c in range(4):
        store(y, tile * TILE + 16 * c, get(result, c))


@compiled
def times_int4(
    w: Any, scales: Any, offsets: Any, x: Any, tile: int, n_in: int, group: int, y: Any
) -> None:
    """The same with eight inputs to a word, and x made to match `nibble`."""
    groups = n_in // group
    result = vectors(4)
    for c in range(4):
        put(result, c, splat(0.0))
    for g in range(groups):
        acc = vectors(4)
        for c in range(4):
            put(acc, c, splat(0.0))
        for k in range(g * group, (g + 1) * group, 8):
            i = (tile * n_in + k) * (TILE // 8)
            for c in range(4):
                prefetch(w, i + 16 * c + AHEAD // 4)
                words = load(w, i + 16 * c)
                for n in range(8):
                    put(acc, c, get(acc, c) + nibble(words, n) * spread(x, k + n))
        i = (tile * groups + g) * TILE
        for c in range(4):
            scaled = load(scales, i + 16 * c) * get(acc, c)
            put(
                result, c, get(result, c) + scaled + load(offsets, i + 16 * c) * spread(x, n_in + g)
            )
    for c in range(4):
        store(y, tile * TILE + 16 * c, get(result, c))


@compiled
def times_rows(w: Any, x: Any, first: int, last: int, n_out: int, y: Any) -> None:
    """y = x[first:last]·w[first:last], w float32 [I, O]: whole rows, four at a time."""
    whole = n_out // 16 * 16
    for j in range(n_out):
        y[j] = 0.0
    for k in range(first, last - 3, 4):
        i = k * n_out
        for j in range(0, whole, 16):
            acc = load(y, j)
            for r in range(4):
                acc += load(w, i + r * n_out + j) * spread(x, k + r)
            store(y, j, acc)
    for k in range(first, last):
        if k >= last - (last - first) % 4:
            for j in range(whole):
                y[j] += x[k] * w[k * n_out + j]
        for j in range(whole, n_out):
            y[j] += x[k] * w[k * n_out + j]


# LINEAR, several rows: panels of floats


@compiled
def expand_floats(w: Any, n_out: int, tile: int, first: int, depth: int, panel: Any) -> None:
    """Inputs from `first` on of 64 outputs, panel [depth, TILE]; past the last output, zeros."""
    left = n_out - tile * TILE
    for k in range(depth):
        i, p = (first + k) * n_out + tile * TILE, k * TILE
        if left >= TILE:
            for c in range(4):
                store(panel, p + 16 * c, load(w, i + 16 * c))
        else:
            for j in range(TILE):
                panel[p + j] = w[i + j] if j < left else np.float32(0)


@compiled
def expand_int8(
    w: Any, scales: Any, offsets: Any, tile: int, n_in: int, group: int, first: int, depth: int,
    panel: Any,
) -> None:  # fmt: skip
    for k in range(first, first + depth):
        i, g = (tile * n_in + k) * TILE, (tile * (n_in // group) + k // group) * TILE
        for c in range(4):
            value = load(w, i + 16 * c) * load(scales, g + 16 * c) + load(offsets, g + 16 * c)
            store(panel, (k - first) * TILE + 16 * c, value)


@compiled
def expand_int4(
    w: Any, scales: Any, offsets: Any, tile: int, n_in: int, group: int, first: int, depth: int,
    panel: Any,
) -> None:  # fmt: skip
    for k in range(first, first + depth, 8):
        i = (tile * n_in + k) * (TILE // 8)
        g = (tile * (n_in // group) + k // group) * TILE
        for c in range(4):
            words = load(w, i + 16 * c)
            scale, offset = load(scales, g + 16 * c), load(offsets, g + 16 * c)
            for n in range(8):
                value = nibble(words, n) * spread(SHRINK, n) * scale + offset
                store(panel, (k + n - first) * TILE + 16 * c, value)
