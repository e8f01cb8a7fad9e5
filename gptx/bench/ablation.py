"""What each thing that a step of generation can reuse is worth, switched on one at a time.

Without any cache, a step reads the whole text again. So does every step here: it runs the unchanged
`gptx.model.forward` over all positions, on a backend whose ops either compute all rows or take
those of earlier positions from memory and compute the newest alone. A rung of the ladder is the set
of what is taken from memory, and the last one does the work of the engine with its cache.

The ops are the generic ones, so that the rungs differ in what they reuse and in nothing else.
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


class Rows:
    """An activation [1, T, C] on its way through the model; its `+` is an op of the backend."""

    def __init__(self, ops: Ablation, array: Array) -> None:
        self.ops = ops
        self.array = array

    def __add__(self, other: Rows) -> Rows:
        return self.ops.add(self, other)

    def __getitem__(self, key: Any) -> Rows:
        return Rows(self.ops, self.array[key])


class Ablation(Backend):
    """The generic ops on NumPy, over all rows of a text or over the newest.

    Parameters
    ----------
    model
        On a NumPy backend, whose threads and dtype are taken.
    reused
        Which of `REUSES` to take from memory for the positions of the pass before.
    table
        Look the GELU up in a table of all 65,536 half floats, as ggml does: a diagnostic, since it
        rounds what goes in and what comes out to 16 bits.
    """

    name = "numpy"
    has_threads = True

    def __init__(
        self, model: Transformer, reused: Collection[str] = (), *, table: bool = False
    ) -> None:
        super().__init__(np, dtype=model.backend.dtype, threads=model.backend.threads)
        self.reused = reused
        self._capacity = model.config.n_positions
        self._qkv = {id(block.attn.c_attn.weight) for block in model.weights.h}
        self._memory: list[Array] = []  # what each op gave, in the order of the pass
        self._op = 0
        self._known = self._length = 0  # rows of the pass before, and of this one
        self._table: Array = None
        if table:
            halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
            activation = getattr(super(), model.config.activation_function)
            with self.scope():  # among them are infinity and what is not a number
                self._table = activation(halves.astype(self.dtype)).astype(np.float16)

    def begin(self, length: int) -> None:
        """Begin a pass over so many rows: those of the pass before and more, or another text's."""
        self._known = self._length if length > self._length else 0
        self._length = length
        self._op = 0

    def _rows(self, what: str, op: Callable[..., Array], *inputs: Array) -> Rows:
        """Run an op [1, T, ...] -> [1, T, C] over all rows, or over those that are not known."""
        if what not in self.reused or inputs[0].shape[1] < self._length:  # the last row, cut out
            return Rows(self, op(*inputs))
        new = op(*(x[:, self._known :] for x in inputs))
        if self._op == len(self._memory):
            self._memory.append(np.zeros((1, self._capacity, new.shape[-1]), new.dtype))
        memory = self._memory[self._op]
        self._op += 1
        memory[:, self._known : self._length] = new
        return Rows(self, memory[:, : self._length])

    def embed(self, ids: Array, table: Array) -> Any:
        op = super().embed
        return self._rows(RESIDUALS, lambda i: op(i, table), ids)

    def add(self, x: Rows, y: Rows) -> Rows:
        """A sum on the residual stream."""
        return self._rows(RESIDUALS, lambda a, b: a + b, x.array, y.array)

    def linear(self, x: Any, weight: Array, bias: Array) -> Any:
        op, C = super().linear, weight.shape[0]
        if LINEAR not in self.reused and KEYS in self.reused and id(weight) in self._qkv:
            kv = self._rows(KEYS, lambda r: op(r, weight[:, C:], bias[C:]), x.array)
            q = op(x.array, weight[:, :C], bias[:C])
            return Rows(self, np.concat([q, kv.array], axis=-1))
        return self._rows(LINEAR, lambda r: op(r, weight, bias), x.array)

    def layer_norm(self, x: Any, weight: Array, bias: Array, eps: float) -> Any:
        op = super().layer_norm
        return self._rows(NORMS, lambda r: op(r, weight, bias, eps), x.array)

    def gelu_new(self, x: Any) -> Any:
        return self._activation(super().gelu_new, x)

    def gelu(self, x: Any) -> Any:
        return self._activation(super().gelu, x)

    def relu(self, x: Any) -> Any:
        return self._activation(super().relu, x)

    def _activation(self, op: Callable[[Array], Array], x: Rows) -> Rows:
        return self._rows(GELU, op if self._table is None else self._looked_up, x.array)

    def _looked_up(self, x: Array) -> Array:
        return np.take(self._table, x.astype(np.float16).view(np.uint16)).astype(self.dtype)

    def split_heads(self, qkv: Any, n_head: int) -> tuple[Array, Array, Array]:
        return super().split_heads(qkv.array, n_head)

    def update_kv(self, buffer: Array, new: Array, positions: Positions) -> Array:
        known = self._known if KEYS in self.reused else 0
        rest = replace(positions, host=positions.host[:, known:])
        return super().update_kv(buffer, new[:, :, known:], rest)

    def attention(self, q: Array, k: Array, v: Array, positions: Positions, scale: float) -> Any:
        op = super().attention

        def rows(queries: Array, index: Array) -> Array:  # [1, T, H, D], [1, T] -> [1, T, C]
            at = replace(positions, host=index)
            return op(np.permute_dims(queries, (0, 2, 1, 3)), k, v, at, scale)

        return self._rows(KEYS, rows, np.permute_dims(q, (0, 2, 1, 3)), positions.host)

    def unembed(self, x: Any, table: Array) -> Array:
        return super().unembed(x.array, table)


def continued(model: Transformer, ops: Ablation, prompt: list[int], n: int) -> list[int]:
    """`n` greedy tokens after a prompt, each step a forward pass over the whole text."""
    model = replace(model, backend=ops)
    ids = list(prompt)
    cache = KVCache(model.config, ops, 1, len(prompt) + n - 1)
    with ops.scope():
        for _ in range(n):
            ops.begin(len(ids))
            cache.lengths[:] = 0  # all positions again: `write` knows which of them are there
            positions = cache.extend([len(ids)])
            last_only = LAST in ops.reused
            logits = forward(
                model, ops.asarray(np.array([ids])), positions, cache, last_only=last_only
            )
            ids.append(int(np.argmax(logits[0, -1])))
    return ids[len(prompt) :]
