"""The graph of a forward pass: the ops that `gptx/model.py` calls, their operands and results.

`trace` runs the unchanged model on a `Tracer` in place of the backend and of the KV cache. Token
ids and positions are inputs of the graph; weights and numbers are constants in it. The graph is not
fused: `fusion.py` makes the operations of a compiled replay from it.

Some nodes are not ops of the backend. "ids" and "index" are the inputs; "last" is the last token of
each sequence; "add" is a sum. "query", "key" and "value" are the results of `split_heads`, "keys"
and "values" those of `KVCache.update`. On request, "attention" is three nodes: "scores", "pattern"
and "z", which `gptx.backends.gradients` defines.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

from gptx.backends.base import OPS
from gptx.backends.positions import Positions

HEADS = ("query", "key", "value")  # nodes of the results of `split_heads`
CACHED = ("keys", "values")  # nodes of the results of `KVCache.update`
EXPANDED = ("scores", "pattern", "z")  # nodes of an expanded attention
# Op of a node in attention -> the last part of its name.
NAMES_IN_ATTENTION = {
    "query": "q",
    "key": "k",
    "value": "v",
    "keys": "keys",
    "values": "values",
    "scores": "scores",
    "pattern": "pattern",
    "z": "z",
    "attention": "z",
}


class UnsupportedOp(Exception):
    """An op that a user of the graph does not support; the pass has to run op by op."""


class Weight(NamedTuple):
    """A name in the place of a weight in a traced graph."""

    name: str


def named_weights(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and array of each leaf of a tree of weights, `h.0.attn.c_attn.weight` for one."""
    if isinstance(tree, SimpleNamespace | list):
        items = vars(tree).items() if isinstance(tree, SimpleNamespace) else enumerate(tree)
        for key, child in items:
            yield from named_weights(child, f"{path}{key}.")
    else:
        yield path[:-1], tree


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

    # Properties of a complete graph

    @cached_property
    def last_reader(self) -> dict[Node, Node]:
        """Node -> the last node that reads its result."""
        return {operand: node for node in self.nodes for operand in node.inputs}

    @cached_property
    def siblings(self) -> dict[Node, dict[str, Node]]:
        """Node of `HEADS` or `CACHED` -> all results of its call, by op."""
        calls: dict[Any, dict[str, Node]] = {}  # operand of `split_heads`, or layer of the cache
        found = {}
        for node in self.nodes:
            if node.op in HEADS or node.op in CACHED:
                call = node.operands[0 if node.op in HEADS else 1]
                found[node] = calls.setdefault(call, {})
                found[node][node.op] = node
        return found

    @cached_property
    def names(self) -> dict[str, Node]:
        """Names of the nodes after the weights, `h.3.mlp.act` for one, in order of computation.

        The graph is one of `trace_names`. The residual stream between two blocks has two names:
        `h.2.resid_post` and `h.3.resid_pre` are one node.
        """
        names: dict[str, Node] = {}
        name_of: dict[Node, str] = {}
        for node in self.nodes:
            if name := _name(node, name_of):
                if name.endswith(".ln_1"):
                    names[f"{_parent(name)}.resid_pre"] = node.inputs[0]
                names[name] = node
                name_of[node] = name
        return names


def _name(node: Node, name_of: dict[Node, str]) -> str | None:
    """Return the name of a node from those of its operands; None for an input and for "last"."""
    match node.op, node.operands:
        case "embed" | "linear" | "layer_norm", (_, Weight(name=name), *_):
            return name.removesuffix(".weight")
        case "unembed", _:
            return "lm_head"
        case op, (Node() as x, *_) if op in NAMES_IN_ATTENTION:
            return f"{_parent(name_of[x])}.{NAMES_IN_ATTENTION[op]}"
        case "add", (Node(), Node(op="linear") as y):
            module = _parent(name_of[y])  # h.3.attn or h.3.mlp
            return f"{_parent(module)}.resid_{'mid' if module.endswith('.attn') else 'post'}"
        case _, (Node(op="linear") as x,):
            return f"{_parent(name_of[x])}.act"
    return None


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


class Tracer:
    """A backend and a KV cache that compute nothing: each call adds a node to `graph`.

    `expanded` has the layers whose attention is three nodes.
    """

    def __init__(self, graph: Graph, expanded: Collection[int] = ()) -> None:
        self.graph = graph
        self.expanded = expanded

    def __getattr__(self, op: str) -> Callable[..., Node]:
        if op not in OPS:
            raise UnsupportedOp(op)
        return lambda *operands: self.graph.add_node(op, *operands)

    def split_heads(self, qkv: Node, n_head: int) -> tuple[Node, Node, Node]:
        """Add the nodes of queries, keys and values, see `Backend.split_heads`."""
        q, k, v = (self.graph.add_node(name, qkv, n_head) for name in ("query", "key", "value"))
        return q, k, v

    def attention(self, q: Node, k: Node, v: Node, positions: Positions, scale: float) -> Node:
        """Add the node of attention, or the three of an expanded layer."""
        if k.op != "keys" or k.operands[1] not in self.expanded:
            return self.graph.add_node("attention", q, k, v, positions, scale)
        scores = self.graph.add_node("scores", q, k, positions, scale)
        return self.graph.add_node("z", self.graph.add_node("pattern", scores), v)

    def update(self, layer: int, k: Node, v: Node, positions: Positions) -> tuple[Node, Node]:
        """Add the nodes of all keys and values so far, see `KVCache.update`."""
        return self.graph.add_node("keys", k, layer), self.graph.add_node("values", v, layer)


def trace(
    forward: Callable[..., Any], model: Any, *, last_only: bool, expanded: Collection[int] = ()
) -> Graph:
    """Trace one forward pass.

    Parameters
    ----------
    forward
        `gptx.model.forward`.
    model
        A `gptx.model.Transformer`.
    last_only
        Argument of `forward`.
    expanded
        Layers whose attention is the nodes "scores", "pattern" and "z".

    Raises
    ------
    UnsupportedOp
        The pass calls something other than an op of the backend.
    """
    graph = Graph()
    tracer = Tracer(graph, expanded)
    ids, index = graph.add_node("ids"), graph.add_node("index")
    positions = Positions(index, 0, True, lambda x: x)
    traced = replace(model, backend=tracer)
    try:
        graph.output = forward(traced, ids, positions, tracer, last_only=last_only)
    except (AttributeError, TypeError) as error:  # an operator or a method that `Node` lacks
        raise UnsupportedOp(str(error)) from error
    return graph


def trace_names(
    forward: Callable[..., Any], model: Any, *, last_only: bool, expanded: Collection[int] = ()
) -> Graph:
    """Trace one forward pass with a `Weight` in the place of each weight; see `trace`."""
    weights = _map_leaves(model.weights, Weight)
    named = replace(model, weights=weights)
    return trace(forward, named, last_only=last_only, expanded=expanded)


def _map_leaves(tree: Any, make: Callable[[str], Any], path: str = "") -> Any:
    """Return a tree of weights with `make(name)` in the place of each leaf."""
    if isinstance(tree, SimpleNamespace):
        return SimpleNamespace(
            **{key: _map_leaves(child, make, f"{path}{key}.") for key, child in vars(tree).items()}
        )
    if isinstance(tree, list):
        return [_map_leaves(child, make, f"{path}{i}.") for i, child in enumerate(tree)]
    return make(path[:-1])
