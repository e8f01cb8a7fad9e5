"""Row functions: layer norm, activation, epilogue of a product, embeddings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gptx.backends.cpu.interface.instructions import (
    ACTIVATION,
    BIAS,
    EPSILON,
    FLOAT32_TRANSPOSED,
    FORMAT,
    GELU,
    GELU_NEW,
    GROUP_SIZE,
    GROUPS,
    INT8,
    N_IN,
    N_OUT,
    NO_ACTIVATION,
    NORM_BIAS,
    NORM_WEIGHT,
    OFFSET_BITS,
    POSITION_TABLE,
    RESIDUAL,
    TARGET_WIDTH,
    WEIGHT,
)
from gptx.backends.cpu.interface.sizes import LANES, PANEL_OUTPUTS
from gptx.backends.cpu.kernels.compilation import compiled, float_array, word_array
from gptx.backends.cpu.kernels.group_scales import scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    exp,
    extract_lane,
    is_negative,
    load,
    maximum,
    splat,
    store,
)


@compiled
def normalize_row(op: Any, source: Any, i: int, x: Any, xi: int, stride: int) -> None:
    """Set x[xi], x[xi + stride], ... to source[i : i + I], after the op's layer norm if any."""
    n = op[N_IN]
    row = source[i : i + n]
    if op[NORM_WEIGHT] == 0:
        for k in range(n):
            x[xi + k * stride] = row[k]
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
        x[xi + k * stride] = (row[k] - mean) * factor * weight[k] + bias[k]


@compiled
def activate(activation: int, x: Any) -> Any:
    """Return `Backend.gelu_new`, `gelu` or `relu` of 16 floats."""
    one = splat(1.0)
    if activation == GELU_NEW:  # (1 + tanh u) / 2 = 1 / (1 + exp(-2u))
        u = x + splat(0.044715) * x * x * x
        return x / (one + exp(splat(-2 * math.sqrt(2 / math.pi)) * u))
    if activation == GELU:  # erf by Abramowitz and Stegun, 7.1.26
        z = maximum(x, splat(0.0) - x) * splat(math.sqrt(0.5))
        t = one / (one + splat(0.3275911) * z)
        p = splat(-1.453152027) + t * splat(1.061405429)
        p = splat(-0.284496736) + t * (splat(1.421413741) + t * p)
        half_tail = splat(0.5) * t * (splat(0.254829592) + t * p) * exp(splat(0.0) - z * z)
        below = is_negative(x)
        return x * (below * half_tail + (one - below) * (one - half_tail))
    return maximum(x, splat(0.0))


@compiled
def apply_epilogue(op: Any, y: Any, row: int, first: int, last: int, residual: Any) -> None:
    """Apply bias, activation and residual to outputs [first, last) of the row at y[row]."""
    bias = float_array(op[BIAS], op[N_OUT] + PANEL_OUTPUTS)
    for j in range(first, last, LANES):
        x = load(y, row + j)
        if op[BIAS] != 0:
            x += load(bias, j)
        if op[ACTIVATION] != NO_ACTIVATION:
            x = activate(op[ACTIVATION], x)
        if op[RESIDUAL] >= 0:
            x += load(residual, row + j)
        store(y, row + j, x)


@compiled
def embed_tokens(op: Any, tokens: Any, positions: Any, y: Any) -> None:
    """Set each row of y to the sum of its token embedding, in any format, and its position's."""
    n_in, group_size = op[N_IN], op[GROUP_SIZE]
    size = n_in * (op[N_OUT] + PANEL_OUTPUTS)
    numbers, words = float_array(op[WEIGHT], size), word_array(op[WEIGHT], size)
    groups, offset_bits = word_array(op[GROUPS], size), op[OFFSET_BITS]
    position_table = float_array(op[POSITION_TABLE], size)
    bits = 8 if op[FORMAT] == INT8 else 4
    per_word = 32 // bits
    for n in range(len(tokens)):
        token = tokens[n]
        strip, column = token // LANES, token % LANES
        scale, offset = np.float32(0), np.float32(0)
        for k in range(n_in):
            if op[FORMAT] == FLOAT32_TRANSPOSED:
                value = numbers[token * n_in + k]
            else:
                if k % group_size == 0:
                    entry = (strip * n_in + k) // group_size
                    scales, offsets = scale_and_offset(groups, entry, offset_bits)
                    scale, offset = extract_lane(scales, column), extract_lane(offsets, column)
                word = words[(strip * n_in + k) // per_word * LANES + column]
                quantized = word >> np.uint32(k % per_word * bits)
                quantized &= np.uint32((1 << bits) - 1)
                value = np.float32(quantized) * scale + offset
            y[n * op[TARGET_WIDTH] + k] = value + position_table[positions[n] * n_in + k]
