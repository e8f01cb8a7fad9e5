"""Launch the attention kernels of `kernels/training_attention.cu`, for whole sequences.

The kernels read queries, keys and values where `linear` has written them, in rows qkv [B·T, 3C].

Shapes: B sequences, T tokens, H heads, D head width, C = H·D.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from gptx.backends.cuda.compiler import Kernel, KernelVariant, kernel

Array = Any

# As in the kernels:
BLOCK = (128,)  # threads
ROWS = 64  # of a block
MAX_HEAD_DIM = 128
HEAD_MULTIPLE = 8


def has_kernels(head_dim: int) -> bool:
    """Test for kernels for a width of heads."""
    return head_dim <= MAX_HEAD_DIM and head_dim % HEAD_MULTIPLE == 0


def shared_bytes(variant: KernelVariant) -> int:
    """Return the bytes of dynamic shared memory of a block."""
    D, itemsize = variant.head_dim, variant.itemsize
    columns = 64 if itemsize == 2 and D <= 64 else 32
    stride = -(-D // 16) * 16 + 16 // itemsize
    tiles = (2 * ROWS + 4 * columns) * stride * itemsize
    scratch = ROWS * (columns + 4) * 4 if itemsize == 4 else 0
    return tiles + 4 * columns * 4 + scratch


def packed_rows(q: Array, k: Array, v: Array) -> Array | None:
    """Return the rows [B·T, 3C] that q, k and v [B, H, T, D] are views of; None if they are not."""
    B, H, T, D = q.shape
    C, itemsize = H * D, q.itemsize
    strides = np.array([3 * T * C, D, 3 * C, 1]) * itemsize
    for part, x in enumerate((q, k, v)):
        fits = x.shape == q.shape and x.dtype == q.dtype and x.data.mem is q.data.mem
        # The stride of an axis of one element has no meaning.
        fits &= all(n == 1 or a == b for n, a, b in zip(x.shape, x.strides, strides, strict=True))
        if not fits or x.data.ptr != q.data.ptr + part * C * itemsize:
            return None
    return cupy.ndarray((B * T, 3 * C), q.dtype, memptr=q.data)


def merge_heads(q: Array, k: Array, v: Array) -> Array:
    """Return q, k and v [B, H, T, D] as rows [B·T, 3C]: a view if possible, else a copy."""
    rows = packed_rows(q, k, v)
    if rows is None:
        B, H, T, D = q.shape
        parts = [x.transpose(0, 2, 1, 3).reshape(B * T, H * D) for x in (q, k, v)]
        rows = cupy.concatenate(parts, axis=1)
    return rows


class TrainingAttention:
    """Attention of B sequences of T tokens, and its gradients.

    Parameters
    ----------
    shape
        (B, H, T, D).
    scale
        Scale of the scores.
    variant
        Variant of the kernels.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], scale: float, variant: KernelVariant
    ) -> None:
        self.B, self.H, self.T, D = shape
        self.C = self.H * D
        self._variant = variant._replace(head_dim=D)
        self._scale = np.float32(scale)
        self._sizes = np.int32(self.T), np.int32(self.H)

    def forward(self, qkv: Array) -> Array:
        """Return attention of qkv [B·T, 3C], [B, T, C]."""
        out = cupy.empty((self.B, self.T, self.C), qkv.dtype)
        self._launch("attention_forward", qkv, self._scale, out)
        return out

    def backward(self, g: Array, qkv: Array) -> Array:
        """Return the gradient [B·T, 3C] by qkv [B·T, 3C], from that of the result, g [B, T, C]."""
        dqkv = cupy.empty_like(qkv)
        statistics = cupy.empty((self.B, self.H, self.T, 2), cupy.float32)
        self._launch("attention_vjp_queries", g, qkv, self._scale, dqkv, statistics)
        self._launch("attention_vjp_keys", g, qkv, self._scale, statistics, dqkv)
        return dqkv

    def _launch(self, name: str, *args: Any) -> None:
        launch: Kernel = kernel("training_attention.cu", name, self._variant)
        grid = self.H, -(-self.T // ROWS), self.B
        n_bytes = shared_bytes(self._variant)
        launch(grid, BLOCK, *args, *self._sizes, shared_bytes=n_bytes)
