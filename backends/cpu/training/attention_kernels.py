"""Causal attention and its gradient, compiled by Numba: one head at a time, in the caches.

Products are computed in tiles of 6 rows by 16 columns, which 12 registers of AVX2 hold. The right
matrix is packed to panels of 16 columns. Tiles above the diagonal are skipped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gptx.backends.cpu.interface.sizes import LANES
from gptx.backends.cpu.kernels.compilation import compiled, float_array, inlined
from gptx.backends.cpu.kernels.simd import (
    broadcast,
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
)
from gptx.backends.cpu.training.compilation import cached
from gptx.backends.cpu.training.random_factors import random_factors

ROWS = 6  # of a tile; the last tile of a matrix begins earlier to be a whole one


class Heads(NamedTuple):
    """Queries, keys and values, or their gradients, in memory.

    Attributes
    ----------
    q, k, v
        Addresses of arrays [B, H, T, D].
    sequence_stride, head_stride, row_stride
        Their strides in elements, the same ones for all three; the stride along D is 1.
    shape
        (B, H, T, D).
    """

    q: int
    k: int
    v: int
    sequence_stride: int
    head_stride: int
    row_stride: int
    shape: tuple[int, int, int, int]

    @classmethod
    def of(cls, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Heads:
        """Return the addresses of three arrays, which have to stay alive."""
        sequence, head, row, _ = (stride // q.itemsize for stride in q.strides)
        addresses = q.ctypes.data, k.ctypes.data, v.ctypes.data
        return cls(*addresses, sequence, head, row, q.shape)


class Drop(NamedTuple):
    """Dropout of the pattern, see `gptx.backends.gradients.dropout`.

    Attributes
    ----------
    threshold
        Number of 2**16 random values for which an element is dropped; 0 for no dropout.
    factor
        Factor of the other elements.
    seed, step, site, first_row
        Counters of the random bits; rows are numbered by sequence, head and token.
    """

    threshold: int
    factor: np.float32
    seed: np.uint64
    step: np.uint64
    site: np.uint64
    first_row: int

    @classmethod
    def of(cls, p: float, *, seed: int, step: int, site: int, first_row: int) -> Drop:
        """Return the dropout of a probability."""
        words = np.uint64(seed), np.uint64(step), np.uint64(site)
        return cls(round(p * 2**16), np.float32(1 / (1 - p)), *words, first_row)


NO_DROP = Drop(0, np.float32(1), np.uint64(0), np.uint64(0), np.uint64(0), 0)


def supports(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> bool:
    """Test for float32 arrays [B, H, T, D] of the kernels' sizes and of the same strides."""
    T, D = q.shape[2:]
    return (
        T >= ROWS
        and D % LANES == 0
        and q.dtype == k.dtype == v.dtype == np.float32
        and q.strides == k.strides == v.strides
        and q.strides[3] == q.itemsize
    )


def workspace_size(T: int, D: int, *, gradient: bool) -> int:
    """Return the floats of workspace for `attention`, or for `attention_vjp`."""
    width, panels = pattern_width(T), (T + LANES) * D
    return width + (2 * T * width + 5 * panels if gradient else ROWS * width + 2 * panels)


