"""The vector-Jacobian product of every op, in the Python array API only.

A product takes the gradient of the loss by the result of its op (g), and the operands of the op.
It returns the gradient by each operand, None where `wanted` is false or the operand is no array of
floats. The pattern of attention is computed again from the operands, not saved.

These definitions are the reference. A backend replaces one by a method of the same name, without
the parameter `ops`, and is tested against the definition here (see `Backend.override`).

Shapes: B sequences, T tokens, H heads, D head width, C = H·D, V vocabulary, N = B·T rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from gptx.backends.base import Backend
from gptx.backends.philox import random_bits
from gptx.backends.positions import Positions

Array = Any
Wanted = tuple[bool, ...]

LOSS_ROWS = 64  # rows of logits that exist at a time


def add(ops: Backend, a: Array, b: Array) -> Array:
    """Return a + b, of the same shape, in a new array: residual sums, and sums of gradients."""
    return a + b


def embed_vjp(
    ops: Backend, g: Array, ids: Array, table: Array, *, wanted: Wanted, total: Array = None
) -> tuple[None, Array]:
    """Return (None, gradient by the table [N, C]) of `Backend.embed`.

    Parameters
    ----------
    g
        Gradient [B, T, C].
    total
        Gradient by the table [N, C] so far, to which this one is added; an override may change it
        in place. None for zeros.
    """
    if not wanted[1]:
        return None, None
    xp = ops.xp
    # The standard has no scatter. A product with one-hot rows has the same sums.
    rows = xp.reshape(ids, (-1, 1)) == ops.arange(table.shape[0])[None, :]
    one_hot = xp.matrix_transpose(xp.astype(rows, g.dtype))
    gradient = xp.matmul(one_hot, xp.reshape(g, (-1, table.shape[1])))
    return None, gradient if total is None else total + gradient


def linear_vjp(
    ops: Backend, g: Array, x: Array, weight: Array, bias: Array, *, wanted: Wanted
) -> tuple[Array, Array, Array]:
    """Return the gradients by x [B, T, I], weight [I, O] and bias [O] of `Backend.linear`.

    `x` may be None if the gradient by the weight is not wanted.
    """
    xp = ops.xp
    rows = xp.reshape(g, (-1, weight.shape[1]))  # [N, O]
    dx = dw = db = None
    if wanted[0]:
        dx = xp.reshape(
            xp.matmul(rows, xp.matrix_transpose(weight)), (*g.shape[:-1], weight.shape[0])
        )
    if wanted[1]:
        dw = xp.matmul(xp.matrix_transpose(xp.reshape(x, (-1, weight.shape[0]))), rows)
    if wanted[2]:
        db = _sum_rows(ops, rows)
    return dx, dw, db


def layer_norm_vjp(
    ops: Backend, g: Array, x: Array, weight: Array, bias: Array, eps: float, *, wanted: Wanted
) -> tuple[Array, Array, Array, None]:
    """Return the gradients by x [B, T, C], weight [C] and bias [C] of `Backend.layer_norm`."""
    xp = ops.xp
    h = xp.astype(x, ops.accumulation_dtype)
    h = h - xp.mean(h, axis=-1, keepdims=True)
    factor = 1.0 / xp.sqrt(xp.mean(h * h, axis=-1, keepdims=True) + eps)
    h = h * factor  # zero mean, unit variance
    wide = xp.astype(g, ops.accumulation_dtype)
    dx = dw = db = None
    if wanted[0]:
        dh = wide * xp.astype(weight, ops.accumulation_dtype)
        mean, slope = (xp.mean(a, axis=-1, keepdims=True) for a in (dh, dh * h))
        dx = xp.astype(factor * (dh - mean - h * slope), ops.float_dtype)
    if wanted[1]:
        dw = _sum_rows(ops, wide * h)
    if wanted[2]:
        db = _sum_rows(ops, wide)
    return dx, dw, db, None


def gelu_new_vjp(ops: Backend, g: Array, x: Array, *, wanted: Wanted) -> tuple[Array]:
    """Return the gradient by x of `Backend.gelu_new`."""
    xp = ops.xp
    y = xp.astype(x, ops.accumulation_dtype)
    c = math.sqrt(2 / math.pi)
    t = xp.tanh(c * (y + 0.044715 * y * y * y))
    slope = 0.5 * (1.0 + t) + 0.5 * c * y * (1.0 - t * t) * (1.0 + 3 * 0.044715 * y * y)
    return (xp.astype(g * slope, ops.float_dtype),)


def gelu_vjp(ops: Backend, g: Array, x: Array, *, wanted: Wanted) -> tuple[Array]:
    """Return the gradient by x of `Backend.gelu`: Φ(x) + x · φ(x)."""
    xp = ops.xp
    y = xp.astype(x, ops.accumulation_dtype)
    density = xp.exp(-0.5 * y * y) * (1 / math.sqrt(2 * math.pi))
    return (xp.astype(g * (ops.normal_cdf(y) + y * density), ops.float_dtype),)


def relu_vjp(ops: Backend, g: Array, x: Array, *, wanted: Wanted) -> tuple[Array]:
    """Return the gradient by x of `Backend.relu`; 0 where x is 0."""
    return (ops.xp.where(x > 0, g, ops.xp.zeros_like(g)),)


def split_heads_vjp(ops: Backend, dq: Array, dk: Array, dv: Array) -> Array:
    """Return the gradient [B, T, 3C] by the operand of `Backend.split_heads`."""
    return ops.xp.concat([_merge_heads(ops, x) for x in (dq, dk, dv)], axis=-1)


def attention_vjp(
    ops: Backend,
    g: Array,
    q: Array,
    k: Array,
    v: Array,
    positions: Positions,
    scale: float,
    *,
    wanted: Wanted,
) -> tuple[Array, Array, Array, None, None]:
    """Return the gradients by q, k and v, each [B, H, T, D], of `Backend.attention`.

    Parameters
    ----------
    g
        Gradient [B, T, C].
    """
    return _attention_vjp(ops, g, q, k, v, positions, scale, lambda x: x)


def dropped_attention(
    ops: Backend,
    q: Array,
    k: Array,
    v: Array,
    positions: Positions,
    scale: float,
    p: float,
    **counters: int,
) -> Array:
    """Return `Backend.attention` with dropout of its pattern, [B, T, C].

    The rows of the pattern are numbered by sequence, head and token. `p` and `counters` are the
    parameters of `dropout`.
    """
    found = function(ops, "pattern")(function(ops, "scores")(q, k, positions, scale))
    return function(ops, "z")(function(ops, "dropout")(found, p, **counters), v)


def dropped_attention_vjp(
    ops: Backend,
    g: Array,
    q: Array,
    k: Array,
    v: Array,
    positions: Positions,
    scale: float,
    p: float,
    *,
    wanted: Wanted,
    **counters: int,
) -> tuple[Array, Array, Array, None, None]:
    """Return the gradients by q, k and v, each [B, H, T, D], of `dropped_attention`."""
    drop = partial(function(ops, "dropout"), p=p, **counters)
    return _attention_vjp(ops, g, q, k, v, positions, scale, drop)


def _attention_vjp(
    ops: Backend,
    g: Array,
    q: Array,
    k: Array,
    v: Array,
    positions: Positions,
    scale: float,
    drop: Callable[[Array], Array],
) -> tuple[Array, Array, Array, None, None]:
    p = function(ops, "pattern")(function(ops, "scores")(q, k, positions, scale))
    dp, dv = function(ops, "z_vjp")(g, drop(p), v, wanted=(True, True))
    (ds,) = function(ops, "pattern_vjp")(drop(dp), p)
    wanted = (True, True, False, False)
    dq, dk, *_ = function(ops, "scores_vjp")(ds, q, k, positions, scale, wanted=wanted)
    return dq, dk, dv, None, None


# The lines of attention as ops: scores, pattern and its product with the values


def scores(ops: Backend, q: Array, k: Array, positions: Positions, scale: float) -> Array:
    """Return scale · q·kᵀ, [B, H, T, T], -inf at the tokens after the own one."""
    xp = ops.xp
    found = xp.astype(xp.matmul(q * scale, xp.matrix_transpose(k)), ops.accumulation_dtype)
    return xp.where(ops.visible(k, positions), found, -math.inf)


def scores_vjp(
    ops: Backend,
    g: Array,
    q: Array,
    k: Array,
    positions: Positions,
    scale: float,
    *,
    wanted: Wanted,
) -> tuple[Array, Array, None, None]:
    """Return the gradients by q and k, each [B, H, T, D], of `scores`."""
    xp = ops.xp
    g = xp.astype(g * scale, ops.float_dtype)
    return xp.matmul(g, k), xp.matmul(xp.matrix_transpose(g), q), None, None


def pattern(ops: Backend, scores: Array) -> Array:
    """Return the attention pattern P, the softmax of scores [B, H, T, T]."""
    return ops.xp.astype(ops.softmax(scores), ops.float_dtype)


def pattern_vjp(ops: Backend, g: Array, p: Array) -> tuple[Array]:
    """Return the gradient by the scores of `pattern`, whose result is p [B, H, T, T]."""
    xp = ops.xp
    p, g = (xp.astype(x, ops.accumulation_dtype) for x in (p, g))
    return (p * (g - xp.sum(g * p, axis=-1, keepdims=True)),)


def z(ops: Backend, p: Array, v: Array) -> Array:
    """Return P [B, H, T, T] times v [B, H, T, D], [B, T, C]."""
    return _merge_heads(ops, ops.xp.matmul(p, v))


def z_vjp(ops: Backend, g: Array, p: Array, v: Array, *, wanted: Wanted) -> tuple[Array, Array]:
    """Return the gradients by P and v of `z`."""
    xp = ops.xp
    B, H, T, D = v.shape
    g = xp.permute_dims(xp.reshape(g, (B, T, H, D)), (0, 2, 1, 3))
    return xp.matmul(g, xp.matrix_transpose(v)), xp.matmul(xp.matrix_transpose(p), g)


# Dropout and the loss


def dropout(
    ops: Backend, x: Array, p: float, *, seed: int, step: int, site: int, first_row: int
) -> Array:
    """Set elements of x to 0 with probability p, and divide the others by 1 - p.

    It is its own vector-Jacobian product. The random bits are those of Philox with the key
    [seed, 0] and the counter [0, step, site, row], see `gptx.backends.philox`. So a row's mask does
    not depend on the split of a batch.

    Parameters
    ----------
    x
        Rows [..., n].
    p
        Probability, rounded to a multiple of 2**-16.
    step, site
        Number of the update, and of the place in the model.
    first_row
        Number of the first row of x in the whole batch.
    """
    xp = ops.xp
    n = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    bits = random_bits(ops, (seed, 0), (step, site), first_row, rows, n)
    kept = xp.reshape(xp.astype(bits, ops.int_dtype) >= round(p * 2**16), x.shape)
    return xp.where(kept, x * (1 / (1 - p)), xp.zeros_like(x))


def cross_entropy(
    ops: Backend, x: Array, table: Array, targets: Array, weights: Array, *, wanted: Wanted
) -> tuple[Array, Array, Array]:
    """Return the loss of `Backend.unembed` of x, and its gradients by x and the table.

    The loss is Σ weights · (logsumexp(logits) - logits[target]). The logits of `LOSS_ROWS` rows
    exist at a time.

    Parameters
    ----------
    x, table
        Rows [N, C] and the head [V, C].
    targets
        Token ids [N].
    weights
        Weight of each row in the loss [N], in the accumulation dtype.
    wanted
        The gradients to compute: by x, by the table.

    Returns
    -------
    loss, dx, dtable
        Scalar in the accumulation dtype, [N, C] and [V, C]; a gradient is None if not wanted.
    """
    xp, N, V = ops.xp, x.shape[0], table.shape[0]
    loss = xp.sum(weights) * 0.0
    dxs, dtable = [], None
    for first in range(0, N, LOSS_ROWS):
        rows = slice(first, min(first + LOSS_ROWS, N))
        logits = xp.matmul(x[rows, :], xp.matrix_transpose(table))
        log_p = ops.log_softmax(xp.astype(logits, ops.accumulation_dtype))
        hot = targets[rows, None] == ops.arange(V)[None, :]
        weight = weights[rows][:, None]
        loss = loss - xp.sum(xp.where(hot, log_p, xp.zeros_like(log_p)) * weight)
        if not any(wanted):
            continue
        g = xp.exp(log_p) - xp.astype(hot, ops.accumulation_dtype)
        g = xp.astype(g * weight, ops.float_dtype)
        if wanted[0]:
            dxs.append(xp.matmul(g, table))
        if wanted[1]:
            part = xp.matmul(xp.matrix_transpose(g), x[rows, :])
            part = xp.astype(part, ops.accumulation_dtype)  # 16 bits lose the sum of many parts
            dtable = part if dtable is None else dtable + part
    dtable = xp.astype(dtable, ops.float_dtype) if wanted[1] else None
    return loss, xp.concat(dxs, axis=0) if wanted[0] else None, dtable


FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        add,
        embed_vjp,
        linear_vjp,
        layer_norm_vjp,
        gelu_new_vjp,
        gelu_vjp,
        relu_vjp,
        split_heads_vjp,
        attention_vjp,
        dropped_attention,
        dropped_attention_vjp,
        scores,
        scores_vjp,
        pattern,
        pattern_vjp,
        z,
        z_vjp,
        dropout,
        cross_entropy,
    )
}


def function(ops: Backend, name: str) -> Callable[..., Any]:
    """Return the backend's override of a function in this file, or the definition here."""
    return ops.override(name) or partial(FUNCTIONS[name], ops)


def _sum_rows(ops: Backend, x: Array) -> Array:
    """Return the sum over all axes but the last, in the backend's dtype."""
    xp = ops.xp
    wide = xp.astype(xp.reshape(x, (-1, x.shape[-1])), ops.accumulation_dtype)
    return xp.astype(xp.sum(wide, axis=0), ops.float_dtype)


def _merge_heads(ops: Backend, x: Array) -> Array:
    """Return x [B, H, T, D] as [B, T, C]."""
    B, H, T, D = x.shape
    return ops.xp.reshape(ops.xp.permute_dims(x, (0, 2, 1, 3)), (B, T, H * D))
