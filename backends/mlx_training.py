"""Training on MLX: gradients of its own ops, and a whole step as one compiled function.

MLX is lazy: an op adds a node to a graph, and MLX chooses the order of the computation. Here
`mx.depends` sets this order where it decides how much memory a step needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from gptx.backends import gradients
from gptx.backends.backward import LossFunction
from gptx.backends.base import Array, Backend
from gptx.backends.gradients import Wanted
from gptx.backends.positions import Positions

MAX_BLOCK_LOGITS = 2**22  # logits of `cross_entropy` at a time: 16 MB of float32


class MlxTraining(Backend):
    """The overrides of `gptx.backends.gradients`, the loss function and the optimizer."""

    @property
    def compiles_steps(self) -> bool:
        """True if a training step is compiled.

        On the CPU, MLX compiles with a C++ compiler, a second or more for each of its kernels.
        """
        return self.compiles and mx.default_device().type == mx.gpu

    def loss_function(
        self, forward: Callable[..., Array], model: Any, **options: Any
    ) -> LossFunction:
        with self.scope():
            return MlxLoss(forward, model, compiled=self.compiles_steps, **options)

    def compute_after(self, x: Array, g: Array) -> Array:
        """Return x, computed after g: a result of the forward pass that is computed again."""
        return mx.depends([x], [g])[0]

    def embed_vjp(
        self, g: Array, ids: Array, table: Array, *, wanted: Wanted, total: Array = None
    ) -> tuple[None, Array]:
        if not wanted[1]:
            return None, None
        ids = mx.reshape(ids, (-1,))
        order = mx.argsort(ids)
        ids = mx.take(ids, order)
        rows = mx.astype(mx.take(mx.reshape(g, (ids.size, -1)), order, axis=0), mx.float32)
        n = 1
        while n < ids.size:  # each row becomes the sum of the last 2n rows up to it, of its id
            same = (ids[n:] == ids[:-n])[:, None]
            rows = mx.concatenate([rows[:n], rows[n:] + mx.where(same, rows[:-n], 0.0)])
            n *= 2
        last = mx.concatenate([ids[1:] != ids[:-1], mx.array([True])])[:, None]
        # A GPU adds in any order. The sum repeats, since all rows of an id but the last are 0.
        sums = mx.astype(mx.where(last, rows, 0.0), table.dtype)
        return None, (mx.zeros_like(table) if total is None else total).at[ids].add(sums)

    def linear_vjp(
        self, g: Array, x: Array, weight: Array, bias: Array, *, wanted: Wanted
    ) -> tuple[Array, Array, Array]:
        if wanted[0] and mx.default_device().type == mx.cpu:
            # The BLAS of MLX for Linux takes twice the time for a product with a transposed matrix.
            weight = mx.matrix_transpose(mx.contiguous(mx.matrix_transpose(weight)))
        found = gradients.linear_vjp(self, g, x, weight, bias, wanted=wanted)
        return _weights_first(*found)

    def layer_norm_vjp(
        self, g: Array, x: Array, weight: Array, bias: Array, eps: float, *, wanted: Wanted
    ) -> tuple[Array, Array, Array, None]:
        def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
            return self.layer_norm(x, weight, bias, eps)

        _, found = mx.vjp(layer_norm, [x, weight, bias], [g])
        used = [a if is_wanted else None for a, is_wanted in zip(found, wanted, strict=False)]
        return *_weights_first(*used), None

    def attention_vjp(
        self,
        g: Array,
        q: Array,
        k: Array,
        v: Array,
        positions: Positions,
        scale: float,
        *,
        wanted: Wanted,
    ) -> tuple[Array, Array, Array, None, None]:
        def attention(q: Array, k: Array, v: Array) -> Array:
            return self.attention(q, k, v, positions, scale)

        _, (dq, dk, dv) = mx.vjp(attention, [q, k, v], [g])
        return dq, dk, dv, None, None

    def cross_entropy(
        self, x: Array, table: Array, targets: Array, weights: Array, *, wanted: Wanted
    ) -> tuple[Array, Array, Array]:
        n_rows, n_vocab = x.shape[0], table.shape[0]
        step = max(1, MAX_BLOCK_LOGITS // n_vocab)
        loss, dtable = mx.array(0.0), None
        dxs: list[Array] = []
        for first in range(0, n_rows, step):
            block = slice(first, min(first + step, n_rows))
            rows, target, weight = x[block], targets[block, None], weights[block, None]
            if first:  # one block after the other: MLX would compute the logits of all of them
                before = [loss, *dxs[-1:], *([] if dtable is None else [dtable])]
                rows = mx.depends([rows], before)[0]
            logits = mx.astype(mx.matmul(rows, mx.matrix_transpose(table)), mx.float32)
            total = mx.logsumexp(logits, axis=-1, keepdims=True)
            nll = total - mx.take_along_axis(logits, target, axis=-1)
            loss = loss + mx.sum(nll * weight)
            if not any(wanted):
                continue
            hot = target == mx.arange(n_vocab)[None, :]
            g = mx.astype((mx.exp(logits - total) - hot) * weight, x.dtype)
            if wanted[0]:
                dxs.append(mx.matmul(g, table))
            if wanted[1]:
                part = mx.matmul(mx.matrix_transpose(g), rows)
                if step < n_rows:  # 16 bits would lose the sum of many parts
                    part = mx.astype(part, mx.float32)
                dtable = part if dtable is None else dtable + part
        if dtable is not None:
            dtable = mx.astype(dtable, table.dtype)
        return loss, mx.concatenate(dxs) if wanted[0] else None, dtable

    def adamw_update(
        self,
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
        # The result is not computed yet. The next step computes it, in the memory of the old
        # weights if the caller has none of them any more.
        changing = mx.array([lr, 1 - beta1**step, 1 - beta2**step, grad_scale])
        update = _adamw(beta1, beta2, eps, tuple(decays), self.compiles_steps)
        return update(weights, grads, m, v, changing)


class MlxLoss(LossFunction):
    """A loss whose results start to be computed at once.

    So the graph of a step never has more than this step.

    Parameters
    ----------
    compiled
        Compile the pass, with the counters of dropout as arrays: they do not compile it again.
    forward, model, options
        See `LossFunction`.
    """

    def __init__(
        self, forward: Callable[..., Array], model: Any, *, compiled: bool, **options: Any
    ) -> None:
        super().__init__(forward, model, **options)
        compile: Callable[..., Any] = mx.compile if compiled else lambda f: f
        self._lazy_loss = compile(super()._loss)
        self._lazy_gradients = compile(super()._gradients)

    def _loss(self, *inputs: Any) -> Array:
        return self._start(self._lazy_loss(*inputs))

    def _gradients(self, *inputs: Any) -> tuple[Array, dict[str, Array]]:
        *arrays, step, first_sequence = inputs
        counters = (mx.array(x, dtype=mx.int64) for x in (step, first_sequence))
        return self._start(self._lazy_gradients(*arrays, *counters))

    def _start(self, results: Any) -> Any:
        self.ops.mark_used()
        async_eval: Any = mx.async_eval  # MLX declares it without types
        async_eval(results)
        return results


def _weights_first(dx: Array, *others: Array) -> tuple[Array, ...]:
    """Return gradients, that by x after the others: they free what the backward pass has kept."""
    found = [g for g in others if g is not None]
    if dx is not None and found:
        dx = mx.depends([dx], found)[0]
    return dx, *others


@lru_cache(maxsize=8)
def _adamw(
    beta1: float, beta2: float, eps: float, decays: tuple[float, ...], compiled: bool
) -> Callable[..., tuple[list[Array], list[Array], list[Array]]]:
    """Return AdamW for all tensors: a function of arrays only, so that no number compiles it anew.

    Its last argument [4] has the learning rate, the corrections of the means and the factor of the
    gradients.
    """

    def update(
        weights: list[Array], grads: list[Array], m: list[Array], v: list[Array], changing: Array
    ) -> tuple[list[Array], list[Array], list[Array]]:
        lr, correction1, correction2, grad_scale = changing
        new: tuple[list[Array], list[Array], list[Array]] = ([], [], [])
        for w, g, m_old, v_old, decay in zip(weights, grads, m, v, decays, strict=True):
            g = mx.astype(g, mx.float32) * grad_scale
            m_new = beta1 * m_old + (1 - beta1) * g
            v_new = beta2 * v_old + (1 - beta2) * mx.square(g)
            change = (m_new / correction1) / (mx.sqrt(v_new / correction2) + eps) + decay * w
            for values, array in zip(new, (w - lr * change, m_new, v_new), strict=True):
                values.append(mx.astype(array, w.dtype))
        return new

    return mx.compile(update) if compiled else update
