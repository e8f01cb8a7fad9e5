"""Ops on many rows, their gradients and the optimizer, as methods of the NumPy backend.

Products go through BLAS on one thread each, with the columns or rows of the result split among
threads. Blocks of rows that fit the caches go through row functions: compiled ones for float32 if
Numba is installed, else NumPy's. The definitions are those of `gptx.backends.base`,
`gptx.backends.gradients` and `gptx.training.optimizers`.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np

from gptx.backends import base, gradients
from gptx.backends.base import Backend
from gptx.backends.cpu.kernels.instructions import GELU, GELU_NEW, RELU
from gptx.backends.cpu.memory import Recycler
from gptx.backends.cpu.training import row_functions
from gptx.backends.cpu.training.workers import WORKERS
from gptx.backends.positions import Positions

Array = np.ndarray
Wanted = tuple[bool, ...]
Heads = tuple[slice, slice]  # some sequences, and some of their heads

MIN_ROWS = 32  # with fewer rows, calls cost more than the threads gain
MIN_PART_ELEMENTS = 2**15  # of a row function: a thread takes tens of microseconds to begin
MIN_PART_WORK = 2**20  # multiplications of a product
MIN_PART_ROWS = 256  # of a product: each part packs the whole right factor
COLUMN_MULTIPLE = 16  # of a thread's part of a product
LOSS_BYTES = 2**26  # of the logits that exist at a time
ADDED_ROWS = 512  # of a product that is added to a matrix
PATTERN_BYTES = 2**22  # of the patterns that a thread computes at a time
QUERY_ROWS = 64  # queries of a block, which needs no keys after its last one
ADAMW_ELEMENTS = 2**19
NORM_ELEMENTS = 2**15  # summed in the backend's dtype; these sums are added in float64
NORM_SUMS = 2**5  # of a part


class TrainingOps(Backend):
    """Methods of `NumpyBackend`; attributes are those of `Backend`."""

    def __init__(self, xp: Any, **options: Any) -> None:
        super().__init__(xp, **options)
        self.recycler = Recycler()

    @cached_property
    def _row_functions(self) -> Any:
        """The row functions, compiled if possible."""
        if self.dtype == "float32" and self.compiles:
            try:
                return importlib.import_module("gptx.backends.cpu.training.row_kernels")
            except ImportError:  # no Numba
                pass
        return row_functions

    @property
    def _n_threads(self) -> int:
        if self.threads:
            return self.threads
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    # Forward

    def has_many_rows(self, x: Array) -> bool:
        """Test for enough rows to split."""
        return x.size >= MIN_ROWS * x.shape[-1] and x.dtype == self.float_dtype

    def linear_rows(self, x: Array, weight: Array, bias: Array) -> Array:
        """Return `Backend.linear`."""
        y = self._allocate((*x.shape[:-1], weight.shape[1]))
        self._multiply(_rows(x), weight, _rows(y), bias)
        return y

    def layer_norm_rows(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Return `Backend.layer_norm`."""
        x, weight, bias = (self._writable(a) for a in (x, weight, bias))
        y = self._allocate(x.shape)
        source, target = _rows(x), _rows(y)
        function = self._row_functions.layer_norm

        def normalize(first: int, last: int) -> None:
            function(source[first:last], weight, bias, eps, target[first:last])

        self._run_rows(normalize, len(source), x.shape[-1])
        return y

    def activate_rows(self, kind: int, x: Array) -> Array:
        """Return `Backend.gelu_new`, `gelu` or `relu`."""
        x = self._writable(x)
        y = self._allocate(x.shape)
        source, target = x.reshape(-1), y.reshape(-1)
        function = self._row_functions.activate
        self._run_rows(
            lambda first, last: function(kind, source[first:last], target[first:last]), x.size, 1
        )
        return y

    def attention_rows(self, q: Array, k: Array, v: Array, scale: float, drop: Any = None) -> Array:
        """Return `Backend.attention` of sequences without earlier tokens.

        `drop` is None, or an `attention_kernels.Drop`, for shapes that the kernels support.
        """
        B, H, T, D = q.shape
        y = self._allocate((B, T, H * D))
        if kernels := self._attention_kernels(q, k, v):
            operands = kernels.Heads.of(q, k, v)
            size = kernels.workspace_size(T, D, gradient=False)

            def attend_heads(first: int, last: int) -> None:
                workspace = self._allocate((size,))
                kernels.attention(
                    operands, y, scale, drop or kernels.NO_DROP, first, last, workspace
                )

            self._run_shares(attend_heads, B * H)
            return y
        heads = _split_heads(y, H)

        def attend(own: Heads) -> None:
            p = self._pattern(q[own], k[own], scale)
            for first, last in _blocks(T, QUERY_ROWS):
                values = v[own][..., :last, :]
                np.matmul(p[..., first:last, :last], values, out=heads[own][..., first:last, :])

        self._run_heads(attend, B, H, T)
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
        p = self._allocate((b, h, T, -(-T // 16) * 16))
        for first, last in _blocks(T, QUERY_ROWS):
            keys = k[..., :last, :].swapaxes(2, 3)
            np.matmul(q[..., first:last, :], keys, out=p[..., first:last, :last])
            row_functions.causal_softmax(_heads(p), first, last, scale)
        return p

    def add(self, a: Array, b: Array) -> Array:
        """Return `gradients.add`."""
        y = self._allocate(a.shape)
        flat_a, flat_b, flat_y = (x.reshape(-1) for x in (a, b, y))

        def add(first: int, last: int) -> None:
            np.add(flat_a[first:last], flat_b[first:last], out=flat_y[first:last])

        self._run_rows(add, y.size, 1)
        return y

    # Gradients

    def linear_vjp(
        self, g: Array, x: Array, weight: Array, bias: Array, *, wanted: Wanted
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Return `gradients.linear_vjp`."""
        n_in, n_out = weight.shape
        rows = _rows(g)
        dx = self._allocate((*g.shape[:-1], n_in)) if wanted[0] else None
        dw = self._allocate((n_in, n_out)) if wanted[1] else None
        db = np.empty(n_out, self.float_dtype) if wanted[2] else None
        threads = self._product_threads(len(rows) * n_in * n_out)
        parts: list[list[Callable[[], None]]] = []
        if dx is not None:
            parts.append(self._split_product(rows, weight.T, _rows(dx), threads))
        if dw is not None:
            parts.append(self._split_product(_rows(x).T, rows, dw, threads))
        if db is not None:
            sums = partial(np.add.reduce, axis=0)
            parts.append(
                [
                    partial(sums, rows[:, first:last], out=db[first:last])
                    for first, last in pairwise(_split(n_out, threads))
                ]
            )
        self._run_parts(parts)
        return dx, dw, db

    def layer_norm_vjp(
        self, g: Array, x: Array, weight: Array, bias: Array, eps: float, *, wanted: Wanted
    ) -> tuple[Array | None, Array | None, Array | None, None]:
        """Return `gradients.layer_norm_vjp`."""
        g, x, weight = (self._writable(a) for a in (g, x, weight))
        dx = self._allocate(x.shape)
        n = x.shape[-1]
        source, gradient, target = _rows(x), _rows(g), _rows(dx)
        sums: dict[int, tuple[Array, Array]] = {}
        function = self._row_functions.layer_norm_vjp

        def differentiate(first: int, last: int) -> None:
            dw, db = np.empty((2, n), self.float_dtype)
            block = slice(first, last)
            function(gradient[block], source[block], weight, eps, target[block], dw, db)
            sums[first] = dw, db

        self._run_rows(differentiate, len(source), n)
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
        g, x = self._writable(g), self._writable(x)
        dx = self._allocate(x.shape)
        flat_g, flat_x, flat_dx = (a.reshape(-1) for a in (g, x, dx))
        function = self._row_functions.activate_vjp

        def differentiate(first: int, last: int) -> None:
            block = slice(first, last)
            function(kind, flat_g[block], flat_x[block], flat_dx[block])

        self._run_rows(differentiate, x.size, 1)
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
        if not is_whole(k, positions, q.shape[2]):
            return gradients.attention_vjp(self, g, q, k, v, positions, scale, wanted=wanted)
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
        if kernels is None or not is_whole(k, positions, q.shape[2]):
            return gradients.dropped_attention(self, q, k, v, positions, scale, p, **counters)
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
        if kernels is None or not is_whole(k, positions, q.shape[2]):
            return gradients.dropped_attention_vjp(
                self, g, q, k, v, positions, scale, p, wanted=wanted, **counters
            )
        return self._attention_rows_vjp(g, q, k, v, scale, kernels.Drop.of(p, **counters))

    def _attention_rows_vjp(
        self, g: Array, q: Array, k: Array, v: Array, scale: float, drop: Any = None
    ) -> tuple[Array, Array, Array, None, None]:
        """Return the gradients of `attention_rows`."""
        B, H, T, D = q.shape
        dq, dk, dv = self.split_heads(self._allocate((B, T, 3 * H * D)), H)
        g = self._writable(g)
        if kernels := self._attention_kernels(q, k, v):
            operands, gradients_of = kernels.Heads.of(q, k, v), kernels.Heads.of(dq, dk, dv)
            size = kernels.workspace_size(T, D, gradient=True)

            def differentiate_heads(first: int, last: int) -> None:
                workspace = self._allocate((size,))
                kernels.attention_vjp(
                    operands, gradients_of, g, scale, drop or kernels.NO_DROP, first, last,
                    workspace,
                )  # fmt: skip

            self._run_shares(differentiate_heads, B * H)
            return dq, dk, dv, None, None
        heads = _split_heads(g, H)

        def differentiate(own: Heads) -> None:
            queries, keys, values, gradient = q[own], k[own], v[own], heads[own]
            p = self._pattern(queries, keys, scale)
            ds = self._allocate(p.shape)
            for first, last in _blocks(T, QUERY_ROWS):
                rows, before = np.s_[..., first:last, :], np.s_[..., :last, :]
                block = np.s_[..., first:last, :last]
                np.matmul(gradient[rows], values[before].swapaxes(2, 3), out=ds[block])
                row_functions.causal_softmax_vjp(_heads(p), _heads(ds), first, last, scale)
                np.matmul(ds[block], keys[before], out=dq[own][rows])
            for first, last in _blocks(T, QUERY_ROWS):  # of the keys: later queries read them
                rows, after = np.s_[..., first:last, :], np.s_[..., first:, :]
                p_t, ds_t = (x[..., first:, first:last].swapaxes(2, 3) for x in (p, ds))
                np.matmul(p_t, gradient[after], out=dv[own][rows])
                np.matmul(ds_t, queries[after], out=dk[own][rows])

        self._run_heads(differentiate, B, H, T)
        return dq, dk, dv, None, None

    def split_heads_vjp(self, dq: Array, dk: Array, dv: Array) -> Array:
        """Return `gradients.split_heads_vjp`, without a copy of views of one array."""
        B, H, T, D = dq.shape
        whole = dq.base
        if isinstance(whole, np.ndarray) and whole.shape == (B, T, 3 * H * D):
            views = self.split_heads(whole, H)
            if all(_is_same(x, view) for x, view in zip((dq, dk, dv), views, strict=True)):
                return whole
        return gradients.split_heads_vjp(self, dq, dk, dv)

    def embed_vjp(
        self, g: Array, ids: Array, table: Array, *, wanted: Wanted, total: Array | None = None
    ) -> tuple[None, Array | None]:
        """Return `gradients.embed_vjp`; it adds to `total` in place."""
        if not wanted[1]:
            return None, None
        g = _rows(self._writable(g))
        if total is None:
            total = self._allocate(table.shape)
            total[...] = 0
        add_rows, numbers = self._row_functions.add_rows, ids.reshape(-1)
        self._run_rows(
            lambda first, last: add_rows(total, numbers, g, first, last), g.shape[1], len(g)
        )
        return None, total

    def cross_entropy(
        self, x: Array, table: Array, targets: Array, weights: Array, *, wanted: Wanted
    ) -> tuple[Array, Array | None, Array | None]:
        """Return `gradients.cross_entropy`."""
        N, V = len(x), len(table)
        dx = self._allocate(x.shape) if wanted[0] else None
        dtable = self._allocate(table.shape) if wanted[1] else None
        losses = np.empty(N, np.float64)
        width = -(-V // 16) * 16
        size = max(1, LOSS_BYTES // (width * x.itemsize))
        size = min(N, max(MIN_ROWS, size // 64 * 64))
        # Not recycled: the gradients, which come next, may have this memory.
        memory = np.empty((size, width), self.float_dtype)
        for first in range(0, N, size):
            block = slice(first, min(first + size, N))
            rows = x[block]
            logits = memory[: len(rows), :V]
            self._multiply(rows, table.T, logits)
            self._differentiate_loss(
                memory[: len(rows)], V, targets[block], weights[block], losses[block]
            )
            if dx is not None:
                self._multiply(logits, table, dx[block])
            if dtable is not None:
                self._multiply(logits.T, rows, dtable, add=first > 0)
        return np.asarray(losses.sum(), self.accumulation_dtype), dx, dtable

    def _differentiate_loss(
        self, logits: Array, V: int, targets: Array, weights: Array, losses: Array
    ) -> None:
        function = self._row_functions.cross_entropy

        def differentiate(first: int, last: int) -> None:
            block = slice(first, last)
            function(logits[block], V, targets[block], weights[block], losses[block])

        self._run_rows(differentiate, len(logits), V)

    def dropout(
        self, x: Array, p: float, *, seed: int, step: int, site: int, first_row: int
    ) -> Array:
        """Return `gradients.dropout`."""
        if self._row_functions is row_functions:
            return gradients.dropout(
                self, x, p, seed=seed, step=step, site=site, first_row=first_row
            )
        x = self._writable(x)
        y = self._allocate(x.shape)
        source, target = _rows(x), _rows(y)
        counters = np.uint64(seed), np.uint64(step), np.uint64(site)
        threshold, factor = round(p * 2**16), 1 / (1 - p)
        function = self._row_functions.dropout

        def drop(first: int, last: int) -> None:
            block = slice(first, last)
            row = first_row + first
            function(source[block], target[block], *counters, row, threshold, factor)

        self._run_rows(drop, len(source), x.shape[-1])
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

        with self._serial_blas():
            self._run(square, len(blocks))
        return np.asarray(squares.sum(), self.accumulation_dtype)

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
        weights, grads, m, v = ([self._writable(a) for a in x] for x in (weights, grads, m, v))
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

        self._run(update, len(blocks))
        return weights, m, v

    # Memory and threads

    def _allocate(self, shape: tuple[int, ...]) -> Array:
        return self.recycler.allocate(shape, self.float_dtype)

    def _writable(self, x: Array) -> Array:
        """Return x, or a copy if it is read-only, not contiguous or of another type."""
        return np.require(x, self.float_dtype, ["C", "W"])

    def _multiply(
        self, a: Array, b: Array, out: Array, bias: Array | None = None, *, add: bool = False
    ) -> None:
        """Set `out` to a @ b + bias, or add it to `out`; a and b may be transposed."""
        threads = self._product_threads(out.size * a.shape[1])
        self._run_parts([self._split_product(a, b, out, threads, bias, add=add)])

    def _run_parts(self, ops: list[list[Callable[[], None]]]) -> None:
        """Call all functions; the first one of each op on the same thread, and so on."""
        rounds = list(zip_longest(*ops))

        def run(i: int) -> None:
            for function in filter(None, rounds[i]):
                function()

        with self._serial_blas():
            self._run(run, len(rounds))

    def _product_threads(self, multiplications: int) -> int:
        """Return the number of threads for a product."""
        if not self._blas_libraries():  # Accelerate has its own threads
            return 1
        return max(1, min(self._n_threads, multiplications // MIN_PART_WORK))

    @staticmethod
    def _split_product(
        a: Array, b: Array, out: Array, parts: int, bias: Array | None = None, *, add: bool = False
    ) -> list[Callable[[], None]]:
        """Return functions for a part each of `_multiply`."""
        by_column = out.shape[0] < parts * MIN_PART_ROWS
        ends = _split(out.shape[1] if by_column else out.shape[0], parts)

        def multiply(own: slice) -> None:
            left, right = (a, b[:, own]) if by_column else (a[own], b)
            target = out[:, own] if by_column else out[own]
            if add:  # BLAS could add, but NumPy does not pass it on: the product is a temporary
                for first, last in _blocks(len(left), ADDED_ROWS):
                    target[first:last] += left[first:last] @ right
            else:
                np.matmul(left, right, out=target)
            if bias is not None:
                target += bias[own] if by_column else bias

        return [partial(multiply, slice(*own)) for own in pairwise(ends)]

    def _run(self, function: Callable[[int], None], parts: int) -> None:
        WORKERS.run(function, parts, self._n_threads)

    def _run_rows(self, function: Callable[[int, int], None], rows: int, width: int) -> None:
        """Call function(first, last) on a share of the rows for each thread."""
        parts = max(1, min(self._n_threads, rows * width // MIN_PART_ELEMENTS))
        ends = _split(rows, parts)
        self._run(lambda part: function(ends[part], ends[part + 1]), len(ends) - 1)

    def _run_shares(self, function: Callable[[int, int], None], n: int) -> None:
        """Call function(first, last) on a share of range(n) for each thread."""
        parts = min(n, self._n_threads)
        self._run(lambda i: function(n * i // parts, n * (i + 1) // parts), parts)

    def _run_heads(self, function: Callable[[Heads], None], B: int, H: int, T: int) -> None:
        """Call `function` on slices of the sequences and of the heads."""
        count = PATTERN_BYTES // (T * T * self.float_dtype(0).itemsize)
        count = max(1, min(count, -(-B * H // self._n_threads)))
        b, h = max(1, count // H), min(count, H)
        parts = [(slice(i, i + b), slice(j, j + h)) for i in range(0, B, b) for j in range(0, H, h)]
        with self._serial_blas():
            self._run(lambda part: function(parts[part]), len(parts))

    @contextmanager
    def _serial_blas(self) -> Iterator[None]:
        """Set BLAS to one thread a product: its own threads would spin between our parts."""
        with base._blas_lock:
            before = [library.get_num_threads() for library in self._blas_libraries()]
            try:
                self._set_blas([1] * len(before), before)
                yield
            finally:
                self._set_blas(before, [1] * len(before))

    def _blas_libraries(self) -> list[Any]:
        """Return the controllers of BLAS libraries; none if the library has no such setting."""
        if self._blas is None:  # the search takes milliseconds
            import threadpoolctl

            found = threadpoolctl.ThreadpoolController().select(user_api="blas")
            self._blas = found.lib_controllers
        return self._blas


def _rows(x: Array) -> Array:
    """Return x [..., n] as rows [N, n]."""
    return x.reshape(-1, x.shape[-1])


def _split_heads(x: Array, n_head: int) -> Array:
    """Return x [B, T, C] as heads [B, H, T, D]."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def _heads(p: Array) -> Array:
    """Return patterns [b, h, T, W] as [heads, T, W]."""
    return p.reshape(-1, *p.shape[2:])


def _blocks(n: int, size: int) -> list[tuple[int, int]]:
    """Return the begin and end of blocks of range(n)."""
    return [(first, min(first + size, n)) for first in range(0, n, size)]


def _split(n: int, parts: int) -> list[int]:
    """Return the begins of parts of range(n), and n; they are multiples of `COLUMN_MULTIPLE`."""
    size = math.ceil(n / parts / COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    return [*range(0, n, size), n]


def is_whole(k: Array, positions: Positions, T: int) -> bool:
    """Test for keys k [B, H, S, D] of the new tokens only, the same number in each sequence."""
    return positions.aligned and positions.stop == T == k.shape[2]


def _is_same(x: Array, y: Array) -> bool:
    """Test for two views of the same elements."""
    return x.__array_interface__ == y.__array_interface__
