"""The CuPy backend's forward pass: what `tape.py` recorded, as launches of the kernels in `cuda/`.

A decode step is captured in a CUDA graph, once for each number of sequences: its kernels read
tokens, positions and the addresses of the cache from device memory, so that it stays valid. A
prompt is launched kernel by kernel, with cuBLAS, which CuPy keeps out of graphs, for the products.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import cupy

from gptx.backends import cupy_early
from gptx.backends.base import Positions
from gptx.backends.cupy_program import MULTIPLE, Memory, Program
from gptx.backends.tape import Unknown, record

Array = Any
GRAPHS = 4  # are kept at most


class Step:
    """The forward pass of one model; called as `gptx.model.forward` without the model.

    Raises
    ------
    gptx.backends.tape.Unknown
        The model does something that the kernels do not.
    """

    def __init__(self, forward: Callable[..., Array], model: Any) -> None:
        if model.config.head_dim % MULTIPLE:
            raise Unknown(f"heads of {model.config.head_dim}")
        self._programs = [
            Program(record(forward, model, last_only=x), model) for x in (False, True)
        ]
        self._decode = Decode(self._programs[False], model.backend)

    def __call__(
        self, ids: Array, positions: Positions, cache: Any, *, last_only: bool = False
    ) -> Array:
        """Logits [B, T, V] or [B, 1, V], as `gptx.model.forward` returns them."""
        B, T = ids.shape
        if T == 1:
            return self._decode(ids, positions.index, cache)
        program = self._programs[last_only]
        memory = Memory(program, B, T)
        memory.fill(ids, positions.index, cache)
        program.launch(memory)
        return memory.logits.reshape(B, -1, program.vocab_size)

    @property
    def kernels_per_token(self) -> int:
        """How many kernels a decode step of a few sequences launches."""
        return len(self._programs[False].ops)


class Decode:
    """Decode steps: launched kernel by kernel at first, as a graph when they come again."""

    def __init__(self, program: Program, backend: Any) -> None:
        self._program, self._backend = program, backend
        self._lock = threading.Lock()  # of the memory that graphs work in
        self._graphs: dict[int, tuple[Memory, Any]] = {}  # by B, the newest last

    def __call__(self, ids: Array, index: Array, cache: Any) -> Array:
        B = len(ids)
        with self._lock:
            if B in self._graphs:
                memory, graph = self._graphs.pop(B)
                # The first time has loaded the kernels, which cannot be done within a capture.
                graph = graph or self._capture(memory)
            else:
                memory, graph = Memory(self._program, B, 1), None
            self._graphs[B] = memory, graph
            if len(self._graphs) > GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            memory.fill(ids, index, cache)
            if graph is None:
                self._program.launch(memory)
            else:
                graph.launch()
            return memory.logits.reshape(B, 1, -1).copy()  # the next step writes there again

    def _capture(self, memory: Memory) -> Any:
        stream = cupy.cuda.Stream(non_blocking=True)
        memory.early = self._backend.early and cupy_early.is_possible()
        with stream:
            stream.begin_capture()
            try:
                self._program.launch(memory)
            finally:
                graph = stream.end_capture()
        return graph
