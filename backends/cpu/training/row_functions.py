"""Row functions in NumPy, for any float type: what ops on many rows do besides products.

`row_kernels.py` has the same functions, compiled. A function gets a thread's share of the rows. It
computes in place or with `out=`, because new memory costs more than arithmetic.
"""

from __future__ import annotations

import math

import numpy as np

from gptx.backends.cpu.interface.instructions import GELU, GELU_NEW

Array = np.ndarray

BLOCK = 2**15  # elements that stay in the caches between NumPy's passes
SLOPE = math.sqrt(2 / math.pi)  # of the tanh's argument at 0


def activate(kind: int, x: Array, y: Array) -> None:
    """Set y [n] to the activation of x [n]."""
    for first in range(0, len(x), BLOCK):
        _activate_block(kind, x[first : first + BLOCK], y[first : first + BLOCK])


def _activate_block(kind: int, x: Array, y: Array) -> None:
    if kind == GELU_NEW:
        _tanh_of_cubic(x, y)
        y += 1.0
        y *= x
        y *= 0.5
    elif kind == GELU:
        np.multiply(x, _normal_cdf(x), out=y)
    else:
        np.maximum(x, 0.0, out=y)


def activate_vjp(kind: int, g: Array, x: Array, dx: Array) -> None:
    """Set dx [n] to g [n] times the derivative of the activation at x [n]."""
    for first in range(0, len(x), BLOCK):
        block = slice(first, first + BLOCK)
        _differentiate_block(kind, g[block], x[block], dx[block])


def _differentiate_block(kind: int, g: Array, x: Array, dx: Array) -> None:
    if kind == GELU_NEW:  # 0.5 (1 + t) + 0.5 x (1 - t²) u', for t = tanh(u)
        t = np.empty_like(x)
        _tanh_of_cubic(x, t)
        np.multiply(x, x, out=dx)
        dx *= 3 * 0.044715 * SLOPE
        dx += SLOPE
        dx *= x
        dx *= 1.0 - t
        dx += 1.0
        t += 1.0
        dx *= t
        dx *= 0.5
        dx *= g
    elif kind == GELU:
        np.multiply(x, x, out=dx)
        dx *= -0.5
        np.exp(dx, out=dx)
        dx *= x
        dx *= 1 / math.sqrt(2 * math.pi)
        dx += _normal_cdf(x)
        dx *= g
    else:
        np.multiply(g, x > 0, out=dx)


def _tanh_of_cubic(x: Array, y: Array) -> None:
    """Set y to the tanh of `Backend.gelu_new`."""
    np.multiply(x, x, out=y)
    y *= 0.044715 * SLOPE
    y += SLOPE
    y *= x
    np.tanh(y, out=y)


def _normal_cdf(x: Array) -> Array:
    """Return `Backend.normal_cdf` of x."""
    z = np.abs(x)
    z *= math.sqrt(0.5)
    t = 1.0 / (1.0 + 0.3275911 * z)
    p = t * 1.061405429
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p += c
        p *= t
    z *= z
    np.negative(z, out=z)
    np.exp(z, out=z)
    z *= p
    z *= 0.5  # 1 - Φ(|x|)
    return np.where(x < 0, z, 1.0 - z)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float, y: Array) -> None:
    """Set y [N, C] to the layer norm of x [N, C]."""
    y[...] = _normalized(x, eps)[0]
    y *= weight
    y += bias


def layer_norm_vjp(
    g: Array, x: Array, weight: Array, eps: float, dx: Array, dw: Array, db: Array
) -> None:
    """Set dx [N, C] to the gradient by x; dw [C] and db [C] to the sums over these rows."""
    h, factor = _normalized(x, eps)
    np.multiply(g, h, out=dx)
    np.add.reduce(dx, axis=0, out=dw)
    np.add.reduce(g, axis=0, out=db)
    n = x.shape[1]
    np.multiply(g, weight, out=dx)
    h *= np.vecdot(dx, h)[:, None] / n
    dx -= np.add.reduce(dx, axis=1, keepdims=True) / n
    dx -= h
    dx *= factor


def _normalized(x: Array, eps: float) -> tuple[Array, Array]:
    """Return the rows of x with zero mean and unit variance, and 1 / the standard deviation."""
    n = x.shape[1]
    h = x - np.add.reduce(x, axis=1, keepdims=True) / n
    factor = 1.0 / np.sqrt(np.vecdot(h, h)[:, None] / n + eps)
    h *= factor
    return h, factor


def add_rows(total: Array, numbers: Array, x: Array, first: int, last: int) -> None:
    """Add the rows of x [N, C] to rows `numbers` [N] of `total`, in columns [first, last)."""
    order = np.argsort(numbers, kind="stable")
    rows, starts = np.unique(numbers[order], return_index=True)
    total[rows, first:last] += np.add.reduceat(x[order, first:last], starts, axis=0)


def causal_softmax(scores: Array, first: int, last: int, scale: float) -> None:
    """Replace rows [first, last) of scores [heads, T, W] by the softmax of their causal part.

    Row r has r + 1 scores, to be multiplied by `scale`; the others, up to `last`, become 0.
    """
    x = scores[:, first:last, :last]
    x *= scale
    np.copyto(x, -math.inf, where=_after(first, last))
    x -= np.maximum.reduce(x, axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= np.add.reduce(x, axis=-1, keepdims=True)


def causal_softmax_vjp(pattern: Array, g: Array, first: int, last: int, scale: float) -> None:
    """Replace rows [first, last) of g, gradients by the pattern, by gradients by the scores.

    Arrays [heads, T, W] and `scale` as of `causal_softmax`.
    """
    p, x = pattern[:, first:last, :last], g[:, first:last, :last]
    np.copyto(x, 0.0, where=_after(first, last))
    x -= np.vecdot(x, p)[..., None]
    x *= p
    x *= scale


def _after(first: int, last: int) -> Array:
    """Return the mask of tokens after the own one, for rows [first, last) and `last` columns."""
    return np.arange(last) > np.arange(first, last)[:, None]


def cross_entropy(logits: Array, V: int, targets: Array, weights: Array, losses: Array) -> None:
    """Set losses [R] to the weighted cross entropy, and the logits to their gradients.

    logits is [R, W], of which V columns count. losses is float64.
    """
    x, rows = logits[:, :V], np.arange(len(logits))
    x -= np.maximum.reduce(x, axis=1, keepdims=True)
    chosen = x[rows, targets].astype(np.float64)
    np.exp(x, out=x)
    total = np.add.reduce(x, axis=1)
    losses[:] = weights * (np.log(total.astype(np.float64)) - chosen)
    x *= (weights / total)[:, None]
    x[rows, targets] -= weights


def adamw(
    w: Array,
    g: Array,
    m: Array,
    v: Array,
    grad_scale: float,
    beta1: float,
    beta2: float,
    rate: float,
    correction2: float,
    eps: float,
    keep: float,
) -> None:
    """Update w, m and v [n] with gradients g [n].

    w becomes keep · w - rate · m / (sqrt(v · correction2) + eps).
    """
    for first in range(0, len(w), BLOCK):
        own = slice(first, first + BLOCK)
        mean, square, weight, x = m[own], v[own], w[own], g[own] * grad_scale
        mean *= beta1
        mean += x * (1 - beta1)
        x *= x
        x *= 1 - beta2
        square *= beta2
        square += x
        np.multiply(square, correction2, out=x)
        np.sqrt(x, out=x)
        x += eps
        np.divide(mean, x, out=x)
        x *= rate
        weight *= keep
        weight -= x
