"""The graph of a forward pass: the ops that `gptx/model.py` calls, their operands and results.

`trace` runs the unchanged model on a `Tracer` in place of the backend and of the KV cache. Token
ids and positions are inputs of the graph; weights and numbers are constants in it. The graph is not
fused: `fusion.py` makes the operations of a compiled replay from it.

Some nodes are not ops of the backend. "ids" and "index" are the inputs; "last" is the last token of
each sequence; "add" is a sum. "query", "key" and "value" are the results of `split_heads`, "keys"
and "values" those of `KVCache.update`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gptx.backends.base import OPS
from gptx.backends.positions import Positions


class UnsupportedOp(Exception):
    """An op that a user of the graph does not support; the pass has to run op by op."""


@dataclass(eq=False)
class Node:
    """The result of one op.

    Attributes
    ----------
    graph
        Graph of the node, a weak reference: cycles would keep the weights in memory.
    op
        Name of the op.
    operands
        Nodes, weights and numbers, in the order of the op's parameters.
    """

    graph: Graph = field(repr=False)
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
        """Operands that are nodes."""
        return [operand for operand in self.operands if isinstance(operand, Node)]


@dataclass(eq=False)
class Graph:
    """The nodes of one forward pass, in the order of computation.

    Attributes
    ----------
    nodes
        All nodes.
    output
        Return value of the forward pass: a node if the model is a GPT-2.
    """

    nodes: list[Node] = field(default_factory=list)
    output: Any = None

    def add_node(self, op: str, *operands: Any) -> Node:
        """Append a node and return it."""
        self.nodes.append(Node(weakref.proxy(self), op, operands))
        return self.nodes[-1]


class Tracer:
    """A backend and a KV cache that compute nothing: each call adds a node to `graph`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __getattr__(self, op: str) -> Callable[..., Node]:
        if op not in OPS:
            raise UnsupportedOp(op)
        return lambda *operands: self.graph.add_node(op, *operands)

    def split_heads(self, qkv: Node, n_head: int) -> tuple[Node, Node, Node]:
        """Add the nodes of queries, keys and values, see `Backend.split_heads`."""
        q, k, v = (self.graph.add_node(name, qkv, n_head) for name in ("query", "key", "value"))
        return q, k, v

    def update(self, layer: int, k: Node, v: Node, positions: Positions) -> tuple[Node, Node]:
        """Add the nodes of all keys and values so far, see `KVCache.update`."""
        return self.graph.add_node("keys", k, layer), self.graph.add_node("values", v, layer)


def trace(forward: Callable[..., Any], model: Any, *, last_only: bool) -> Graph:
    """Trace one forward pass.

    Parameters
    ----------
    forward
        `gptx.model.forward`.
    model
        A `gptx.model.Transformer`.
    last_only
        Argument of `forward`.

    Raises
    ------
    UnsupportedOp
        The pass calls something other than an op of the backend.
    """
    graph = Graph()
    tracer = Tracer(graph)
    ids, index = graph.add_node("ids"), graph.add_node("index")
    positions = Positions(index, 0, True, lambda x: x)
    traced = replace(model, backend=tracer)
    try:
        graph.output = forward(traced, ids, positions, tracer, last_only=last_only)
    except (AttributeError, TypeError) as error:  # an operator or a method that `Node` lacks
        raise UnsupportedOp(str(error)) from error
    return graph
