"""A graph computed on a backend, op by op; each result is freed at its last reader.

Two users: `backward.py` walks the graph backward after it, `gptx/hooks.py` reads and replaces
results.
"""

from __future__ import annotations

from typing import Any

from gptx.backends import gradients
from gptx.backends.base import Backend
from gptx.backends.graph import CACHED, EXPANDED, HEADS, Graph, Node, Weight
from gptx.backends.positions import Positions

Array = Any


class Replay:
    """One forward pass over a graph of `trace_names`.

    Parameters
    ----------
    ops
        Backend that computes.
    weights
        Name -> array of every weight of the graph.
    ids, positions
        Inputs of the pass, see `gptx.model.forward`.
    cache
        A `gptx.kv_cache.KVCache`; None if all keys and values are those of the new tokens.

    Attributes
    ----------
    results
        Node -> its result, until the last node has read it.
    """

    def __init__(
        self,
        ops: Backend,
        graph: Graph,
        weights: dict[str, Array],
        ids: Array,
        positions: Positions,
        cache: Any = None,
    ) -> None:
        self.ops, self.graph, self.weights = ops, graph, weights
        self.ids, self.positions, self.cache = ids, positions, cache
        self.results: dict[Node, Array] = {}

    def run(self) -> Array:
        """Compute all nodes in order; return the result of the pass."""
        for node in self.graph.nodes:
            self.result(node)
            for x in node.inputs:
                if self.graph.last_reader[x] is node:
                    self.results.pop(x, None)
        return self.results.pop(self.graph.output)

    def result(self, node: Node) -> Array:
        """Return the result of a node; compute it if it is not there."""
        if node not in self.results:
            if node.op in HEADS:
                found = self.ops.split_heads(self.result(node.operands[0]), node.operands[1])
                self._add_siblings(node, HEADS, found)
            elif node.op in CACHED and self.cache is not None:
                k, v = (self.result(self.graph.siblings[node][op].operands[0]) for op in CACHED)
                found = self.cache.update(node.operands[1], k, v, self.positions)
                self._add_siblings(node, CACHED, found)
            else:
                self.add_result(node, self.compute(node))
        return self.results[node]

    def _add_siblings(self, node: Node, ops: tuple[str, ...], found: tuple[Array, ...]) -> None:
        for op, x in zip(ops, found, strict=True):
            if (sibling := self.graph.siblings[node][op]) not in self.results:
                self.add_result(sibling, x)

    def add_result(self, node: Node, x: Array) -> None:
        """Keep the result of a node for its readers; a subclass may replace it."""
        self.results[node] = x

    def value(self, operand: Any) -> Array:
        """Return the value of an operand: a result, a weight, the positions or a number."""
        if isinstance(operand, Node):
            return self.result(operand)
        if isinstance(operand, Weight):
            return self.weights[operand.name]
        return self.positions if isinstance(operand, Positions) else operand

    def compute(self, node: Node) -> Array:
        """Compute a node with one result."""
        match node.op:
            case "ids":
                return self.ids
            case "index":
                return self.positions.index
            case "keys" | "values":  # without a cache
                return self.result(node.operands[0])
        return self.apply(node, [self.value(x) for x in node.operands])

    def apply(self, node: Node, operands: list[Array]) -> Array:
        """Apply the op of a node to the values of its operands."""
        match node.op:
            case "add":
                return operands[0] + operands[1]
            case "last":
                return operands[0][:, -1:, :]
            case op if op in EXPANDED:
                return gradients.function(self.ops, op)(*operands)
        return getattr(self.ops, node.op)(*operands)
