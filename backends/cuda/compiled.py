"""The CuPy backend's forward pass: what `fusion.py` recorded, as launches of the kernels in `cuda/`.

A decode step is captured in a CUDA graph, once for each number of sequences: its kernels read
tokens, positions and the addresses of the cache from device memory, so that it stays valid. So is a
prompt, once for each length that prompts are filled up to, while the device would do its kernels
faster than the host can launch them. A longer one is launched kernel by kernel, with cuBLAS, which
CuPy keeps out of graphs, for the products.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import cupy

from gptx.backends.cuda import dependent_launch as cupy_early
from gptx.backends.cuda.capture import Fastest
from gptx.backends.cuda.program import MULTIPLE, Memory, Program
from gptx.backends.fusion import trace_fused
from gptx.backends.graph import UnsupportedOp
from gptx.backends.positions import Positions

Array = Any
KEPT_BYTES = 2**29  # that graphs of a program may work in; the one used last is always kept
LENGTHS = (8, 16, 32, 64, 128, 192, 256)  # of prompts in graphs; above, multiples of 128


class CompiledForward:
    """The forward pass of one model; called as `gptx.model.forward` without the model.

    Raises
    ------
    gptx.backends.graph.UnsupportedOp
        The model does something that the kernels do not.
    """

    def __init__(self, forward: Callable[..., Array], model: Any) -> None:
        if model.config.head_dim % MULTIPLE:
            raise UnsupportedOp(f"heads of {model.config.head_dim}")
        self._programs = [
            Program(trace_fused(forward, model, last_only=x), model) for x in (False, True)
        ]
        self._decode, self._prompt = (Graphs(x, model.backend) for x in self._programs)
        self._backend = model.backend

    def __call__(
        self, ids: Array, positions: Positions, cache: Any, *, last_only: bool = False
    ) -> Array:
        """Logits [B, T, V] or [B, 1, V], as `gptx.model.forward` returns them."""
        B, T = ids.shape
        if T == 1:
            logits = self.decode(ids, positions, cache, cupy.copy)
        elif last_only and (length := self._length_in_graph(B, T)):
            logits = self._prompt.run(length, ids, positions, cache, cupy.copy)
        else:
            program = self._programs[last_only]
            memory = Memory(program, B, T, in_graph=False)
            memory.fill(ids, positions.host, cache)
            program.launch(memory)
            logits = memory.logits
        return logits.reshape(B, -1, self._programs[0].vocab_size)

    def decode(
        self, ids: Array, positions: Positions, cache: Any, choose: Callable[[Array], Any]
    ) -> Any:
        """`Backend.decode` of this model."""
        return self._decode.run(1, ids, positions, cache, choose)

    def _length_in_graph(self, B: int, T: int) -> int:
        """What prompts [B, T] are filled up to, or 0 if a graph would not be faster."""
        length = next((n for n in LENGTHS if n >= T), -(-T // 128) * 128)
        work = B * length * self._programs[True].work
        return length if work <= self._backend.most_in_graph else 0

    @property
    def kernels_per_token(self) -> int:
        """How many kernels a decode step of a few sequences launches."""
        return len(self._programs[False].ops)


class Graphs:
    """Passes of one program: kernel by kernel at first, as a graph when they come again."""

    def __init__(self, program: Program, backend: Any) -> None:
        self._program, self._backend = program, backend
        self._lock = threading.Lock()  # of the memory that graphs work in
        # By the number of sequences and the length, as all of these; the one used last comes last.
        self._passes: dict[tuple[int, int], tuple[Memory, Fastest]] = {}
        self._loaded: set[tuple[int, int]] = set()  # whose kernels are

    def run(
        self,
        T: int,
        ids: Array,
        positions: Positions,
        cache: Any,
        choose: Callable[[Array], Any],
    ) -> Any:
        """What `choose` makes of the logits, which the next pass writes over.

        Tokens `ids` [B, n] and their positions are filled up to T.
        """
        key = len(ids), T
        with self._lock:
            if key in self._passes:
                memory, graph = self._passes.pop(key)  # what fails is not used again
            else:
                memory, graph = Memory(self._program, *key, in_graph=True), None
                # The first time loads the kernels, which cannot be done within a capture.
                if key in self._loaded:
                    graph = self._captured(memory)
            memory.fill(ids, positions.host, cache)
            if graph is None:
                self._program.launch(memory)
                self._loaded.add(key)
            else:
                graph.launch()
            chosen = choose(memory.logits)
            if graph is not None:
                self._keep(key, memory, graph)
            return chosen

    def _keep(self, key: tuple[int, int], memory: Memory, graph: Fastest) -> None:
        self._passes[key] = memory, graph
        n_bytes = sum(memory.nbytes for memory, _ in self._passes.values())
        for oldest in list(self._passes)[:-1]:
            if n_bytes > KEPT_BYTES:
                n_bytes -= self._passes.pop(oldest)[0].nbytes
                self._loaded.discard(oldest)  # it has to come twice again

    def _captured(self, memory: Memory) -> Fastest:
        """A pass as a graph: with early launches, without, or both until one has been faster."""
        early = self._backend.early if cupy_early.is_possible() else False
        if early is None:
            winners = (graph.winner for _, graph in self._passes.values())
            early = next((winner for winner in winners if winner is not None), None)
        if early is not None:
            return Fastest({early: self._capture(memory, early=early)})
        graphs = {False: self._capture(memory, early=False)}
        with suppress(cupy_early.Refused):
            graphs[True] = self._capture(memory, early=True)
        return Fastest(graphs)

    def _capture(self, memory: Memory, *, early: bool) -> Any:
        stream = cupy.cuda.Stream(non_blocking=True)
        memory.early = early
        with stream:
            stream.begin_capture()
            try:
                self._program.launch(memory)
            finally:
                graph = stream.end_capture()
        return graph
