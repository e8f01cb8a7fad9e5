"""The compiled forward pass: the fused ops of `fusion.py` as launches of the CUDA kernels.

A decode step is captured in a CUDA graph, one for each number of sequences. Its kernels read
tokens, positions and the addresses of the cache from device memory, so a graph stays valid. For a
short prompt, the host takes longer to launch the kernels than the device to run them. Such a prompt
is padded to one of a set of lengths, and captured, too. Longer prompts are launched kernel by
kernel, with cuBLAS for the products; CuPy does not support cuBLAS in a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import cupy

from gptx.backends.cuda import dependent_launch
from gptx.backends.cuda.capture import AutotunedGraph, capture
from gptx.backends.cuda.linear import WIDTH_MULTIPLE
from gptx.backends.cuda.program import Program
from gptx.backends.cuda.workspace import Workspace
from gptx.backends.fusion import trace_fused
from gptx.backends.graph import UnsupportedOp
from gptx.backends.positions import Positions

Array = Any
MAX_GRAPH_WORKSPACE_BYTES = 2**29  # of the graphs of a program; the newest graph is always kept
GRAPH_LENGTHS = (8, 16, 32, 64, 128, 192, 256)  # of prompts; above, multiples of LENGTH_STEP
LENGTH_STEP = 128


class CompiledForward:
    """The compiled forward pass of one model; a call is `gptx.model.forward` without the model.

    Raises
    ------
    gptx.backends.graph.UnsupportedOp
        The kernels do not support the forward pass.
    """

    def __init__(self, forward: Callable[..., Array], model: Any) -> None:
        if model.config.head_dim % WIDTH_MULTIPLE:
            raise UnsupportedOp(f"heads of width {model.config.head_dim}")
        self._programs = [
            Program(trace_fused(forward, model, last_only=x), model) for x in (False, True)
        ]
        self._decode, self._prompt = (GraphCache(x, model.backend) for x in self._programs)
        self._backend = model.backend

    def __call__(
        self, ids: Array, positions: Positions, cache: Any, *, last_only: bool = False
    ) -> Array:
        """Return logits [B, T, V], or [B, 1, V] of the last tokens."""
        B, T = ids.shape
        if T == 1:
            logits = self.decode(ids, positions, cache, cupy.copy)
        elif last_only and (length := self._graph_length(B, T)):
            logits = self._prompt.run(length, ids, positions, cache, cupy.copy)
        else:
            program = self._programs[last_only]
            workspace = Workspace(program.layout(B, T), in_graph=False)
            workspace.set_inputs(ids, positions, cache)
            program.launch(workspace)
            logits = workspace.logits
        return logits.reshape(B, -1, self._programs[0].vocab_size)

    def decode(
        self, ids: Array, positions: Positions, cache: Any, sample: Callable[[Array], Any]
    ) -> Any:
        """Run a decode step: token ids [B] or [B, 1] -> the result of `sample(logits [B, V])`."""
        return self._decode.run(1, ids, positions, cache, sample)

    def _graph_length(self, B: int, T: int) -> int:
        """Return the length that prompts [B, T] are padded to, or 0 if a graph is not faster."""
        rounded = -(-T // LENGTH_STEP) * LENGTH_STEP
        length = next((n for n in GRAPH_LENGTHS if n >= T), rounded)
        macs = B * length * self._programs[True].macs_per_row
        return length if macs <= self._backend.max_graph_macs else 0

    @property
    def kernels_per_token(self) -> int:
        """Number of kernels in a decode step of up to MAX_GEMV_ROWS sequences."""
        return len(self._programs[False].ops)


class GraphCache:
    """Graphs of one program by number of sequences and length.

    The first pass of a kind loads its kernels and runs them one by one, because modules cannot be
    loaded during a capture. The second pass captures a graph.
    """

    def __init__(self, program: Program, backend: Any) -> None:
        self._program, self._backend = program, backend
        self._lock = threading.Lock()  # guards the workspaces
        # By (B, T), least recently used first.
        self._passes: dict[tuple[int, int], tuple[Workspace, AutotunedGraph]] = {}
        self._loaded: set[tuple[int, int]] = set()  # keys of passes whose kernels are loaded

    def run(
        self,
        T: int,
        ids: Array,
        positions: Positions,
        cache: Any,
        use_logits: Callable[[Array], Any],
    ) -> Any:
        """Run a pass; return the result of `use_logits`. The next pass overwrites the logits.

        Parameters
        ----------
        T
            Length of the pass; `ids` [B, n] and their positions are padded to it.
        """
        key = len(ids), T
        with self._lock:
            if key in self._passes:
                workspace, graph = self._passes.pop(key)  # it stays removed after an error
            else:
                workspace, graph = Workspace(self._program.layout(*key), in_graph=True), None
                if key in self._loaded:
                    graph = self._make_graph(workspace)
            workspace.set_inputs(ids, positions, cache)
            if graph is None:
                self._program.launch(workspace)
                self._loaded.add(key)
            else:
                graph.launch()
            result = use_logits(workspace.logits)
            if graph is not None:
                self._keep(key, workspace, graph)
            return result

    def _keep(self, key: tuple[int, int], workspace: Workspace, graph: AutotunedGraph) -> None:
        """Store a graph; delete the oldest graphs while workspaces exceed their limit."""
        self._passes[key] = workspace, graph
        n_bytes = sum(workspace.nbytes for workspace, _ in self._passes.values())
        for oldest in list(self._passes)[:-1]:
            if n_bytes > MAX_GRAPH_WORKSPACE_BYTES:
                n_bytes -= self._passes.pop(oldest)[0].nbytes
                self._loaded.discard(oldest)  # its next pass does not capture

    def _make_graph(self, workspace: Workspace) -> AutotunedGraph:
        """Capture with or without dependent launches, or both if the faster kind is unknown."""
        dependent = self._backend.dependent_launch if dependent_launch.is_supported() else False
        if dependent is None:
            chosen = (graph.chosen for _, graph in self._passes.values())
            dependent = next((x for x in chosen if x is not None), None)
        if dependent is not None:
            return AutotunedGraph({dependent: self._capture(workspace, dependent=dependent)})
        graphs = {False: self._capture(workspace, dependent=False)}
        with suppress(dependent_launch.LaunchRejected):
            graphs[True] = self._capture(workspace, dependent=True)
        return AutotunedGraph(graphs)

    def _capture(self, workspace: Workspace, *, dependent: bool) -> Any:
        workspace.dependent_launch = dependent
        return capture(lambda: self._program.launch(workspace))
