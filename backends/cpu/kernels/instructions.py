"""A program for the NumPy backend's kernels: its columns, and what an instruction does beside its
product.

A program is a table of int64 with an instruction a row, made by `numpy_step.py`. There are three
kinds. EMBED begins; LINEAR is layer norm, product, bias, activation and residual in one; ATTENTION
writes keys and values and reads them all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from gptx.backends.cpu.kernels.gemm import TILE, expand_int4, expand_int8
from gptx.backends.cpu.kernels.group_scales import lane, scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    LANES,
    compiled,
    exp,
    float_array,
    load,
    maximum,
    negative,
    splat,
    store,
    word_array,
)

# Not compiled on their own: LLVM would go through what they call at each level anew.
inlined = njit(inline="always")

EMBED, LINEAR, ATTENTION = range(3)
MATRIX, TABLE, INT8, INT4 = range(4)  # float32 [I, O], float32 [O, I], tiles
NONE, GELU_NEW, GELU, RELU = range(4)

# The columns of a program, whose rows are instructions.
FIELDS = 23
KIND, FORMAT, ACTIVATION, LAST, LAYER = range(5)  # LAST: take each sequence's last token only
SOURCE, TARGET, RESIDUAL = range(5, 8)  # buffers, by number; a residual of -1 is none
SOURCE_WIDTH, TARGET_WIDTH, N_IN, N_OUT, GROUP = range(8, 13)  # of a buffer's row; of a matrix
WEIGHT, SCALES, BIAS = range(13, 16)  # addresses; 0 is none; a bias fills whole tiles
STEPS = 16  # bits of a word that count an offset's scales; 0: floats (see `numpy_groups.py`)
NORM_WEIGHT, NORM_BIAS, POSITIONS = range(17, 20)
EPSILON, SCALE = range(20, 22)  # float64
WORK = 22  # multiplications to a row, about


@inlined
def expand(op: Any, tile: int, first: int, depth: int, panel: Any) -> None:
    """Inputs from `first` on of 64 outputs, codes as floats, panel [depth, TILE]."""
    n_in, group = op[N_IN], op[GROUP]
    size = n_in * (op[N_OUT] + TILE)
    codes, scales, steps = word_array(op[WEIGHT], size), word_array(op[SCALES], size), op[STEPS]
    if op[FORMAT] == INT8:
        expand_int8(codes, scales, steps, tile, n_in, group, first, depth, panel)
    else:
        expand_int4(codes, scales, steps, tile, n_in, group, first, depth, panel)


@compiled
def norm_row(op: Any, source: Any, i: int, x: Any, xi: int, step: int) -> None:
    """source[i : i + I], after the layer norm if there is one, to x[xi], x[xi + step], ..."""
    n = op[N_IN]
    row = source[i : i + n]
    if op[NORM_WEIGHT] == 0:
        for k in range(n):
            x[xi + k * step] = row[k]
        return
    weight, bias = float_array(op[NORM_WEIGHT], n), float_array(op[NORM_BIAS], n)
    mean = np.float32(0)
    for k in range(n):
        mean += row[k]
    mean /= np.float32(n)
    variance = np.float32(0)
    for k in range(n):
        variance += (row[k] - mean) * (row[k] - mean)
    factor = np.float32(1) / np.sqrt(
        variance / np.float32(n) + np.float32(op.view(np.float64)[EPSILON])
    )
    for k in range(n):
        x[xi + k * step] = (row[k] - mean) * factor * weight[k] + bias[k]


@compiled
def activate(activation: int, x: Any) -> Any:
    """What `Backend.gelu_new`, `gelu` and `relu` define, for 16 numbers."""
    one = splat(1.0)
    if activation == GELU_NEW:  # (1 + tanh u) / 2 = 1 / (1 + exp(-2u))
        u = x + splat(0.044715) * x * x * x
        return x / (one + exp(splat(-2 * math.sqrt(2 / math.pi)) * u))
    if activation == GELU:
        z = maximum(x, splat(0.0) - x) * splat(math.sqrt(0.5))
        t = one / (one + splat(0.3275911) * z)
        p = splat(-1.453152027) + t * splat(1.061405429)
        p = splat(-0.284496736) + t * (splat(1.421413741) + t * p)
        half_tail = splat(0.5) * t * (splat(0.254829592) + t * p) * exp(splat(0.0) - z * z)
        below = negative(x)
        return x * (below * half_tail + (one - below) * (one - half_tail))
    return maximum(x, splat(0.0))


@compiled
def finish(op: Any, y: Any, row: int, first: int, last: int, residual: Any) -> None:
    """Bias, activation and residual for outputs of one row, which begins at `row`."""
    bias = float_array(op[BIAS], op[N_OUT] + TILE)
    for j in range(first, last, LANES):
        x = load(y, row + j)
        if op[BIAS] != 0:
            x += load(bias, j)
        if op[ACTIVATION] != NONE:
            x = activate(op[ACTIVATION], x)
        if op[RESIDUAL] >= 0:
            x += load(residual, row + j)
        store(y, row + j, x)


@compiled
def embed(op: Any, tokens: Any, index: Any, y: Any) -> None:
    """Rows of the token table, wherever its format puts them, plus rows of the position table."""
    n_in, group = op[N_IN], op[GROUP]
    size = n_in * (op[N_OUT] + TILE)
    floats, words = float_array(op[WEIGHT], size), word_array(op[WEIGHT], size)
    scales, steps = word_array(op[SCALES], size), op[STEPS]
    positions, bits = float_array(op[POSITIONS], size), 8 if op[FORMAT] == INT8 else 4
    per_word = 32 // bits
    for n in range(len(tokens)):
        token = tokens[n]
        tile, column = token // LANES, token % LANES
        scale, offset = np.float32(0), np.float32(0)
        for k in range(n_in):
            if op[FORMAT] == TABLE:
                value = floats[token * n_in + k]
            else:
                if k % group == 0:
                    both = scale_and_offset(scales, (tile * n_in + k) // group, steps)
                    scale, offset = lane(both[0], column), lane(both[1], column)
                word = words[(tile * n_in + k) // per_word * LANES + column]
                code = (word >> np.uint32(k % per_word * bits)) & np.uint32((1 << bits) - 1)
                value = np.float32(code) * scale + offset
            y[n * op[TARGET_WIDTH] + k] = value + positions[index[n] * n_in + k]


@compiled
def share(n: int, t: int, threads: int) -> tuple[int, int]:
    """From where to where, of n, is thread t's part."""
    return n * t // threads, n * (t + 1) // threads
