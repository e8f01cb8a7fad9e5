"""The optimizers: AdamW and SGD, in the array API; a backend may override each function by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from gptx.backends import Backend

Array = Any
OptimizerName = Literal["adamw", "sgd"]
# Optimizer -> names of the arrays that it keeps for each weight, of the weight's shape.
MOMENTS: dict[str, tuple[str, ...]] = {"adamw": ("m", "v"), "sgd": ("m",)}


def squared_norm(ops: Backend, grads: Sequence[Array]) -> Array:
    """Return the sum of the squares of all gradients, a scalar in the accumulation dtype."""
    xp = ops.xp
    total = None
    for g in grads:
        wide = xp.astype(g, ops.accumulation_dtype)
        part = xp.sum(wide * wide)
        total = part if total is None else total + part
    return total


def adamw_update(
    ops: Backend,
    weights: list[Array],
    grads: list[Array],
    m: list[Array],
    v: list[Array],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decays: Sequence[float],
    step: int,
    grad_scale: float,
) -> tuple[list[Array], list[Array], list[Array]]:
    """Return weights and moments after a step of AdamW (https://arxiv.org/abs/1711.05101).

    Parameters
    ----------
    weights, m, v
        Weights, means of their gradients and of the squares, in one dtype. An override may change
        these arrays in place and return them.
    grads
        Gradients, in any float type.
    lr
        Learning rate.
    decays
        Weight decay of each tensor; it is decoupled: not part of the gradient.
    step
        Number of this update, from 1, which corrects the bias of the means.
    grad_scale
        Factor of the gradients.
    """
    xp = ops.xp
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    new: tuple[list[Array], list[Array], list[Array]] = ([], [], [])
    for w, g, m_old, v_old, decay in zip(weights, grads, m, v, decays, strict=True):
        g = xp.astype(g, w.dtype) * grad_scale
        m_new = beta1 * m_old + (1 - beta1) * g
        v_new = beta2 * v_old + (1 - beta2) * g * g
        update = (m_new / correction1) / (xp.sqrt(v_new / correction2) + eps) + decay * w
        for values, array in zip(new, (w - lr * update, m_new, v_new), strict=True):
            values.append(array)
    return new


def sgd_update(
    ops: Backend,
    weights: list[Array],
    grads: list[Array],
    m: list[Array],
    *,
    lr: float,
    momentum: float,
    decays: Sequence[float],
    grad_scale: float,
) -> tuple[list[Array], list[Array]]:
    """Return weights and means of the gradients after a step of SGD with momentum.

    Parameters are those of `adamw_update`; the decay is decoupled, too. With a momentum of 0, `m`
    is empty.
    """
    xp = ops.xp
    new_weights, new_m = [], []
    for i, (w, g, decay) in enumerate(zip(weights, grads, decays, strict=True)):
        g = xp.astype(g, w.dtype) * grad_scale
        if momentum > 0:
            g = momentum * m[i] + g
            new_m.append(g)
        new_weights.append(w - lr * (g + decay * w))
    return new_weights, new_m


FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (squared_norm, adamw_update, sgd_update)
}


def function(ops: Backend, name: str) -> Callable[..., Any]:
    """Return the backend's override of a function of this file, or the definition here."""
    return ops.override(name) or partial(FUNCTIONS[name], ops)
