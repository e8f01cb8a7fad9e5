"""Gradients, loss and optimizer on CuPy: cuBLAS for products, one kernel for what is between them.

Each method replaces the function of the same name in `gptx.backends.gradients` (or, for the
optimizer, in `gptx.training.optimizers`), which defines it. Sums have a fixed order, without
atomics, so a step gives the same bits again.

Shapes: B sequences, T tokens, H heads, D head width, C = H·D, V vocabulary, N = B·T rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np

from gptx.backends import gradients
from gptx.backends.base import Array, Backend
from gptx.backends.cuda import optimizer
from gptx.backends.cuda.compiler import ROW_BLOCK, KernelVariant, kernel
from gptx.backends.cuda.training_attention import (
    TrainingAttention,
    has_kernels,
    merge_heads,
    packed_rows,
)
from gptx.backends.fusion import ACTIVATIONS
from gptx.backends.gradients import Wanted
from gptx.backends.positions import Positions

WARP = 32
SUM_BLOCK = (WARP, 16)  # threads of a block that sums columns
MIN_SUM_ROWS = 64  # of such a block
BLOCKS_PER_MULTIPROCESSOR = 4
LOAD_BYTES = 16  # of a thread
ELEMENTS_PER_RANDOM_BLOCK = 16  # of `dropout`
EMBED_BLOCK, EMBED_COLUMNS = (WARP, 8), 128  # threads and columns of a block of `embed_vjp`
LOSS_BLOCK = (512,)  # threads of a row of logits
# A row of logits has a multiple of 128 bytes: cuBLAS is slower with V = 50,257.
VOCABULARY_MULTIPLE = 64
MAX_LOGITS_BYTES = 256 * 2**20  # of the logits that exist at a time


class TrainingOps(Backend):
    """The part of `CupyBackend` that trains.

    Attributes
    ----------
    kernel_variant
        Variant of the kernels.
    has_kernels
        True if kernels have the backend's dtypes.
    """

    kernel_variant: KernelVariant
    has_kernels: bool

    def override(self, name: str) -> Callable[..., Any] | None:
        if name in vars(TrainingOps) and not self.has_kernels:
            return None
        return super().override(name)

    def embed_vjp(
        self, g: Array, ids: Array, table: Array, *, wanted: Wanted, total: Array = None
    ) -> tuple[None, Array]:
        if not wanted[1]:
            return None, None
        C = table.shape[1]
        g = cupy.ascontiguousarray(g).reshape(-1, C)
        # Unique keys: any correct sort has the same result.
        keys = cupy.sort((ids.reshape(-1).astype(cupy.int64) << 32) + cupy.arange(len(g)))
        total = cupy.zeros(table.shape, g.dtype) if total is None else total
        total = cupy.ascontiguousarray(total)
        add = kernel("training_embedding.cu", "embed_vjp", self.kernel_variant)
        grid = len(g), _ceil(C, EMBED_COLUMNS)
        add(grid, EMBED_BLOCK, g, keys, total, np.int64(len(g)), np.int32(C))
        return None, total

    def linear_vjp(
        self, g: Array, x: Array, weight: Array, bias: Array, *, wanted: Wanted
    ) -> tuple[Array, Array, Array]:
        n_in, n_out = weight.shape
        rows = cupy.ascontiguousarray(g).reshape(-1, n_out)
        dx = dw = db = None
        if wanted[0]:
            dx = (rows @ weight.T).reshape(*g.shape[:-1], n_in)
        if wanted[1]:
            x = x.reshape(-1, n_in)
            # In the weight's order of memory, for the optimizer.
            dw = x.T @ rows if weight.flags.c_contiguous else (rows.T @ x).T
        if wanted[2]:
            db = self._sum_rows(rows)
        return dx, dw, db

    def layer_norm_vjp(
        self, g: Array, x: Array, weight: Array, bias: Array, eps: float, *, wanted: Wanted
    ) -> tuple[Array, Array, Array, None]:
        g, x = cupy.ascontiguousarray(g), cupy.ascontiguousarray(x)
        n = x.shape[-1]
        rows = x.size // n
        blocks = min(rows, self._max_blocks)
        dx = cupy.empty_like(x) if wanted[0] else None
        with_sums = wanted[1] or wanted[2]
        partial = cupy.empty((blocks, 2 * n), cupy.float32) if with_sums else None
        sizes = np.int64(rows), np.int32(n)
        args = g, x, weight, np.float32(eps), dx, partial, *sizes
        launch = kernel("training_rows.cu", "layer_norm_vjp", self.kernel_variant)
        launch((blocks,), ROW_BLOCK, *args, shared_bytes=3 * n * 4)
        dw = db = None
        if with_sums:
            sums = self._sum_partials(partial)
            dw, db = sums[:n] if wanted[1] else None, sums[n:] if wanted[2] else None
        return dx, dw, db, None

    def gelu_new_vjp(self, g: Array, x: Array, *, wanted: Wanted) -> tuple[Array]:
        return self._activation_vjp("gelu_new", g, x)

    def gelu_vjp(self, g: Array, x: Array, *, wanted: Wanted) -> tuple[Array]:
        return self._activation_vjp("gelu", g, x)

    def relu_vjp(self, g: Array, x: Array, *, wanted: Wanted) -> tuple[Array]:
        return self._activation_vjp("relu", g, x)

    def split_heads_vjp(self, dq: Array, dk: Array, dv: Array) -> Array:
        B, H, T, D = dq.shape
        return merge_heads(dq, dk, dv).reshape(B, T, 3 * H * D)

    # Attention

    def attention(self, q: Array, k: Array, v: Array, positions: Positions, scale: float) -> Array:
        if positions.has_only_new(k) and self.has_kernels and has_kernels(q.shape[3]):
            qkv = packed_rows(q, k, v)
            if qkv is not None:  # else the keys are those of a cache
                return TrainingAttention(q.shape, scale, self.kernel_variant).forward(qkv)
        # In CuPy 14.2, batched matmul fails in bfloat16 and converts float16 to float32. Here, both
        # types are converted to float32.
        return self.z(self.softmax(self.scores(q, k, positions, scale)), v)

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
        B, H, T, D = q.shape
        if has_kernels(D):
            launch = TrainingAttention(q.shape, scale, self.kernel_variant)
            dqkv = launch.backward(cupy.ascontiguousarray(g), merge_heads(q, k, v))
            dq, dk, dv = self.split_heads(dqkv.reshape(B, T, 3 * H * D), H)
            return dq, dk, dv, None, None
        return gradients.attention_vjp(self, g, q, k, v, positions, scale, wanted=wanted)

    def scores(self, q: Array, k: Array, positions: Positions, scale: float) -> Array:
        q, k = self._wide(q, k)
        masked = cupy.arange(k.shape[2]) > positions.index[:, None, :, None]
        lowest = self.accumulation_dtype(-math.inf)
        return cupy.where(masked, lowest, (q * scale) @ k.swapaxes(-1, -2))

    def scores_vjp(
        self, g: Array, q: Array, k: Array, positions: Positions, scale: float, *, wanted: Wanted
    ) -> tuple[Array, Array, None, None]:
        g, q, k = self._wide(g, q, k)
        g = g * scale
        dq, dk = self._narrow(g @ k, g.swapaxes(-1, -2) @ q)
        return dq, dk, None, None

    def pattern(self, scores: Array) -> Array:
        scores = cupy.ascontiguousarray(scores)
        return self._launch_on_rows("pattern", (scores,), self.kernel_variant.array_dtype)

    def pattern_vjp(self, g: Array, p: Array) -> tuple[Array]:
        g, p = cupy.ascontiguousarray(g), cupy.ascontiguousarray(p)
        return (self._launch_on_rows("pattern_vjp", (g, p), cupy.float32),)

    def z(self, p: Array, v: Array) -> Array:
        B, H, T, D = p.shape[:3] + v.shape[3:]
        p, v = self._wide(p, v)
        (heads,) = self._narrow(p @ v)
        return heads.swapaxes(1, 2).reshape(B, T, H * D)

    def z_vjp(self, g: Array, p: Array, v: Array, *, wanted: Wanted) -> tuple[Array, Array]:
        B, H, T, D = v.shape
        g, p, v = self._wide(g.reshape(B, T, H, D).swapaxes(1, 2), p, v)
        dp, dv = self._narrow(g @ v.swapaxes(-1, -2), p.swapaxes(-1, -2) @ g)
        return dp, dv

    def _wide(self, *arrays: Array) -> tuple[Array, ...]:
        """Convert to the accumulation dtype."""
        return tuple(x.astype(self.accumulation_dtype, copy=False) for x in arrays)

    def _narrow(self, *arrays: Array) -> tuple[Array, ...]:
        """Convert to the backend's dtype."""
        return tuple(x.astype(self.float_dtype, copy=False) for x in arrays)

    # Dropout and the loss

    def dropout(
        self, x: Array, p: float, *, seed: int, step: int, site: int, first_row: int
    ) -> Array:
        x = cupy.ascontiguousarray(x)
        out = cupy.empty_like(x)
        n = x.shape[-1]
        rows = x.size // n
        threads = rows * _ceil(n, ELEMENTS_PER_RANDOM_BLOCK)
        launch = kernel("training_elementwise.cu", "dropout", self.kernel_variant)
        launch(
            (_ceil(threads, ROW_BLOCK[0]),),
            ROW_BLOCK,
            x,
            out,
            np.int64(rows),
            np.int32(n),
            *map(np.uint64, (seed, step, site, first_row)),
            np.uint32(round(p * 2**16)),
            np.float32(1 / (1 - p)),
        )
        return out

    def cross_entropy(
        self, x: Array, table: Array, targets: Array, weights: Array, *, wanted: Wanted
    ) -> tuple[Array, Array, Array]:
        (N, C), V = x.shape, table.shape[0]
        stride = _ceil(V, VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        padded = cupy.zeros((stride, C), table.dtype)
        padded[:V] = table
        losses = cupy.empty(N, cupy.float32)
        launch = kernel("training_rows.cu", "cross_entropy", self.kernel_variant)
        dx: Array = cupy.empty_like(x) if wanted[0] else None
        dtable: Array = None
        n_rows = max(1, MAX_LOGITS_BYTES // (stride * x.itemsize))
        for first in range(0, N, n_rows):
            rows = slice(first, min(first + n_rows, N))
            logits = x[rows] @ padded.T
            sizes = V, stride, any(wanted)
            args = logits, targets[rows], weights[rows], losses[rows], *map(np.int32, sizes)
            launch((len(logits),), LOSS_BLOCK, *args)
            if wanted[0]:
                dx[rows] = logits @ padded
            if wanted[1]:
                part = (logits.T @ x[rows])[:V]
                if n_rows < N:  # 16 bits would lose the sum of many parts
                    part = part.astype(cupy.float32, copy=False)
                dtable = part if dtable is None else dtable + part
        if wanted[1]:
            (dtable,) = self._narrow(dtable)
        return losses.sum(), dx, dtable

    # The optimizer

    def adamw_update(
        self,
        weights: Sequence[Array],
        grads: Sequence[Array],
        m: Sequence[Array],
        v: Sequence[Array],
        **options: Any,
    ) -> tuple[list[Array], list[Array], list[Array]]:
        return optimizer.adamw(weights, grads, m, v, **options, variant=self.kernel_variant)

    def squared_norm(self, grads: Sequence[Array]) -> Array:
        return optimizer.squared_norm(grads, self.kernel_variant)

    # Launches

    @property
    def _max_blocks(self) -> int:
        return BLOCKS_PER_MULTIPROCESSOR * int(self.device.attributes["MultiProcessorCount"])

    def _activation_vjp(self, name: str, g: Array, x: Array) -> tuple[Array]:
        g, x = cupy.ascontiguousarray(g), cupy.ascontiguousarray(x)
        dx = cupy.empty_like(x)
        launch = kernel("training_elementwise.cu", "activation_vjp", self.kernel_variant)
        grid = (_ceil(x.nbytes, LOAD_BYTES * ROW_BLOCK[0]),)
        launch(grid, ROW_BLOCK, g, x, dx, np.int64(x.size), np.int32(1 + ACTIVATIONS.index(name)))
        return (dx,)

    def _launch_on_rows(self, name: str, arrays: tuple[Array, ...], dtype: Any) -> Array:
        """Launch a kernel with a warp for each row; return its result."""
        out = cupy.empty(arrays[0].shape, dtype)
        n = out.shape[-1]
        rows = out.size // n
        launch = kernel("training_rows.cu", name, self.kernel_variant)
        grid = (_ceil(rows, ROW_BLOCK[0] // WARP),)
        launch(grid, ROW_BLOCK, *arrays, out, np.int64(rows), np.int32(n))
        return out

    def _sum_rows(self, x: Array) -> Array:
        """Return the sum of x [N, n] over its rows, [n]."""
        N, n = x.shape
        blocks = _ceil(n, WARP)
        parts = max(1, min(_ceil(N, MIN_SUM_ROWS), self._max_blocks // blocks))
        partial = cupy.empty((parts, n), cupy.float32)
        launch = kernel("training_rows.cu", "sum_rows", self.kernel_variant)
        launch((blocks, parts), SUM_BLOCK, x, partial, np.int64(N), np.int32(n))
        return self._sum_partials(partial)

    def _sum_partials(self, partial: Array) -> Array:
        """Return the sum of partial [rows, n] over its rows, [n], in the backend's dtype."""
        rows, n = partial.shape
        out = cupy.empty(n, self.kernel_variant.array_dtype)
        launch = kernel("training_rows.cu", "sum_partials", self.kernel_variant)
        launch((_ceil(n, WARP),), SUM_BLOCK, partial, out, np.int64(rows), np.int32(n))
        return out


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
