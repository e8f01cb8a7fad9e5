"""A forward pass as a list of operations that launch kernels, and the layout of its workspace.

The residual stream is float32; other buffers have the backend's dtype.
"""

from __future__ import annotations

from typing import Any

import cupy

from gptx.backends.cuda.attention import AttentionOp, n_splits
from gptx.backends.cuda.compiler import KernelVariant
from gptx.backends.cuda.embedding import EmbedOp
from gptx.backends.cuda.linear import LinearOp, WeightMatrix
from gptx.backends.cuda.workspace import Workspace, WorkspaceLayout
from gptx.backends.fusion import FusedOp
from gptx.backends.graph import UnsupportedOp


class Program:
    """The operations of a fused forward pass, in order.

    Parameters
    ----------
    fused
        The fused ops of the pass.
    model
        The `gptx.model.Transformer` that they are of.

    Attributes
    ----------
    ops
        One operation for each fused op; a call with a workspace launches its kernels.
    macs_per_row
        Multiply-accumulate operations of the tensor cores in a layer, on average, for a row.
    vocab_size
        V.

    Raises
    ------
    gptx.backends.graph.UnsupportedOp
        The kernels do not support a fused op.
    """

    def __init__(self, fused: list[FusedOp], model: Any) -> None:
        self._config = config = model.config
        variant: KernelVariant = model.backend.kernel_variant._replace(head_dim=config.head_dim)
        device = cupy.cuda.Device(variant.device)
        self._variant = variant
        self._multiprocessors = int(device.attributes["MultiProcessorCount"])
        self._row_bytes = [0] * (1 + max(op.target for op in fused))  # of each buffer
        self.ops: list[EmbedOp | AttentionOp | LinearOp] = []
        is_stream: dict[int | None, bool] = {}  # buffers that hold the residual stream
        for f in fused:
            op: EmbedOp | AttentionOp | LinearOp
            if is_stream.get(f.source, False) != (f.norm is not None):
                raise UnsupportedOp(
                    "a layer norm outside of the residual stream, or a product of the residual "
                    "stream without a layer norm"
                )
            if f.kind == "embed":
                op = EmbedOp(WeightMatrix.from_packed(f.weight, variant), f.table, f.target)
                width = op.table.n_in
            elif f.kind == "attention":
                sizes = config.n_layer, config.n_head
                op = AttentionOp(f.source or 0, f.target, f.layer, f.scale, *sizes, variant)
                width = config.n_embd
            else:
                op = LinearOp.from_fused(f, variant, self._multiprocessors)
                width = op.weight.n_out
            is_stream[f.target] = f.kind == "embed" or f.residual is not None
            self._row_bytes[f.target] = max(self._row_bytes[f.target], 4 * width)
            self.ops.append(op)
        *layers, self._head = (op for op in self.ops if isinstance(op, LinearOp))
        self._max_n_in = max(op.weight.n_in for op in (*layers, self._head))
        self.macs_per_row = sum(op.weight.macs_per_row for op in layers) // config.n_layer
        self.vocab_size = self._head.weight.n_out

    def layout(self, B: int, T: int) -> WorkspaceLayout:
        """Return the workspace layout for B sequences with T new tokens."""
        config, n_rows = self._config, B * T
        n_logits = B if self._head.last else n_rows
        *widths, logits_bytes = self._row_bytes
        return WorkspaceLayout(
            B=B,
            T=T,
            n_layer=config.n_layer,
            n_head=config.n_head,
            head_dim=config.head_dim,
            buffer_bytes=(*(n_rows * n for n in widths), n_logits * logits_bytes),
            logits_shape=(n_logits, self.vocab_size),
            normalized_bytes=n_rows * self._max_n_in * self._variant.itemsize,
            last_width=self._head.weight.n_in,
            n_splits=n_splits(B, config.n_head, config.n_positions, self._multiprocessors),
        )

    def launch(self, workspace: Workspace) -> None:
        """Launch all kernels on the current stream."""
        for op in self.ops:
            op(workspace)
