"""The device memory of one pass besides weights and KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from gptx.backends.positions import Positions

Array = Any


@dataclass(frozen=True)
class WorkspaceLayout:
    """Sizes of the workspace of a pass of B sequences with T new tokens.

    Attributes
    ----------
    B, T, n_layer, n_head, head_dim
        Sizes of the pass and of the model.
    buffer_bytes
        Bytes of each buffer of the fused graph. The last buffer holds the logits.
    logits_shape
        (B, V) or (B·T, V).
    normalized_bytes
        Bytes of the widest layer norm [B·T, I] that is not fused in a GEMV.
    last_width
        C, the width of the rows that enter the head.
    n_splits
        Blocks that split the positions of a head in a decode step.
    """

    B: int
    T: int
    n_layer: int
    n_head: int
    head_dim: int
    buffer_bytes: tuple[int, ...]
    logits_shape: tuple[int, int]
    normalized_bytes: int
    last_width: int
    n_splits: int


class Workspace:
    """Buffers and inputs of passes with one layout.

    Parameters
    ----------
    layout
        Sizes of all arrays.
    in_graph
        True if the pass is captured in a CUDA graph, where cuBLAS is not available.

    Attributes
    ----------
    ids
        Token ids, int64 [B, T]; unused if T is 1.
    ids_address
        Address of the token ids, int64 [1], if T is 1.
    index
        Positions of the tokens, int64 [B, T]. If T is 1, it holds the positions of the tokens
        before, and the pass increments them.
    caches
        Addresses of the keys of each layer, then of the values, then S, then the slot of each
        sequence, int64 [2L + 1 + B].
    normalized
        Bytes for the result of a layer norm.
    last
        The last row of each sequence, float32 [B, C].
    partial, arrived
        Workspace of attention_decode: float32 [B, H, n_splits, D + 2], and uint32 [B, H], zeros.
        Consecutive launches on one stream share them.
    dependent_launch
        True if kernels use programmatic dependent launch.
    logits
        Result of the pass, float32 [B, V] or [B·T, V].
    nbytes
        Bytes of the large arrays.
    """

    def __init__(self, layout: WorkspaceLayout, *, in_graph: bool) -> None:
        self.layout, self.B, self.T, self.in_graph = layout, layout.B, layout.T, in_graph
        B, T, H, D = layout.B, layout.T, layout.n_head, layout.head_dim
        self.dependent_launch = False
        self.ids, self.index = (cupy.zeros((B, T), cupy.int64) for _ in range(2))
        self._addresses_array = cupy.zeros(2 * layout.n_layer + 2 + B, cupy.int64)
        self.caches, self.ids_address = self._addresses_array[:-1], self._addresses_array[-1:]
        self.normalized = cupy.empty(layout.normalized_bytes, cupy.uint8)
        self.last = cupy.empty((B, layout.last_width), cupy.float32)
        self._buffers = [cupy.empty(n, cupy.uint8) for n in layout.buffer_bytes]
        self.logits = self.view(len(self._buffers) - 1, *layout.logits_shape, cupy.float32)
        self.partial = cupy.empty((B, H, layout.n_splits, D + 2), cupy.float32)
        self.arrived = cupy.zeros((B, H), cupy.uint32)
        large = (self.normalized, self.last, self.partial, *self._buffers)
        self.nbytes = sum(x.nbytes for x in large)
        self._addresses: list[int] = []  # the host's copy of _addresses_array
        self._positions: list[int] = []  # the host's copy of `index`, if T is 1

    def set_inputs(self, ids: Array, positions: Positions, cache: Any) -> None:
        """Set the inputs of the next pass; values that are already on the device are not copied.

        Parameters
        ----------
        ids
            Token ids [B, n], n <= T; the last one is repeated up to T. If T is 1, the pass reads
            this array, which is kept alive until the next call.
        positions
            Positions of the tokens [B, n].
        cache
            The `gptx.kv_cache.KVCache`.
        """
        addresses = [x.data.ptr for x in (*cache.keys, *cache.values)]
        addresses.append(cache.keys[0].shape[2])
        addresses += range(self.B) if positions.slots is None else positions.slots.tolist()
        host = positions.host
        if self.T == 1:
            self._ids_in_use = cupy.ascontiguousarray(ids, cupy.int64)
            addresses.append(self._ids_in_use.data.ptr)
            before = (host[:, 0] - 1).tolist()
            if before != self._positions:
                self.index.set(np.array(before).reshape(self.B, 1))
            self._positions = [position + 1 for position in before]
        else:
            n = ids.shape[1]
            self.ids[:, :n] = ids
            self.ids[:, n:] = ids[:, -1:]
            repeated = np.repeat(host[:, -1:], self.T - n, axis=1)
            self.index.set(np.concatenate([host, repeated], axis=1))
            addresses.append(0)
        if addresses != self._addresses:
            self._addresses = addresses
            self._addresses_array.set(np.array(addresses, np.int64))

    def view(self, buffer: int, n_rows: int, n: int, dtype: Any) -> Array:
        """Return an array [n_rows, n] at the beginning of a buffer."""
        return cupy.ndarray((n_rows, n), dtype, memptr=self._buffers[buffer].data)
