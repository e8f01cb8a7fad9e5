"""The graph of a forward pass: each op of the unchanged `gptx/model.py`, its operands, its results.

`trace` runs the model on a `Tracer` in the place of the backend. Token ids, positions, lengths and
the number of rows are inputs of the graph; weights and numbers are constants in it. The graph is
not fused: `fusion.py` makes the few fused operations of a compiled replay from it.

Nodes that are no ops of the backend: "ids" and "index" (the inputs), "add", "last" (the last token
of each sequence), "query", "key" and "value" (the results of `split_heads`), "keys" and "values"
(the results of `KVCache.update`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gptx.backends.base import OPS
from gptx.backends.positions import Positions


class UnsupportedOp(Exception):
    """An op that a user of the graph does not know; the pass has to run op by op."""


@dataclass(eq=False)
class Node:
    """The result of one op.

    Attributes
    ----------
    graph
        The graph that the node belongs to.
    op
        Name of the op.
    operands
        Nodes, weights and numbers, in the order of the op's parameters.
    """

    graph: Graph
    op: str
    operands: tuple[Any, ...]

    def __add__(self, other: Any) -> Node:
        return self.graph.add_node("add", self, other)

    def __getitem__(self, key: Any) -> Node:
        if key != (slice(None), slice(-1, None), slice(None)):
            raise UnsupportedOp(f"index {key}")
        return self.graph.add_node("last", self)

    @property
    def inputs(self) -> list[Node]:
        """Those operands that are nodes."""
        return [operand for operand in self.operands if isinstance(operand, Node)]


@dataclass(eq=False)
class Graph:
    """The nodes of one forward pass, in the order in which they are computed.

    Attributes
    ----------
    nodes
        All nodes.
    output
        The object that the forward pass returned; a node, unless the pass is not GPT-2's.
    """

    nodes: list[Node] = field(default_factory=list)
    output: Any = None

    def add_node(self, op: str, *operands: Any) -> Node:
        """Append a node and return it."""
        self.nodes.append(Node(self, op, operands))
        return self.nodes[-1]


class Tracer:
    """A backend and a KV cache that compute nothing and add a node to `graph` for each call."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __getattr__(self, op: str) -> Callable[..., Node]:
        if op not in OPS:
            raise UnsupportedOp(op)
        return lambda *operands: self.graph.add_node(op, *operands)

    def split_heads(self, qkv: Node, n_head: int) -> tuple[Node, Node, Node]:
        """Queries, keys and values, see `Backend.split_heads`."""
        q, k, v = (self.graph.add_node(name, qkv) for name in ("query", "key", "value"))
        return q, k, v

    def update(self, layer: int, k: Node, v: Node, positions: Positions) -> tuple[Node, Node]:
        """All keys and values so far, see `KVCache.update`."""
        return self.graph.add_node("keys", k, layer), self.graph.add_node("values", v, layer)


def trace(forward: Callable[..., Any], model: Any, *, last_only: bool) -> Graph:
    """Trace one forward pass of `model` (see `gptx.model.forward`).

    Raises
    ------
    UnsupportedOp
        The pass calls something that is no op of the backend.
    """
    graph = Graph()
    tracer = Tracer(graph)
    ids, index = graph.add_node("ids"), graph.add_node("index")
    positions = Positions(index, 0, True, lambda x: x)
    traced = replace(model, backend=tracer)
    try:
        graph.output = forward(traced, ids, positions, tracer, last_only=last_only)
    except (AttributeError, TypeError) as error:  # an operator or a method that no `Node` has
        raise UnsupportedOp(str(error)) from error
    return graph
