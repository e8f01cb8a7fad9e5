"""The NumPy backend's forward pass as one compiled call: traced, fused, run as a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gptx.backends.cpu.interface.cpu_features import HAS_FLOAT16
from gptx.backends.cpu.interface.instructions import N_OUT
from gptx.backends.cpu.memory import allocate_aligned
from gptx.backends.cpu.program import Program, Shape, padded_rows
from gptx.backends.fusion import trace_fused
from gptx.backends.graph import UnsupportedOp
from gptx.backends.positions import Positions

Array = np.ndarray


class CompiledForward:
    """The forward pass of one model, called as `gptx.model.forward` without the model.

    Attributes
    ----------
    skips_padding
        True: see `Backend.compile`.

    Raises
    ------
    gptx.backends.graph.UnsupportedOp
        The model needs an op that the kernels do not support.
    """

    skips_padding = True

    def __init__(self, forward: Callable[..., Array], model: Any, threads: int | None) -> None:
        if model.backend.cache_dtype == "float16" and not HAS_FLOAT16:
            raise UnsupportedOp("a float16 cache: this processor does not convert float16")
        self.threads = threads
        self.programs = [Program(trace_fused(forward, model, last_only=x)) for x in (False, True)]

    def __call__(
        self, ids: Array, positions: Positions, cache: Any, *, last_only: bool = False
    ) -> Array:
        """Return logits [B, T, V], or [B, 1, V] if `last_only`."""
        B, T = ids.shape
        H, capacity, D = cache.keys[0].shape[1:]
        index, counts, first_rows = positions.index, positions.counts, None
        last_only = last_only and T > 1  # a single token is the last one
        if last_only and counts is not None:
            is_token = np.arange(T) < counts[:, None]
            ids, index = ids[is_token], index[is_token]
            first_rows = np.append(0, np.cumsum(counts))
        program = self.programs[last_only]
        n_logits = B if last_only else B * T
        # The logits are the last buffer, and belong to the caller.
        logits = allocate_aligned((padded_rows(n_logits), program.widths[-1]), np.float32)
        program.run(
            {len(program.widths) - 1: logits},
            Shape(ids.size, B, H, D, capacity),
            self.threads,
            ids,
            index,
            cache,
            positions.slots,
            first_rows,
        )
        V = int(program.table[-1, N_OUT])
        return logits[:n_logits, :V].reshape(B, -1, V)
