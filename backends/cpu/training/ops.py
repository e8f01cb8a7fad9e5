"""Ops on many rows, their gradients and the optimizer, for the NumPy backend.

Products go through BLAS on one thread each, with the columns or rows of the result split among
threads. Blocks of rows that fit the caches go through row functions: compiled ones for float32 if
Numba is installed, else NumPy's. The definitions are those of `gptx.backends.base`,
`gptx.backends.gradients` and `gptx.training.optimizers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from gptx.backends import gradients
from gptx.backends.cpu.interface.instructions import GELU, GELU_NEW, RELU
from gptx.backends.cpu.training import row_functions
from gptx.backends.cpu.training.parallel import (
    Heads,
    Parallel,
    as_rows,
    split_blocks,
    split_range,
)
from gptx.backends.positions import Positions

Array = np.ndarray
Wanted = tuple[bool, ...]

MIN_LOSS_ROWS = 32  # of logits that exist at a time
LOSS_BYTES = 2**26  # of the logits that exist at a time
QUERY_ROWS = 64  # queries of a block, which needs no keys after its last one
ADAMW_ELEMENTS = 2**19
NORM_ELEMENTS = 2**15  # summed in the backend's dtype; these sums are added in float64
NORM_SUMS = 2**5  # of a part


class TrainingOps(Parallel):
    """Ops on many rows of a `NumpyBackend`, under the names of the functions that they override."""

    @property
    def _row_functions(self) -> Any:
        """The row functions, compiled if possible."""
        if self.backend.dtype == "float32" and self.backend.compiles:
            try:
                return importlib.import_module("gptx.backends.cpu.training.row_kernels")
            except ImportError:  # no Numba
                pass
        return row_functions

    # Forward

    def linear_rows(self, x: Array, weight: Array, bias: Array) -> Array:
        """Return `Backend.linear`."""
        y = self.allocate((*x.shape[:-1], weight.shape[1]))
        self.multiply(as_rows(x), weight, as_rows(y), bias)
        return y

    def layer_norm_rows(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Return `Backend.layer_norm`."""
        x, weight, bias = (self.writable(a) for a in (x, weight, bias))
        y = self.allocate(x.shape)
        source, target = as_rows(x), as_rows(y)
        function = self._row_functions.layer_norm

        def normalize(first: int, last: int) -> None:
            function(source[first:last], weight, bias, eps, target[first:last])

        self.run_rows(normalize, len(source), x.shape[-1])
        return y

    def activate_rows(self, kind: int, x: Array) -> Array:
        """Return `Backend.gelu_new`, `gelu` or `relu`."""
        x = self.writable(x)
        y = self.allocate(x.shape)
        source, target = x.reshape(-1), y.reshape(-1)
        function = self._row_functions.activate
        self.run_rows(
            lambda first, last: function(kind, source[first:last], target[first:last]), x.size, 1
        )
        return y

    def attention_rows(self, q: Array, k: Array, v: Array, scale: float, drop: Any = None) -> Array:
        """Return `Backend.attention` of sequences without earlier tokens.

        `drop` is None, or an `attention_kernels.Drop`, for shapes that the kernels support.
        """
        B, H, T, D = q.shape
        y = self.allocate((B, T, H * D))
        if kernels := self._attention_kernels(q, k, v):
            operands = kernels.Heads.of(q, k, v)
            size = kernels.workspace_size(T, D, gradient=False)

            def attend_heads(first: int, last: int) -> None:
                workspace = self.allocate((size,))
                kernels.attention(
                    operands, y, scale, drop or kernels.NO_DROP, first, last, workspace
                )

            self.run_shares(attend_heads, B * H)
            return y
        heads = _split_heads(y, H)

        def attend(own: Heads) -> None:
            p = self._pattern(q[own], k[own], scale)
            for first, last in split_blocks(T, QUERY_ROWS):
                values = v[own][..., :last, :]
                np.matmul(p[..., first:last, :last], values, out=heads[own][..., first:last, :])

        self.run_heads(attend, B, H, T)
        return y

    def _attention_kernels(self, q: Array, k: Array, v: Array) -> Any:
        """Return the compiled kernels if they support the shapes, else None."""
        if self._row_functions is row_functions:
            return None
        kernels = importlib.import_module("gptx.backends.cpu.training.attention_kernels")
        return kernels if kernels.supports(q, k, v) else None

    def _pattern(self, q: Array, k: Array, scale: float) -> Array:
        """Return the pattern of some heads, [b, h, T, T] and padding; q and k are [b, h, T, D].

        A row has zeros after its own token, up to the end of its block.
        """
        b, h, T, _ = q.shape
        p = self.allocate((b, h, T, -(-T // 16) * 16))
        for first, last in split_blocks(T, QUERY_ROWS):
            keys = k[..., :last, :].swapaxes(2, 3)
            np.matmul(q[..., first:last, :], keys, out=p[..., first:last, :last])
            row_functions.causal_softmax(_heads(p), first, last, scale)
        return p

    def add(self, a: Array, b: Array) -> Array:
        """Return `gradients.add`."""
        y = self.allocate(a.shape)
        flat_a, flat_b, flat_y = (x.reshape(-1) for x in (a, b, y))

        def add(first: int, last: int) -> None:
            np.add(flat_a[first:last], flat_b[first:last], out=flat_y[first:last])

        self.run_rows(add, y.size, 1)
        return y

    # Gradients

    def linear_vjp(
        self, g: Array, x: Array, weight: Array, bias: Array, *, wanted: Wanted
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Return `gradients.linear_vjp`."""
        n_in, n_out = weight.shape
        rows = as_rows(g)
        dx = self.allocate((*g.shape[:-1], n_in)) if wanted[0] else None
        dw = self.allocate((n_in, n_out)) if wanted[1] else None
        db = np.empty(n_out, self.backend.float_dtype) if wanted[2] else None
        threads = self.product_threads(len(rows) * n_in * n_out)
        parts: list[list[Callable[[], None]]] = []
        if dx is not None:
            parts.append(self.split_product(rows, weight.T, as_rows(dx), threads))
        if dw is not None:
            parts.append(self.split_product(as_rows(x).T, rows, dw, threads))
        if db is not None:
            sums = partial(np.add.reduce, axis=0)
            parts.append(
                [
                    partial(sums, rows[:, first:last], out=db[first:last])
                    for first, last in pairwise(split_range(n_out, threads))
                ]
            )
        self.run_parts(parts)
        return dx, dw, db

    def layer_norm_vjp(
        self, g: Array, x: Array, weight: Array, bias: Array, eps: float, *, wanted: Wanted
    ) -> tuple[Array | None, Array | None, Array | None, None]:
        """Return `gradients.layer_norm_vjp`."""
        g, x, weight = (self.writable(a) for a in (g, x, weight))
        dx = self.allocate(x.shape)
        n = x.shape[-1]
        source, gradient, target = as_rows(x), as_rows(g), as_rows(dx)
        sums: dict[int, tuple[Array, Array]] = {}
        function = self._row_functions.layer_norm_vjp

        def differentiate(first: int, last: int) -> None:
            dw, db = np.empty((2, n), self.backend.float_dtype)
            block = slice(first, last)
            function(gradient[block], source[block], weight, eps, target[block], dw, db)
            sums[first] = dw, db

        self.run_rows(differentiate, len(source), n)
        dw, db = np.add.reduce([sums[first] for first in sorted(sums)], axis=0)
        return dx if wanted[0] else None, dw if wanted[1] else None, db if wanted[2] else None, None

    def gelu_new_vjp(self, g: Array, x: Array, *, wanted: Wanted) -> tuple[Array]:
        """Return `gradients.gelu_new_vjp`."""
        return (self._activate_vjp(GELU_NEW, g, x),)

    def gelu_vjp(self, g: Array, x: Array, *, wanted: Wanted) -> tuple[Array]:
        """Return `gradients.gelu_vjp`."""
        return (self._activate_vjp(GELU, g, x),)

    def relu_vjp(self, g: Array, x: Array, *, wanted: Wanted) -> tuple[Array]:
        """Return `gradients.relu_vjp`."""
        return (self._activate_vjp(RELU, g, x),)

    def _activate_vjp(self, kind: int, g: Array, x: Array) -> Array:
        g, x = self.writable(g), self.writable(x)
        dx = self.allocate(x.shape)
        flat_g, flat_x, flat_dx = (a.reshape(-1) for a in (g, x, dx))
        function = self._row_functions.activate_vjp

        def differentiate(first: int, last: int) -> None:
            block = slice(first, last)
            function(kind, flat_g[block], flat_x[block], flat_dx[block])

        self.run_rows(differentiate, x.size, 1)
        return dx

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
        """Return `gradients.attention_vjp`; the three gradients are views of one array."""
        if not positions.has_only_new(k):
            return gradients.attention_vjp(
                self.backend, g, q, k, v, positions, scale, wanted=wanted
            )
        return self._attention_rows_vjp(g, q, k, v, scale)

    def dropped_attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        positions: Positions,
        scale: float,
        p: float,
        **counters: int,
    ) -> Array:
        """Return `gradients.dropped_attention`."""
        kernels = self._attention_kernels(q, k, v)
        if kernels is None or not positions.has_only_new(k):
            return gradients.dropped_attention(
                self.backend, q, k, v, positions, scale, p, **counters
            )
        return self.attention_rows(q, k, v, scale, kernels.Drop.of(p, **counters))

    def dropped_attention_vjp(
        self,
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
        """Return `gradients.dropped_attention_vjp`; the gradients are views of one array."""
        kernels = self._attention_kernels(q, k, v)
        if kernels is None or not positions.has_only_new(k):
            return gradients.dropped_attention_vjp(
                self.backend, g, q, k, v, positions, scale, p, wanted=wanted, **counters
            )
        return self._attention_rows_vjp(g, q, k, v, scale, kernels.Drop.of(p, **counters))

    def _attention_rows_vjp(
        self, g: Array, q: Array, k: Array, v: Array, scale: float, drop: Any = None
    ) -> tuple[Array, Array, Array, None, None]:
        """Return the gradients of `attention_rows`."""
        B, H, T, D = q.shape
        dq, dk, dv = self.backend.split_heads(self.allocate((B, T, 3 * H * D)), H)
        g = self.writable(g)
        if kernels := self._attention_kernels(q, k, v):
            operands, gradients_of = kernels.Heads.of(q, k, v), kernels.Heads.of(dq, dk, dv)
            size = kernels.workspace_size(T, D, gradient=True)

            def differentiate_heads(first: int, last: int) -> None:
                workspace = self.allocate((size,))
                kernels.attention_vjp(
                    operands, gradients_of, g, scale, drop or kernels.NO_DROP, first, last,
                    workspace,
                )  # fmt: skip

            self.run_shares(differentiate_heads, B * H)
            return dq, dk, dv, None, None
        heads = _split_heads(g, H)

        def differentiate(own: Heads) -> None:
            queries, keys, values, gradient = q[own], k[own], v[own], heads[own]
            p = self._pattern(queries, keys, scale)
            ds = self.allocate(p.shape)
            for first, last in split_blocks(T, QUERY_ROWS):
                rows, before = np.s_[..., first:last, :], np.s_[..., :last, :]
                block = np.s_[..., first:last, :last]
                np.matmul(gradient[rows], values[before].swapaxes(2, 3), out=ds[block])
                row_functions.causal_softmax_vjp(_heads(p), _heads(ds), first, last, scale)
                np.matmul(ds[block], keys[before], out=dq[own][rows])
            for first, last in split_blocks(T, QUERY_ROWS):  # of the keys: later queries read them
                rows, after = np.s_[..., first:last, :], np.s_[..., first:, :]
                p_t, ds_t = (x[..., first:, first:last].swapaxes(2, 3) for x in (p, ds))
                np.matmul(p_t, gradient[after], out=dv[own][rows])
                np.matmul(ds_t, queries[after], out=dk[own][rows])

        self.run_heads(differentiate, B, H, T)
        return dq, dk, dv, None, None

    def split_heads_vjp(self, dq: Array, dk: Array, dv: Array) -> Array:
        """Return `gradients.split_heads_vjp`, without a copy of views of one array."""
        B, H, T, D = dq.shape
        whole = dq.base
        if isinstance(whole, np.ndarray) and whole.shape == (B, T, 3 * H * D):
            views = self.backend.split_heads(whole, H)
            if all(_is_same(x, view) for x, view in zip((dq, dk, dv), views, strict=True)):
                return whole
        return gradients.split_heads_vjp(self.backend, dq, dk, dv)

    def embed_vjp(
        self, g: Array, ids: Array, table: Array, *, wanted: Wanted, total: Array | None = None
    ) -> tuple[None, Array | None]:
        """Return `gradients.embed_vjp`; it adds to `total` in place."""
        if not wanted[1]:
            return None, None
        g = as_rows(self.writable(g))
        if total is None:
            total = self.allocate(table.shape)
            total[...] = 0
        add_rows, numbers = self._row_functions.add_rows, ids.reshape(-1)
        self.run_rows(
            lambda first, last: add_rows(total, numbers, g, first, last), g.shape[1], len(g)
        )
        return None, total

    def cross_entropy(
        self, x: Array, table: Array, targets: Array, weights: Array, *, wanted: Wanted
    ) -> tuple[Array, Array | None, Array | None]:
        """Return `gradients.cross_entropy`."""
        N, V = len(x), len(table)
        dx = self.allocate(x.shape) if wanted[0] else None
        dtable = self.allocate(table.shape) if wanted[1] else None
        losses = np.empty(N, np.float64)
        width = -(-V // 16) * 16
        size = max(1, LOSS_BYTES // (width * x.itemsize))
        size = min(N, max(MIN_LOSS_ROWS, size // 64 * 64))
        # Not recycled: the gradients, which come next, may have this memory.
        memory = np.empty((size, width), self.backend.float_dtype)
        for first in range(0, N, size):
            block = slice(first, min(first + size, N))
            rows = x[block]
            logits = memory[: len(rows), :V]
            self.multiply(rows, table.T, logits)
            self._differentiate_loss(
                memory[: len(rows)], V, targets[block], weights[block], losses[block]
            )
            if dx is not None:
                self.multiply(logits, table, dx[block])
            if dtable is not None:
                self.multiply(logits.T, rows, dtable, add=first > 0)
        return np.asarray(losses.sum(), self.backend.accumulation_dtype), dx, dtable

    def _differentiate_loss(
        self, logits: Array, V: int, targets: Array, weights: Array, losses: Array
    ) -> None:
        function = self._row_functions.cross_entropy

        def differentiate(first: int, last: int) -> None:
            block = slice(first, last)
            function(logits[block], V, targets[block], weights[block], losses[block])

        self.run_rows(differentiate, len(logits), V)

    def dropout(
        self, x: Array, p: float, *, seed: int, step: int, site: int, first_row: int
    ) -> Array:
        """Return `gradients.dropout`."""
        if self._row_functions is row_functions:
            return gradients.dropout(
                self.backend, x, p, seed=seed, step=step, site=site, first_row=first_row
            )
        x = self.writable(x)
        y = self.allocate(x.shape)
        source, target = as_rows(x), as_rows(y)
        counters = np.uint64(seed), np.uint64(step), np.uint64(site)
        threshold, factor = round(p * 2**16), 1 / (1 - p)
        function = self._row_functions.dropout

        def drop(first: int, last: int) -> None:
            block = slice(first, last)
            row = first_row + first
            function(source[block], target[block], *counters, row, threshold, factor)

        self.run_rows(drop, len(source), x.shape[-1])
        return y

    # Optimizer

    def squared_norm(self, grads: Sequence[Array]) -> Array:
        """Return `optimizers.squared_norm`."""
        blocks: list[Array] = []  # [n, NORM_ELEMENTS] or the rest of a gradient, [1, n]
        for flat in (g.reshape(-1) for g in grads):
            end = flat.size // NORM_ELEMENTS * NORM_ELEMENTS
            whole = flat[:end].reshape(-1, NORM_ELEMENTS)
            blocks += [whole[i : i + NORM_SUMS] for i in range(0, len(whole), NORM_SUMS)]
            blocks += [flat[None, end:]] if end < flat.size else []
        squares = np.empty(len(blocks), np.float64)

        def square(i: int) -> None:
            squares[i] = np.vecdot(blocks[i], blocks[i]).sum(dtype=np.float64)

        with self.backend.blas_threads(1):
            self.run(square, len(blocks))
        return np.asarray(squares.sum(), self.backend.accumulation_dtype)

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
        """Return `optimizers.adamw_update`; it changes weights and moments in place."""
        weights, grads, m, v = ([self.writable(a) for a in x] for x in (weights, grads, m, v))
        rate, correction2 = lr / (1 - beta1**step), 1 / (1 - beta2**step)
        blocks = [
            (tuple(a[first : first + ADAMW_ELEMENTS] for a in flat), 1 - lr * decay)
            for *arrays, decay in zip(weights, grads, m, v, decays, strict=True)
            for flat in [[a.reshape(-1) for a in arrays]]
            for first in range(0, flat[0].size, ADAMW_ELEMENTS)
        ]
        function = self._row_functions.adamw

        def update(i: int) -> None:
            arrays, keep = blocks[i]
            function(*arrays, grad_scale, beta1, beta2, rate, correction2, eps, keep)

        self.run(update, len(blocks))
        return weights, m, v

    # Memory and threads


def _split_heads(x: Array, n_head: int) -> Array:
    """Return x [B, T, C] as heads [B, H, T, D]."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def _heads(p: Array) -> Array:
    """Return patterns [b, h, T, W] as [heads, T, W]."""
    return p.reshape(-1, *p.shape[2:])


def _is_same(x: Array, y: Array) -> bool:
    """Test for two views of the same elements."""
    return x.__array_interface__ == y.__array_interface__
