"""A backend whose ops reuse their results for earlier positions, each kind of op on request.

Without a cache, a decode step computes the whole text again. Every step here does: it runs the
unchanged `gptx.model.forward` over all positions. Each op computes all rows, or takes the rows of
earlier positions from memory and computes the new ones. With every reuse on, the work is that of
the engine with its cache.

The ops are the generic ones, so that the rungs of the ablation differ in their reuses only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np

from gptx.backends import Backend, Positions
from gptx.kv_cache import KVCache
from gptx.model import Transformer, forward

Array = Any

KEYS, LINEAR, GELU, RESIDUALS, NORMS, LAST = REUSES = (
    "keys and values",  # and the attention of earlier positions to them
    "linear layers",
    "GELU",
    "residuals",  # embeddings and sums
    "layer norms",
    "unembedding of the last position only",
)


class Activation:
    """An activation [1, T, C] in the forward pass; its `+` is an op of the backend."""

    def __init__(self, backend: ReuseBackend, array: Array) -> None:
        self.backend = backend
        self.array = array

    def __add__(self, other: Activation) -> Activation:
        return self.backend.add(self, other)

    def __getitem__(self, key: Any) -> Activation:
        return Activation(self.backend, self.array[key])


class ReuseBackend(Backend):
    """The generic ops on NumPy, over all rows of a text or over the new ones.

    Parameters
    ----------
    model
        A model on a NumPy backend with the same threads and dtype.
    reused
        Those of `REUSES` that are on.
    gelu_table
        Look GELU up in a table of all 65,536 float16 numbers, as ggml does. This is a diagnostic:
        it rounds the input and the output to 16 bits.
    """

    name = "numpy"
    has_threads = True

    def __init__(
        self, model: Transformer, reused: Collection[str] = (), *, gelu_table: bool = False
    ) -> None:
        super().__init__(np, dtype=model.backend.dtype, threads=model.backend.threads)
        self.reused = reused
        self._capacity = model.config.n_positions
        self._qkv = {id(block.attn.c_attn.weight) for block in model.weights.h}
        self._memory: list[Array] = []  # the results of the ops, in the order of the pass
        self._op = 0
        self._done = self._length = 0  # rows of the pass before, and of this one
        self._table: Array = None
        if gelu_table:
            halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
            activation = getattr(super(), model.config.activation_function)
            with self.scope():  # infinities and NaNs are among the numbers
                self._table = activation(halves.astype(self.dtype)).astype(np.float16)

    def begin(self, length: int) -> None:
        """Begin a pass over `length` rows: a text that is not longer than the last is a new one."""
        self._done = self._length if length > self._length else 0
        self._length = length
        self._op = 0

    def _run(self, reuse: str, op: Callable[..., Array], *inputs: Array) -> Activation:
        """Run an op [1, T, ...] -> [1, T, C] over all rows, or over the new ones."""
        if reuse not in self.reused or inputs[0].shape[1] < self._length:  # only the last row
            return Activation(self, op(*inputs))
        new = op(*(x[:, self._done :] for x in inputs))
        if self._op == len(self._memory):
            self._memory.append(np.zeros((1, self._capacity, new.shape[-1]), new.dtype))
        memory = self._memory[self._op]
        self._op += 1
        memory[:, self._done : self._length] = new
        return Activation(self, memory[:, : self._length])

    def embed(self, ids: Array, table: Array) -> Any:
        op = super().embed
        return self._run(RESIDUALS, lambda i: op(i, table), ids)

    def add(self, x: Activation, y: Activation) -> Activation:
        """Add two activations of the residual stream."""
        return self._run(RESIDUALS, lambda a, b: a + b, x.array, y.array)

    def linear(self, x: Any, weight: Array, bias: Array) -> Any:
        op, C = super().linear, weight.shape[0]
        if LINEAR not in self.reused and KEYS in self.reused and id(weight) in self._qkv:
            kv = self._run(KEYS, lambda r: op(r, weight[:, C:], bias[C:]), x.array)
            q = op(x.array, weight[:, :C], bias[:C])
            return Activation(self, np.concat([q, kv.array], axis=-1))
        return self._run(LINEAR, lambda r: op(r, weight, bias), x.array)

    def layer_norm(self, x: Any, weight: Array, bias: Array, eps: float) -> Any:
        op = super().layer_norm
        return self._run(NORMS, lambda r: op(r, weight, bias, eps), x.array)

    def gelu_new(self, x: Any) -> Any:
        return self._activate(super().gelu_new, x)

    def gelu(self, x: Any) -> Any:
        return self._activate(super().gelu, x)

    def relu(self, x: Any) -> Any:
        return self._activate(super().relu, x)

    def _activate(self, op: Callable[[Array], Array], x: Activation) -> Activation:
        return self._run(GELU, op if self._table is None else self._look_up, x.array)

    def _look_up(self, x: Array) -> Array:
        return np.take(self._table, x.astype(np.float16).view(np.uint16)).astype(self.dtype)

    def split_heads(self, qkv: Any, n_head: int) -> tuple[Array, Array, Array]:
        return super().split_heads(qkv.array, n_head)

    def update_kv(self, buffer: Array, new: Array, positions: Positions) -> Array:
        done = self._done if KEYS in self.reused else 0
        rest = replace(positions, host=positions.host[:, done:])
        return super().update_kv(buffer, new[:, :, done:], rest)

    def attention(self, q: Array, k: Array, v: Array, positions: Positions, scale: float) -> Any:
        op = super().attention

        def attend(queries: Array, index: Array) -> Array:  # [1, T, H, D], [1, T] -> [1, T, C]
            rows = replace(positions, host=index)
            return op(np.permute_dims(queries, (0, 2, 1, 3)), k, v, rows, scale)

        return self._run(KEYS, attend, np.permute_dims(q, (0, 2, 1, 3)), positions.host)

    def unembed(self, x: Any, table: Array) -> Array:
        return super().unembed(x.array, table)


def generate_greedy(
    model: Transformer, backend: ReuseBackend, prompt: list[int], n: int
) -> list[int]:
    """Return `n` greedy tokens after a prompt; each step is a forward pass over the whole text."""
    model = replace(model, backend=backend)
    ids = list(prompt)
    cache = KVCache(model.config, backend, 1, len(prompt) + n - 1)
    last_only = LAST in backend.reused
    with backend.scope():
        for _ in range(n):
            backend.begin(len(ids))
            cache.lengths[:] = 0  # all positions again; `update_kv` skips those that are reused
            positions = cache.extend([len(ids)])
            tokens = backend.asarray(np.array([ids]))
            logits = forward(model, tokens, positions, cache, last_only=last_only)
            ids.append(int(np.argmax(logits[0, -1])))
    return ids[len(prompt) :]
