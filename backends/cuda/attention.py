"""Launch the attention kernels of `kernels/attention_decode.cu` and `kernels/attention_prefill.cu`.

Shapes: B sequences, T new tokens, S positions in the cache, H heads, D head width, C = H·D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gptx.backends.cuda.compiler import KernelVariant, kernel
from gptx.backends.cuda.workspace import Workspace

Array = Any

# As in the kernels:
DECODE_BLOCK = (256,)  # threads
MAX_SPLITS = 32  # of a head: each has one lane of a warp
MIN_SPLIT_POSITIONS = 64
PREFILL_TILE = 64  # queries, and positions

UPDATE_BLOCK = (256,)  # threads


def n_splits(B: int, H: int, S: int, multiprocessors: int) -> int:
    """Return the number of blocks that split the positions of a head in a decode step.

    Each multiprocessor gets a block. With fewer than two heads for each multiprocessor, a head has
    two blocks, which balances the load. Short contexts use fewer blocks than this.
    """
    heads = B * H
    splits = -(-multiprocessors // heads)
    if heads < 2 * multiprocessors:
        splits = max(splits, 2)
    return min(splits, MAX_SPLITS, -(-S // MIN_SPLIT_POSITIONS))


def prefill_block(variant: KernelVariant) -> tuple[int, int]:
    """Return threads, and bytes of dynamic shared memory, of a block of `attention_prefill`."""
    D = variant.head_dim
    if variant.dtype == variant.cache_dtype != "float32":  # on tensor cores, double-buffered
        warp_groups = 2 if D <= 128 else 1
        return 128 * warp_groups, 4 * warp_groups * PREFILL_TILE * (-(-D // 16) * 16 + 8) * 2
    queries_and_keys, weights = 2 * (D + 4), PREFILL_TILE + 4
    return 128, PREFILL_TILE * (queries_and_keys + weights) * 4


@dataclass(frozen=True, eq=False)
class AttentionOp:
    """Update of the KV cache, and attention over the cache.

    Attributes
    ----------
    source, target
        Numbers of the buffers of qkv [B·T, 3C] and of the result [B·T, C].
    layer, scale
        Index of the layer, and scale of the scores.
    n_layer, n_head
        L and H.
    variant
        Variant of the kernels.
    """

    source: int
    target: int
    layer: int
    scale: float
    n_layer: int
    n_head: int
    variant: KernelVariant

    def __call__(self, workspace: Workspace) -> None:
        """Launch the kernels on the current stream."""
        n_rows, C = workspace.B * workspace.T, self.n_head * self.variant.head_dim
        qkv = workspace.view(self.source, n_rows, 3 * C, self.variant.array_dtype)
        out = workspace.view(self.target, n_rows, C, self.variant.array_dtype)
        self.launch(qkv, out, workspace)

    def launch(self, qkv: Array, out: Array, workspace: Workspace) -> None:
        """Write keys and values of qkv [B·T, 3C] to the cache, and attend: out [B·T, C]."""
        layer = np.int32(self.layer), np.int32(self.n_layer)
        inputs = qkv, workspace.caches, *layer, workspace.index
        if workspace.T == 1:
            self._launch_decode(inputs, out, workspace)
        else:
            self._launch_prefill(inputs, out, workspace)

    def _launch_decode(self, inputs: tuple[Any, ...], out: Array, workspace: Workspace) -> None:
        attend = kernel("attention_decode.cu", "attention_decode", self.variant)
        grid = workspace.layout.n_splits, self.n_head, workspace.B
        scratch = workspace.partial, workspace.arrived
        args = (*inputs, np.float32(self.scale), *scratch, out, np.int32(self.n_head))
        attend(grid, DECODE_BLOCK, *args, dependent=workspace.dependent_launch)

    def _launch_prefill(self, inputs: tuple[Any, ...], out: Array, workspace: Workspace) -> None:
        B, T, dependent = workspace.B, workspace.T, workspace.dependent_launch
        sizes = np.int32(T), np.int32(self.n_head)
        update = kernel("attention_prefill.cu", "update_kv", self.variant)
        update((B * T,), UPDATE_BLOCK, *inputs, *sizes, dependent=dependent)
        attend = kernel("attention_prefill.cu", "attention_prefill", self.variant)
        threads, shared_bytes = prefill_block(self.variant)
        grid = self.n_head, -(-T // PREFILL_TILE), B
        args = (*inputs, np.float32(self.scale), out, *sizes)
        attend(grid, (threads,), *args, shared_bytes=shared_bytes, dependent=dependent)
