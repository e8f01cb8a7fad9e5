"""Fused operations: the graph of a forward pass as operations on numbered buffers.

An operation has one of three kinds. "embed" is the sum of token and position embeddings. "linear"
is layer norm, product, bias, activation and residual. "attention" writes new keys and values to the
cache, then computes attention over the cache. The compiled passes of the backends replay the
operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gptx.backends.graph import Graph, Node, UnsupportedOp, trace

ACTIVATIONS = ("gelu_new", "gelu", "relu")


@dataclass
class FusedOp:
    """One operation of a compiled pass; a field that does not apply has its default.

    Attributes
    ----------
    kind
        "embed", "linear" or "attention".
    source, target, residual
        Numbers of the buffers of the input, the result, and the residual added to it. A target is
        neither the source nor the residual of its operation.
    weight, bias
        Operands of `Backend.linear`, `unembed` or `embed`.
    table
        Position embeddings [n_positions, C], of "embed".
    norm
        Weight, bias and epsilon of the layer norm before the product.
    activation
        One of `ACTIVATIONS`.
    is_head
        True for `unembed`: the weight is [V, C].
    last
        True to compute the last token of each sequence only.
    layer, scale
        Index of the layer and scale of the scores, of "attention".
    operands
        Nodes whose results the operation reads: the source first, then the residual.
    """

    kind: str
    source: int | None = None
    target: int = -1
    residual: int | None = None
    weight: Any = None
    bias: Any = None
    table: Any = None
    norm: tuple[Any, Any, float] | None = None
    activation: str | None = None
    is_head: bool = False
    last: bool = False
    layer: int = 0
    scale: float = 1.0
    operands: list[Node] = field(default_factory=list, repr=False)


def trace_fused(forward: Callable[..., Any], model: Any, *, last_only: bool) -> list[FusedOp]:
    """Trace one forward pass and fuse its graph; parameters as of `gptx.backends.graph.trace`.

    Raises
    ------
    UnsupportedOp
        No fused operation covers a part of the pass.
    """
    fused = fuse(trace(forward, model, last_only=last_only))
    if [op.last for op in fused] != [False] * (len(fused) - 1) + [last_only]:
        raise UnsupportedOp("a selection of tokens other than `last_only` makes")
    return fused


def fuse(graph: Graph) -> list[FusedOp]:
    """Fuse the nodes of a graph and assign a buffer to each result.

    Raises
    ------
    UnsupportedOp
        No fused operation covers a node, or a combination of nodes.
    """
    uses = Counter(operand for node in graph.nodes for operand in node.inputs)
    fused: list[FusedOp] = []
    producer: dict[Node, FusedOp] = {}

    def begin(node: Node, kind: str, *operands: Node, **fields: Any) -> None:
        producer[node] = FusedOp(kind, operands=list(operands), **fields)
        fused.append(producer[node])

    def extend(node: Node, earlier: Node, *operands: Node, **fields: Any) -> None:
        """Let the operation of `earlier` compute `node` too; no other node may read `earlier`."""
        op = producer.get(earlier)
        if op is not fused[-1] or uses[earlier] > 1:
            raise UnsupportedOp(f"{node.op} of {earlier.op}")
        producer[node] = op
        op.operands += operands
        for name, value in fields.items():
            setattr(op, name, value)

    for node in graph.nodes:
        match node.op, node.operands:
            case "ids" | "index" | "embed" | "last" | "layer_norm", _:
                pass  # part of the operation of the node that reads them
            case "query" | "key" | "value" | "keys" | "values", _:
                pass
            case "add", (
                Node(op="embed", operands=(Node(op="ids"), weight)),
                Node(op="embed", operands=(Node(op="index"), table)),
            ):
                begin(node, "embed", weight=weight, table=table)
            case "add", (Node() as x, Node(op="linear") as y):
                extend(node, y, x, residual=0)
            case "linear" | "unembed", (Node() as x, weight, *bias):
                x, norm = (x.operands[0], x.operands[1:]) if x.op == "layer_norm" else (x, None)
                x, last = (x.operands[0], True) if x.op == "last" else (x, False)
                fields = {"weight": weight, "norm": norm, "last": last}
                head = node.op == "unembed"
                begin(node, "linear", x, bias=bias[0] if bias else None, is_head=head, **fields)
            case activation, (Node(op="linear") as x,) if activation in ACTIVATIONS:
                extend(node, x, activation=activation)
            case "attention", (
                Node(op="query", operands=(q, _)),
                Node(op="keys", operands=(Node(op="key", operands=(k, _)), layer)),
                Node(op="values", operands=(Node(op="value", operands=(v, _)), same)),
                _,
                scale,
            ) if q is k is v and layer == same:
                begin(node, "attention", q, layer=layer, scale=scale)
            case _:
                raise UnsupportedOp(node.op)
    _assign_buffers(fused, producer)
    if not fused or not fused[-1].is_head or graph.output is not graph.nodes[-1]:
        raise UnsupportedOp("a forward pass whose result is not the product of `unembed`")
    return fused


def _assign_buffers(fused: list[FusedOp], producer: dict[Node, FusedOp]) -> None:
    """Number the buffers; a buffer is free again after the last read of its result."""
    last_read = {}
    for i, op in enumerate(fused):
        for node in op.operands:
            if node not in producer:
                raise UnsupportedOp(f"a product of {node.op}")
            last_read[id(producer[node])] = i
    free: list[int] = []
    n_buffers = 0
    for i, op in enumerate(fused):
        if not free or op.is_head:  # the caller keeps the buffer of the logits
            free.append(n_buffers)
            n_buffers += 1
        op.target = free.pop()
        producers = [producer[node] for node in op.operands]
        if producers:
            op.source = producers[0].target
        if op.residual is not None:
            op.residual = producers[1].target
        free += {p.target for p in producers if last_read[id(p)] == i}
