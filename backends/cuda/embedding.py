"""Launch the embedding kernels of `kernels/embedding.cu`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from gptx.backends.cuda.compiler import ROW_BLOCK, kernel
from gptx.backends.cuda.linear import WeightMatrix
from gptx.backends.cuda.workspace import Workspace

Array = Any


@dataclass(frozen=True, eq=False)
class EmbedOp:
    """Token embedding + position embedding -> residual stream, float32 [B·T, C].

    Attributes
    ----------
    table
        Token embeddings [V, C].
    positions
        Position embeddings [n_positions, C].
    target
        Number of the residual stream's buffer.
    """

    table: WeightMatrix
    positions: Array
    target: int

    def __call__(self, workspace: Workspace) -> None:
        """Launch the kernel on the current stream."""
        n_rows, C = workspace.B * workspace.T, self.table.n_in
        if workspace.T == 1:
            name, ids = "embed_decode", workspace.ids_address
        else:
            name, ids = "embed_prefill", workspace.ids
        out = workspace.view(self.target, n_rows, C, cupy.float32)
        args = (ids, workspace.index, *self.table.arrays, self.positions, out, np.int32(C))
        embed = kernel("embedding.cu", name, self.table.variant)
        embed((n_rows,), ROW_BLOCK, *args, dependent=workspace.dependent_launch)
