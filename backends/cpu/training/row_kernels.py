"""Row functions, compiled by Numba for float32: those of `row_functions.py`, vector by vector.

Each function has one thread's share of the rows. Arrays are contiguous and writable. Sums have an
order that depends on shapes only, neither on addresses nor on the number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gptx.backends.cpu.interface.instructions import GELU, GELU_NEW
from gptx.backends.cpu.interface.sizes import LANES
from gptx.backends.cpu.kernels.compilation import compiled
from gptx.backends.cpu.kernels.elementwise import activate as activate_vector
from gptx.backends.cpu.kernels.simd import (
    exp,
    extract_lane,
    is_negative,
    load,
    max_lanes,
    maximum,
    splat,
    store,
    sum_lanes,
)
from gptx.backends.cpu.training.compilation import cached
from gptx.backends.cpu.training.random_factors import random_factors

# Activations


@compiled
def _activation_slope(kind: int, x: Any) -> Any:
    """Return the derivative of `activate_vector` at 16 floats."""
    one = splat(1.0)
    if kind == GELU_NEW:  # s = (1 + tanh u) / 2
        a = splat(0.044715) * x * x
        c = splat(2 * math.sqrt(2 / math.pi))
        s = one / (one + exp(splat(0.0) - c * x * (one + a)))
        return s + c * x * s * (one - s) * (one + splat(3.0) * a)
    if kind == GELU:  # erf by Abramowitz and Stegun, 7.1.26
        z = maximum(x, splat(0.0) - x) * splat(math.sqrt(0.5))
        t = one / (one + splat(0.3275911) * z)
        p = splat(-1.453152027) + t * splat(1.061405429)
        p = splat(-0.284496736) + t * (splat(1.421413741) + t * p)
        e = exp(splat(0.0) - z * z)
        half_tail = splat(0.5) * t * (splat(0.254829592) + t * p) * e
        below = is_negative(x)
        cdf = below * half_tail + (one - below) * (one - half_tail)
        return cdf + x * e * splat(1 / math.sqrt(2 * math.pi))
    return is_negative(splat(0.0) - x)


@cached
def activate(kind: int, x: Any, y: Any) -> None:
    """Set y [n] to the activation of x [n]."""
    last = np.zeros(LANES, np.float32)
    full = len(x) // LANES * LANES
    for i in range(0, full, LANES):
        store(y, i, activate_vector(kind, load(x, i)))
    for i in range(full, len(x)):
        last[i - full] = x[i]
    store(last, 0, activate_vector(kind, load(last, 0)))
    for i in range(full, len(x)):
        y[i] = last[i - full]


@cached
def activate_vjp(kind: int, g: Any, x: Any, dx: Any) -> None:
    """Set dx [n] to g [n] times the derivative of the activation at x [n]."""
    last = np.zeros(LANES, np.float32)
    full = len(x) // LANES * LANES
    for i in range(0, full, LANES):
        store(dx, i, load(g, i) * _activation_slope(kind, load(x, i)))
    for i in range(full, len(x)):
        last[i - full] = x[i]
    store(last, 0, _activation_slope(kind, load(last, 0)))
    for i in range(full, len(x)):
        dx[i] = g[i] * last[i - full]


# Layer norm


@compiled
def _mean_and_factor(x: Any, eps: Any) -> Any:
    """Return the mean of a row, and 1 over its standard deviation."""
    n = np.float32(len(x))
    mean, variance = np.float32(0), np.float32(0)
    for k in range(len(x)):
        mean += x[k]
    mean /= n
    for k in range(len(x)):
        variance += (x[k] - mean) * (x[k] - mean)
    return mean, np.float32(1) / np.sqrt(variance / n + np.float32(eps))


@cached
def layer_norm(x: Any, weight: Any, bias: Any, eps: float, y: Any) -> None:
    """Set y [N, C] to the layer norm of x [N, C]."""
    for r in range(len(x)):
        mean, factor = _mean_and_factor(x[r], eps)
        for k in range(x.shape[1]):
            y[r, k] = (x[r, k] - mean) * factor * weight[k] + bias[k]


@cached
def layer_norm_vjp(g: Any, x: Any, weight: Any, eps: float, dx: Any, dw: Any, db: Any) -> None:
    """Set dx [N, C] to the gradient by x; dw [C] and db [C] to the sums over these rows."""
    dw[:] = 0
    db[:] = 0
    n = np.float32(x.shape[1])
    for r in range(len(x)):
        mean, factor = _mean_and_factor(x[r], eps)
        total, slope = np.float32(0), np.float32(0)
        for k in range(x.shape[1]):
            dh = g[r, k] * weight[k]
            total += dh
            slope += dh * (x[r, k] - mean)
        total, slope = total / n, slope * factor * factor / n
        for k in range(x.shape[1]):
            h = x[r, k] - mean
            dx[r, k] = factor * (g[r, k] * weight[k] - total - h * slope)
            dw[k] += g[r, k] * (h * factor)
            db[k] += g[r, k]


# Embeddings


@cached
def add_rows(total: Any, numbers: Any, x: Any, first: int, last: int) -> None:
    """Add the rows of x [N, C] to rows `numbers` [N] of `total`, in columns [first, last)."""
    for r in range(len(x)):
        row = numbers[r]
        for k in range(first, last):
            total[row, k] += x[r, k]


# Loss


@cached
def cross_entropy(logits: Any, V: int, targets: Any, weights: Any, losses: Any) -> None:
    """Set losses [R] to the weighted cross entropy, and the logits to their gradients.

    logits is [R, W], of which V columns count; W is a multiple of 16. losses is float64.
    """
    R, W = logits.shape
    flat = logits.reshape(-1)
    for r in range(R):
        i, target = r * W, r * W + targets[r]
        for k in range(V, W):
            flat[i + k] = -np.inf
        highest = splat(-np.inf)
        for k in range(0, W, LANES):
            highest = maximum(highest, load(flat, i + k))
        top, sums = max_lanes(highest), splat(0.0)
        chosen, highest = flat[target] - top, splat(top)
        for k in range(0, W, LANES):
            e = exp(load(flat, i + k) - highest)
            store(flat, i + k, e)
            sums += e
        total = sum_lanes(sums)
        losses[r] = weights[r] * (math.log(np.float64(total)) - np.float64(chosen))
        factor = splat(weights[r] / total)
        for k in range(0, W, LANES):
            store(flat, i + k, load(flat, i + k) * factor)
        flat[target] -= weights[r]


# Optimizer


@cached
def adamw(
    w: Any,
    g: Any,
    m: Any,
    v: Any,
    grad_scale: float,
    beta1: float,
    beta2: float,
    rate: float,
    correction2: float,
    eps: float,
    keep: float,
) -> None:
    """Update w, m and v [n] with gradients g [n] in one pass over memory.

    w becomes keep · w - rate · m / (sqrt(v · correction2) + eps).
    """
    scale, b1, b2 = np.float32(grad_scale), np.float32(beta1), np.float32(beta2)
    c1, c2 = np.float32(1 - beta1), np.float32(1 - beta2)
    step, unbiased = np.float32(rate), np.float32(correction2)
    epsilon, kept = np.float32(eps), np.float32(keep)
    for i in range(len(w)):
        x = g[i] * scale
        mean = b1 * m[i] + c1 * x
        square = b2 * v[i] + c2 * x * x
        m[i] = mean
        v[i] = square
        w[i] = kept * w[i] - step * mean / (np.sqrt(square * unbiased) + epsilon)


# Dropout


@cached
def dropout(
    x: Any, y: Any, seed: int, step: int, site: int, first_row: int, threshold: int, factor: float
) -> None:
    """Set y [N, n] to x [N, n] times `factor`, 0 where 16 random bits are below the threshold."""
    n, scale = x.shape[1], np.float32(factor)
    source, target = x.reshape(-1), y.reshape(-1)
    for r in range(len(x)):
        for begin in range(0, n, LANES):
            factors = random_factors(
                seed, step, site, first_row + r, begin // LANES, threshold, scale
            )
            i = r * n + begin
            if begin + LANES <= n:
                store(target, i, load(source, i) * factors)
            else:
                for j in range(n - begin):
                    target[i + j] = source[i + j] * extract_lane(factors, j)
