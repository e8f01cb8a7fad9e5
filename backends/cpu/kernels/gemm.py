"""Products for the NumPy backend's kernels, in registers: parts that one thread computes.

With one row a product waits for memory, so each weight is read once, in the order in which it lies
(`times_...`). With more rows it waits for arithmetic: the weights are expanded into panels of
floats that fit the nearest cache (`expand_...`), and 4 rows by 64 columns of the result stay in
registers (`outer`). Arrays are flat, and an index beside one says where a matrix in it begins.

Quantized matrices lie in tiles of 16 outputs, input by input (see `numpy_step.QuantizedWeight`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gptx.backends.cpu.kernels.group_scales import fetch_group, scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    AHEAD,
    LANES,
    code,
    compiled,
    get,
    load,
    number,
    prefetch,
    prefetch_once,
    put,
    splat,
    spread,
    store,
    total,
    totals,
    vectors,
)

TILE = 64  # outputs of a panel, and of four quantized tiles
BLOCK = 4  # rows of a block
NEXT = 16  # inputs by which `outer` fetches for a single row, before they are needed

# What makes up for `code`, by bits.
SHRINK = {
    bits: np.array([2.0 ** (-bits * n) for n in range(32 // bits - 1)] + [1.0], np.float32)
    for bits in (4, 8)
}

SHRINK_4, SHRINK_8 = SHRINK[4], SHRINK[8]


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
                if rows == 1:  # there is nothing to do but to wait for memory
                    prefetch(w, wi + min(k + NEXT, depth - 1) * w_stride + 16 * c)
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
        x: Any, xi: int, w: Any, wi: int, depth: int, y: Any, yi: int, y_row: int, y_column: int,
        ahead: bool,
    ) -> None:  # fmt: skip
        """x [rows, depth] and w [columns, depth], y with strides y_row and y_column."""
        acc = vectors(size)
        for n in range(size):
            put(acc, n, splat(0.0))
        whole = depth // 16 * 16
        for k in range(0, whole, 16):
            for c in range(columns):
                if ahead:  # bring the next columns
                    prefetch_once(w, wi + (columns + c) * depth + k)
                column = load(w, wi + c * depth + k)
                for r in range(rows):
                    n = c * rows + r
                    put(acc, n, get(acc, n) + column * load(x, xi + r * depth + k))
        if size == 16 and whole == depth and y_row == 1 and y_column == rows:
            store(y, yi, totals(acc))
        else:
            for c in range(columns):
                for r in range(rows):
                    s = total(get(acc, c * rows + r))
                    for k in range(whole, depth):
                        s += x[xi + r * depth + k] * number(w, wi + c * depth + k)
                    y[yi + r * y_row + c * y_column] = s

    return dots


outer_4x4, outer_4x1, outer_1x4, outer_1x1 = outer(4, 4), outer(4, 1), outer(1, 4), outer(1, 1)
dots_4x4, dots_4x1, dots_1x4, dots_1x1 = dots(4, 4), dots(4, 1), dots(1, 4), dots(1, 1)


# LINEAR, one row: each weight is read once, as it lies


@compiled
def shrink_row(x: Any, n_in: int, group: int, bits: int) -> None:
    """Put behind a row x [I] the sums of its groups; and let x make up for `code`."""
    for g in range(n_in // group):
        s = np.float32(0)
        for k in range(g * group, (g + 1) * group):
            s += x[k]
        x[n_in + g] = s
    if bits == 8:
        for k in range(n_in):
            x[k] *= SHRINK_8[k % 4]
    else:
        for k in range(n_in):
            x[k] *= SHRINK_4[k % 8]


def times_codes(bits: int) -> Callable[..., None]:
    """Make 16 outputs of y = W·x for codes of so many bits; x is what `shrink_row` has made.

    One tile after the other: several at once bring less from memory (two and four were tried).
    """
    per_word = 32 // bits

    @compiled
    def times(
        w: Any, scales: Any, steps: int, x: Any, tile: int, n_in: int, group: int, y: Any
    ) -> None:
        groups = n_in // group
        result = splat(0.0)
        for g in range(groups):
            acc = vectors(4)  # several, which need not wait for each other
            for n in range(4):
                put(acc, n, splat(0.0))
            for k in range(g * group, (g + 1) * group, per_word):
                i = (tile * n_in + k) // per_word * LANES
                prefetch_once(w, i + AHEAD // 4)
                words = load(w, i)
                for n in range(per_word):
                    a = n % 4
                    put(acc, a, get(acc, a) + code(words, n, bits) * spread(x, k + n))
            fetch_group(scales, tile * groups + g, steps)
            whole = get(acc, 0)
            for a in range(1, 4):
                whole += get(acc, a)
            scale, offset = scale_and_offset(scales, tile * groups + g, steps)
            result += scale * whole + offset * spread(x, n_in + g)
        store(y, tile * LANES, result)

    return times


times_int8, times_int4 = times_codes(8), times_codes(4)


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
                prefetch_once(w, i + (r + 4) * n_out + j)  # of the next four rows
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


def expand_codes(bits: int) -> Callable[..., None]:
    """Make the same for codes of so many bits, of which four tiles make a panel."""
    per_word = 32 // bits
    shrink = SHRINK[bits]

    @compiled
    def expand(
        w: Any, scales: Any, steps: int, tile: int, n_in: int, group: int, first: int,
        depth: int, panel: Any,
    ) -> None:  # fmt: skip
        for c in range(4):
            part = 4 * tile + c
            for k in range(first, first + depth, per_word):
                i = (part * n_in + k) // per_word * LANES
                prefetch(w, i + AHEAD // 4)
                words = load(w, i)
                scale, offset = scale_and_offset(scales, part * (n_in // group) + k // group, steps)
                for n in range(per_word):
                    value = code(words, n, bits) * spread(shrink, n) * scale + offset
                    store(panel, (k + n - first) * TILE + LANES * c, value)

    return expand


expand_int8, expand_int4 = expand_codes(8), expand_codes(4)