def pattern_width(T: int) -> int:
    """Return the length of a row of the pattern: an odd number of cache lines.

    Rows at a distance of a power of two would compete for the same places in a cache.
    """
    return ((T + LANES - 1) // LANES | 1) * LANES


_pattern_width = inlined(pattern_width)


@compiled
def _multiply_tile(
    left: Any, i: int, row_stride: int, stride: int,
    right: Any, j: int, depth: int, result: Any, r: int, result_stride: int,
) -> None:  # fmt: skip
    """Set a tile of `result` to 6 rows of `left` times `depth` rows of a panel."""
    sums = stack_vectors(6)
    for n in range(6):
        put_vector(sums, n, splat(0.0))
    for k in range(depth):
        row = load(right, j + k * LANES)
        for n in range(6):
            product = row * broadcast(left, i + n * row_stride + k * stride)
            put_vector(sums, n, get_vector(sums, n) + product)
    for n in range(6):
        store(result, r + n * result_stride, get_vector(sums, n))


@compiled
def _pack_columns(x: Any, first: int, stride: int, T: int, D: int, panels: Any, p: int) -> None:
    """Pack x [T, D] to D / 16 panels [T, 16]."""
    for d in range(0, D, LANES):
        for t in range(T):
            store(panels, p + d * T + t * LANES, load(x, first + t * stride + d))


@compiled
def _pack_rows(x: Any, first: int, stride: int, T: int, D: int, panels: Any, p: int) -> None:
    """Pack x [T, D] to panels [D, 16] of 16 rows, those after the last one 0."""
    for begin in range(0, T, LANES):
        count = min(LANES, T - begin)
        if count < LANES:
            for n in range(D * LANES):
                panels[p + n] = 0
        for n in range(count):
            row = first + (begin + n) * stride
            for d in range(D):
                panels[p + d * LANES + n] = x[row + d]
        p += D * LANES


@compiled
def _softmax_row(scores: Any, i: int, count: int, end: int, scale: Any) -> None:
    """Replace `count` scores by their softmax, and those up to `end` by 0."""
    full = (count + LANES - 1) // LANES * LANES
    for c in range(count, full):
        scores[i + c] = -np.inf
    factor, highest = splat(scale), splat(-np.inf)
    for c in range(0, full, LANES):
        x = load(scores, i + c) * factor
        store(scores, i + c, x)
        highest = maximum(highest, x)
    highest, sums = splat(max_lanes(highest)), splat(0.0)
    for c in range(0, full, LANES):
        e = exp(load(scores, i + c) - highest)
        store(scores, i + c, e)
        sums += e
    inverse = splat(np.float32(1) / sum_lanes(sums))
    for c in range(0, full, LANES):
        store(scores, i + c, load(scores, i + c) * inverse)
    for c in range(count, max(full, end)):
        scores[i + c] = 0


@compiled
def _compute_pattern(
    q: Any, first: int, stride: int, keys: Any, n: int, r: int, T: int, D: int, scale: Any,
    pattern: Any, p: int, width: int,
) -> None:  # fmt: skip
    """Set rows [r, r + 6) of the pattern, at pattern[p], zeros after the own token."""
    for c in range(0, r + ROWS, LANES):
        _multiply_tile(q, first + r * stride, stride, 1, keys, n + c * D, D, pattern, p + c, width)
    end = min(width, r + 2 * ROWS)
    for i in range(ROWS):
        _softmax_row(pattern, p + i * width, r + i + 1, end, scale)


@compiled
def _set_factors(drop: Drop, row: int, count: int, x: Any, at: int) -> None:
    """Set `count` elements at x[at] to the factors of a row; whole vectors are set."""
    for c in range(0, count, LANES):
        block = c // LANES
        store(x, at + c, random_factors(
            drop.seed, drop.step, drop.site, row, block, drop.threshold, drop.factor
        ))  # fmt: skip


@compiled
def _multiply_row(x: Any, i: int, count: int, factors: int) -> None:
    """Multiply `count` elements at x[i], in whole vectors, by those at x[factors]."""
    for c in range(0, count, LANES):
        store(x, i + c, load(x, i + c) * load(x, factors + c))


@cached
def attention(
    heads: Heads, result: Any, scale: float, drop: Drop, first_head: int, last_head: int,
    workspace: Any,
) -> None:  # fmt: skip
    """Set the columns of heads [first_head, last_head) of B·H in `result` [B, T, H·D]."""
    B, H, T, D = heads.shape
    y = result.reshape(-1)
    size = B * heads.sequence_stride
    q, k, v = (float_array(heads.q, size), float_array(heads.k, size), float_array(heads.v, size))
    stride, factor = heads.row_stride, np.float32(scale)
    width, panels = _pattern_width(T), (T + LANES) * D
    keys = ROWS * width
    values = keys + panels
    factors = values + panels
    for head in range(first_head, last_head):
        start = head // H * heads.sequence_stride + head % H * heads.head_stride
        target = head // H * T * H * D + head % H * D
        _pack_rows(k, start, stride, T, D, workspace, keys)
        _pack_columns(v, start, stride, T, D, workspace, values)
        for begin in range(0, T, ROWS):
            r = min(begin, T - ROWS)
            _compute_pattern(
                q, start, stride, workspace, keys, r, T, D, factor, workspace, 0, width
            )
            if drop.threshold > 0:
                for i in range(ROWS):
                    row, count = drop.first_row + head * T + r + i, r + i + 1
                    _set_factors(drop, row, count, workspace, factors)
                    _multiply_row(workspace, i * width, count, factors)
            for d in range(0, D, LANES):
                _multiply_tile(
                    workspace, 0, width, 1, workspace, values + d * T, r + ROWS,
                    y, target + r * H * D + d, H * D,
                )  # fmt: skip


@cached
def attention_vjp(
    heads: Heads, gradients: Heads, result: Any, scale: float, drop: Drop, first_head: int,
    last_head: int, workspace: Any,
) -> None:  # fmt: skip
    """Set the gradients by heads [first_head, last_head) of B·H, from those by the result."""
    B, H, T, D = heads.shape
    g = result.reshape(-1)
    size = B * heads.sequence_stride
    q, k, v = (float_array(heads.q, size), float_array(heads.k, size), float_array(heads.v, size))
    size = B * gradients.sequence_stride
    dq, dk = float_array(gradients.q, size), float_array(gradients.k, size)
    dv = float_array(gradients.v, size)
    stride, out_stride, factor = heads.row_stride, gradients.row_stride, np.float32(scale)
    width, panels = _pattern_width(T), (T + LANES) * D
    # Places in the workspace: the pattern, its gradient, and panels
    ds = T * width
    key_rows = 2 * ds
    value_rows = key_rows + panels
    key_columns = value_rows + panels
    query_columns = key_columns + panels
    g_columns = query_columns + panels
    factors = g_columns + panels
    for head in range(first_head, last_head):
        start = head // H * heads.sequence_stride + head % H * heads.head_stride
        out = head // H * gradients.sequence_stride + head % H * gradients.head_stride
        given = head // H * T * H * D + head % H * D
        _pack_rows(k, start, stride, T, D, workspace, key_rows)
        _pack_rows(v, start, stride, T, D, workspace, value_rows)
        _pack_columns(k, start, stride, T, D, workspace, key_columns)
        _pack_columns(q, start, stride, T, D, workspace, query_columns)
        _pack_columns(g, given, H * D, T, D, workspace, g_columns)
        for begin in range(0, T, ROWS):
            r = min(begin, T - ROWS)
            p = r * width
            _compute_pattern(
                q, start, stride, workspace, key_rows, r, T, D, factor, workspace, p, width
            )
            for c in range(0, r + ROWS, LANES):
                _multiply_tile(
                    g, given + r * H * D, H * D, 1, workspace, value_rows + c * D, D,
                    workspace, ds + p + c, width,
                )  # fmt: skip
            for i in range(ROWS):
                count, at = r + i + 1, p + i * width
                if drop.threshold > 0:
                    row = drop.first_row + head * T + r + i
                    _set_factors(drop, row, count, workspace, factors)
                    _multiply_row(workspace, ds + at, count, factors)
                _differentiate_softmax_row(
                    workspace, at, ds + at, count, min(width, r + 2 * ROWS), factor
                )
                if drop.threshold > 0:  # the gradient by the values reads the dropped pattern
                    _multiply_row(workspace, at, count, factors)
            for d in range(0, D, LANES):
                _multiply_tile(
                    workspace, ds + p, width, 1, workspace, key_columns + d * T, r + ROWS,
                    dq, out + r * out_stride + d, out_stride,
                )  # fmt: skip
        for begin in range(0, T, ROWS):  # of the keys, which the queries from there on read
            c = min(begin, T - ROWS)
            for d in range(0, D, LANES):
                to = out + c * out_stride + d
                at = c * width + c
                _multiply_tile(
                    workspace, at, 1, width, workspace, g_columns + d * T + c * LANES, T - c,
                    dv, to, out_stride,
                )  # fmt: skip
                _multiply_tile(
                    workspace, ds + at, 1, width, workspace, query_columns + d * T + c * LANES,
                    T - c, dk, to, out_stride,
                )  # fmt: skip


@compiled
def _differentiate_softmax_row(x: Any, p: int, g: int, count: int, end: int, scale: Any) -> None:
    """Replace `count` gradients by a row of the pattern, at x[g], by those by the scores."""
    mean = np.float32(0)
    for c in range(count):
        mean += x[p + c] * x[g + c]
    for c in range(count):
        x[g + c] = x[p + c] * (x[g + c] - mean) * scale
    for c in range(count, end):
        x[g + c] = 0
