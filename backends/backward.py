"""The loss of a forward pass and its gradients: run the graph of the pass, then walk it backward.

`gptx/model.py` is traced once, with names in the place of its weights (see `gptx.backends.graph`).
A step computes the nodes in order, the loss from the last one, and then the gradient of each node
in reverse order, with one vector-Jacobian product an op (see `gptx.backends.gradients`).
`ActivationGradients` walks from a sum of logits instead, to the results of chosen nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptx.backends import gradients
from gptx.backends.base import Backend
from gptx.backends.graph import (
    HEADS,
    Graph,
    Node,
    UnsupportedOp,
    Weight,
    named_weights,
    trace_names,
)
from gptx.backends.positions import Positions
from gptx.backends.replay import Replay
from gptx.errors import ParameterError, argument

Array = Any

RECOMPUTE = ("none", "cheap", "block")
INPUTS = ("ids", "index")  # nodes of the graph's inputs
KNOWN = (*INPUTS, *HEADS, "keys", "values", "add", "unembed")  # nodes without a `_vjp`
# Ops whose gradient reads results of other nodes; that of "linear" does for the weight.
READERS = ("layer_norm", "gelu_new", "gelu", "relu", "attention", "scores", "z")
CHEAP = ("layer_norm", "gelu_new", "gelu", "relu")  # ops that `recompute="cheap"` computes again


@dataclass(frozen=True)
class Batch:
    """Sequences of token ids, on the host.

    Attributes
    ----------
    ids
        Token ids [B, T], int64.
    targets
        Token ids after those of `ids` [B, T], int64; any number where it is masked, such as -100.
    weights
        Weight of each target in the loss [B, T], float32: 1, or 0 where it is masked. Padding is
        masked, and stands at the end of a sequence, where no other token attends to it.
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @property
    def n_tokens(self) -> float:
        """Number of targets that are not masked: the sum of `weights`."""
        return float(self.weights.sum(dtype=np.float64))

    def sequences(self, first: int, last: int) -> Batch:
        """Return the sequences [first, last)."""
        rows = slice(first, last)
        return Batch(self.ids[rows], self.targets[rows], self.weights[rows])


@dataclass(frozen=True)
class Dropout:
    """Probabilities of dropout at GPT-2's four places, and the seed of the masks.

    Attributes
    ----------
    embd
        Probability at the sum of token and position embeddings.
    attn
        Probability at the attention pattern.
    resid
        Probability at the results of attention and MLP, before the residual sum.
    seed
        Key of the random numbers, an integer from 0 to 2**64 - 1.

    Raises
    ------
    ParameterError
        A probability or the seed is out of range.
    """

    embd: float = 0.0
    attn: float = 0.0
    resid: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("embd", "attn", "resid"):
            p = getattr(self, name)
            if not 0 <= p < 1:
                raise ParameterError(
                    f"{argument('dropout')} is {p!r} for {name}, expected at least 0, less than 1"
                )
        if not 0 <= self.seed < 2**64:
            raise ParameterError(
                f"{argument('seed')} is {self.seed}, expected at least 0, less than 2**64"
            )


def loss_function(
    forward: Callable[..., Any],
    model: Any,
    *,
    trainable: Collection[str] | None = None,
    recompute: str = "none",
    dropout: Dropout | None = None,
) -> LossFunction:
    """Return the loss of a model as a function of its weights, with gradients.

    Parameters
    ----------
    forward
        `gptx.model.forward`.
    model
        A `gptx.model.Transformer`. Its backend computes; only the names of its weights are used.
    trainable
        Names of the weights whose gradients are computed; None for all. The others cost nothing.
    recompute
        Results that are computed again in the backward pass, in place of memory: "none"; "cheap",
        those of layer norms and activations; "block", all but the input of each block.
    dropout
        None for none.

    Raises
    ------
    ParameterError
        A name or an option is unknown.
    UnsupportedOp
        The pass has an op without a gradient, or its result is not that of `unembed`.
    """
    compiled = model.backend.override("loss_function")
    options: dict[str, Any] = {
        "trainable": trainable,
        "recompute": recompute,
        "dropout": dropout or Dropout(),
    }
    return compiled(forward, model, **options) if compiled else LossFunction(
        forward, model, **options
    )  # fmt: skip


class LossFunction:
    """The loss of a model on a batch, and its gradients; parameters as of `loss_function`."""

    def __init__(
        self,
        forward: Callable[..., Any],
        model: Any,
        *,
        trainable: Collection[str] | None,
        recompute: str,
        dropout: Dropout,
    ) -> None:
        if recompute not in RECOMPUTE:
            raise ParameterError(
                f"{argument('recompute')} is {recompute!r}, expected {', '.join(RECOMPUTE)}"
            )
        self.ops: Backend = model.backend
        self.dropout = dropout
        names = [name for name, _ in named_weights(model.weights)]
        self.trainable = frozenset(names if trainable is None else trainable)
        if unknown := sorted(self.trainable.difference(names)):
            raise ParameterError(
                f"{argument('trainable')} has {unknown[0]!r}, which is no weight of the model"
            )
        self._graph = _checked(trace_names(forward, model, last_only=False))
        self._plan = _Plan(self._graph, self.trainable, recompute)

    def loss(self, weights: dict[str, Array], batch: Batch, *, scale: float) -> Array:
        """Return the loss as `gradients` does, without dropout: a scalar on the device."""
        return self._loss(weights, *self._inputs(batch, scale))

    def gradients(
        self,
        weights: dict[str, Array],
        batch: Batch,
        *,
        scale: float,
        step: int = 0,
        first_sequence: int = 0,
    ) -> tuple[Array, dict[str, Array]]:
        """Return the loss and its gradients.

        Parameters
        ----------
        weights
            Name -> array of every weight of the model.
        batch
            All sequences of an update, or some of them.
        scale
            Factor of the loss: 1 over the tokens of the whole update, for a mean over all of its
            batches, times the scale of the loss in 16 bits.
        step
            Number of the update, for dropout.
        first_sequence
            Number of the first sequence in the update, for dropout.

        Returns
        -------
        loss, gradients
            Σ scale · weights · nll, a scalar on the device; name -> gradient of each trainable
            weight, in the backend's dtype.
        """
        return self._gradients(weights, *self._inputs(batch, scale), step, first_sequence)

    def _inputs(self, batch: Batch, scale: float) -> tuple[Array, Array, Array]:
        """Copy a batch to the device: ids [B, T], targets [N], and weights [N] times the scale."""
        ops = self.ops
        dtype = "float64" if ops.dtype == "float64" else "float32"
        weights = ops.asarray(batch.weights.reshape(-1) * np.float64(scale), dtype)
        targets = np.where(batch.weights == 0, 0, batch.targets)  # backends read the logits there
        return ops.asarray(batch.ids), ops.asarray(targets.reshape(-1)), weights

    # On arrays of the device only, so that a backend can compile these two

    def _loss(
        self, weights: dict[str, Array], ids: Array, targets: Array, row_weights: Array
    ) -> Array:
        return self._run(weights, ids, None).loss(targets, row_weights, (False, False))[0]

    def _gradients(
        self,
        weights: dict[str, Array],
        ids: Array,
        targets: Array,
        row_weights: Array,
        step: Array | int,
        first_sequence: Array | int,
    ) -> tuple[Array, dict[str, Array]]:
        run = self._run(weights, ids, (step, first_sequence))
        return run.gradients(targets, row_weights)

    def _run(
        self,
        weights: dict[str, Array],
        ids: Array,
        counters: tuple[Array | int, Array | int] | None,
    ) -> _Run:
        dropout = self.dropout if counters else Dropout()
        return _Run(self.ops, self._graph, self._plan, weights, ids, dropout, counters or (0, 0))


class ActivationGradients:
    """The gradients of a sum of logits by the results of nodes.

    Parameters
    ----------
    forward
        `gptx.model.forward`.
    model
        A `gptx.model.Transformer` with float weights.
    names
        Names of nodes, see `gptx.backends.graph.Graph.names`; not "lm_head".
    expanded
        Layers whose attention is the nodes "scores", "pattern" and "z".

    Raises
    ------
    UnsupportedOp
        The pass has an op without a gradient, or its result is not that of `unembed`.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        model: Any,
        names: Collection[str],
        *,
        expanded: Collection[int] = (),
    ) -> None:
        self.ops: Backend = model.backend
        self.weights = dict(named_weights(model.weights))
        self._graph = _checked(trace_names(forward, model, last_only=False, expanded=expanded))
        self._nodes = {name: self._graph.names[name] for name in names}
        self._plan = _Plan(self._graph, frozenset(), "none", frozenset(self._nodes.values()))

    def __call__(
        self, ids: Array, direction: Array, values: dict[str, Array] | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Return Σ direction · y of each sequence, and its gradients.

        y [B, T, C] is the result of the last layer norm. A logit is its product with a row of the
        head, so `direction` has this row at the token whose logit is wanted, and zeros elsewhere.

        Parameters
        ----------
        ids
            Token ids [B, T] on the device.
        direction
            Factors of y [B, T, C] on the device.
        values
            Name -> array in the place of the result of that node. Nodes before it have no gradient.

        Returns
        -------
        sums, gradients
            Sums [B] in the accumulation dtype; name -> gradient, of the shape of the result.
        """
        xp = self.ops.xp
        run = _Run(self.ops, self._graph, self._plan, self.weights, ids)
        for name, value in (values or {}).items():
            run.results[self._graph.names[name]] = value
        y = xp.astype(run.forward(keep=True), self.ops.accumulation_dtype)
        sums = xp.sum(y * xp.astype(direction, y.dtype), axis=(1, 2))
        run.walk(self._graph.output, (direction, None))
        return sums, {name: run.by_target[node] for name, node in self._nodes.items()}


def _checked(graph: Graph) -> Graph:
    """Return the graph of a pass whose gradient can be computed.

    Raises
    ------
    UnsupportedOp
        It has an op without a gradient, or its result is not that of `unembed`.
    """
    if not isinstance(graph.output, Node) or graph.output.op != "unembed":
        raise UnsupportedOp("a forward pass whose result is not the product of `unembed`")
    for node in graph.nodes:
        if node.op not in KNOWN and f"{node.op}_vjp" not in gradients.FUNCTIONS:
            raise UnsupportedOp(f"the gradient of {node.op}")
    return graph


class _Plan:
    """The nodes that need a gradient, and the results that the backward pass reads.

    Parameters
    ----------
    trainable
        Names of the weights whose gradient is computed.
    recompute
        One of `RECOMPUTE`.
    targets
        Nodes whose gradient is computed.

    Attributes
    ----------
    wanted
        Node -> the operands whose gradient is computed; nodes without any are left out.
    read
        Node -> its operands, with None for results that its gradient does not read.
    kept
        Nodes whose result is kept from the forward pass.
    sites
        Node -> number of its place for dropout: sums and attention.
    """

    def __init__(
        self,
        graph: Graph,
        trainable: frozenset[str],
        recompute: str,
        targets: frozenset[Node] = frozenset(),
    ) -> None:
        self.trainable, self.targets = trainable, targets
        self.wanted: dict[Node, tuple[bool, ...]] = {}
        self.read: dict[Node, list[Any]] = {}
        places = [node for node in graph.nodes if node.op in ("add", "attention")]
        self.sites = {node: number for number, node in enumerate(places)}
        block_inputs: set[Node] = set()
        block = ""
        for node in graph.nodes:
            wanted = tuple(map(self.is_wanted, node.operands))
            if any(wanted):
                self.wanted[node] = wanted
                self.read[node] = _operands_to_read(node, wanted)
            if node.op == "layer_norm" and (name := _block_name(node)) != block:
                block = name
                block_inputs |= set(node.inputs)
        kept = {x for operands in self.read.values() for x in operands if isinstance(x, Node)}
        if recompute == "cheap":
            # What such an op reads is kept for its gradient, if that is computed.
            kept = {node for node in kept if node.op not in CHEAP or node not in self.wanted}
        elif recompute == "block":
            kept = block_inputs
        self.kept = kept

    def is_wanted(self, operand: Any) -> bool:
        """Test for an operand whose gradient is computed."""
        if isinstance(operand, Weight):
            return operand.name in self.trainable
        return isinstance(operand, Node) and (operand in self.wanted or operand in self.targets)


def _operands_to_read(node: Node, wanted: tuple[bool, ...]) -> list[Any]:
    """Return the operands of a node, with None for results that its gradient does not read."""
    if node.op == "pattern":  # its gradient reads its own result
        return [node]
    reads_results = node.op in READERS or (node.op == "linear" and wanted[1])
    return [
        None if isinstance(x, Node) and not reads_results and x.op not in INPUTS else x
        for x in node.operands
    ]


class _Run(Replay):
    """One pass over the graph, forward and backward, with dropout.

    Attributes
    ----------
    by_node, by_name, by_target
        Gradients by the nodes that are not visited yet, by weights, and by the plan's targets.
    """

    def __init__(
        self,
        ops: Backend,
        graph: Graph,
        plan: _Plan,
        weights: dict[str, Array],
        ids: Array,
        dropout: Dropout | None = None,
        counters: tuple[Array | int, Array | int] = (0, 0),
    ) -> None:
        B, T = ids.shape
        positions = Positions(np.tile(np.arange(T), (B, 1)), T, True, ops.asarray)
        super().__init__(ops, graph, weights, ids, positions)
        self.plan = plan
        self.dropout = dropout or Dropout()
        self.step, self.first_sequence = counters
        self.g: Array = None  # the newest gradient of the backward pass
        self.by_node: dict[Node, Array] = {}
        self.by_name: dict[str, Array] = {}
        self.by_target: dict[Node, Array] = {}
        # A lazy library would compute results again at once, and keep them, without an order.
        self.compute_after = ops.override("compute_after")
        self.sum = gradients.function(ops, "add")

    # Forward

    def forward(self, *, keep: bool) -> Array:
        """Compute all nodes but `unembed`; return its first operand [B, T, C]."""
        *nodes, head = self.graph.nodes
        for node in nodes:
            self.result(node)
            for x in node.inputs:
                if self.graph.last_reader[x] is node and not (keep and x in self.plan.kept):
                    self.results.pop(x, None)
        return self.result(head.operands[0])

    def apply(self, node: Node, operands: list[Array]) -> Array:
        if self.g is not None and self.compute_after is not None:
            operands = [
                self.compute_after(x, self.g) if isinstance(operand, Node) else x
                for operand, x in zip(node.operands, operands, strict=True)
            ]
        match node.op:
            case "add":
                return self._add(node, *operands)
            case "attention" if self.dropout.attn > 0:
                attention = gradients.function(self.ops, "dropped_attention")
                return attention(*operands, self.dropout.attn, **self._counters(node, operands[0]))
        return super().apply(node, operands)

    def _add(self, node: Node, a: Array, b: Array) -> Array:
        if _is_embedding(node):
            return self._drop(node, a + b, self.dropout.embd)
        return self.sum(a, self._drop(node, b, self.dropout.resid))

    def _drop(self, node: Node, x: Array, p: float) -> Array:
        """Apply the dropout of a place; to a gradient, too."""
        if p == 0:
            return x
        drop = gradients.function(self.ops, "dropout")
        return drop(x, p, **self._counters(node, x))

    def _counters(self, node: Node, x: Array) -> dict[str, Any]:
        """Return the counters of a place's random bits, for rows [B, ..., n] of all sequences."""
        rows_of_sequence = math.prod(x.shape[1:-1])
        return {
            "seed": self.dropout.seed,
            "step": self.step,
            "site": self.plan.sites[node],
            "first_row": self.first_sequence * rows_of_sequence,
        }

    def loss(
        self, targets: Array, weights: Array, wanted: tuple[bool, ...], *, keep: bool = False
    ) -> tuple[Array, Array, Array]:
        """Compute the forward pass and the loss; return `cross_entropy`'s results."""
        x = self.forward(keep=keep)
        table = self.value(self.graph.output.operands[1])
        rows = self.ops.xp.reshape(x, (-1, x.shape[-1]))
        cross_entropy = gradients.function(self.ops, "cross_entropy")
        return cross_entropy(rows, table, targets, weights, wanted=wanted)

    # Backward

    def gradients(self, targets: Array, weights: Array) -> tuple[Array, dict[str, Array]]:
        """Return the loss and the gradients of the trainable weights."""
        head = self.graph.output
        wanted = self.plan.wanted.get(head, (False, False))
        loss, dx, dtable = self.loss(targets, weights, wanted, keep=True)
        shape = (*self.ids.shape, -1)
        dx = None if dx is None else self.ops.xp.reshape(dx, shape)
        self.walk(head, (dx, dtable))
        return loss, self.by_name

    def walk(self, head: Node, found: tuple[Array, ...]) -> None:
        """Walk the graph backward from its last node, whose gradients by its operands are given."""
        self._add_gradients(head, found)
        for node in reversed(self.graph.nodes[:-1]):
            if node in self.plan.targets:
                self.by_target[node] = self.by_node[node]
            if node in self.plan.wanted:
                self._walk(node)
            self.results.pop(node, None)

    def _walk(self, node: Node) -> None:
        """Compute the gradients by the operands of a node."""
        match node.op:
            case "key" | "value":
                return  # with the query, which comes last
            case "query":
                heads = self.graph.siblings[node]
                found = [self.by_node.pop(heads[name]) for name in HEADS]
                g = gradients.function(self.ops, "split_heads_vjp")(*found)
                return self._add_gradients(node, (g,))
        g = self.g = self.by_node.pop(node)
        match node.op:
            case "keys" | "values":
                return self._add_gradients(node, (g,))
            case "add":
                return self._add_gradients(node, self._split_sum(node, g))
        vjp = gradients.function(self.ops, f"{node.op}_vjp")
        wanted = self.plan.wanted[node]
        operands = map(self.value, self.plan.read[node])
        match node.op:
            case "attention" if self.dropout.attn > 0:
                vjp = gradients.function(self.ops, "dropped_attention_vjp")
                q, *rest = operands
                counters = self._counters(node, q)
                found = vjp(g, q, *rest, self.dropout.attn, wanted=wanted, **counters)
            case "embed":
                name = node.operands[1].name
                _, total = vjp(g, *operands, wanted=wanted, total=self.by_name.get(name))
                self.by_name[name] = total
                return None
            case "pattern":
                found = vjp(g, *operands)
            case _:
                found = vjp(g, *operands, wanted=wanted)
        return self._add_gradients(node, found)

    def _split_sum(self, node: Node, g: Array) -> tuple[Array, Array]:
        if _is_embedding(node):
            g = self._drop(node, g, self.dropout.embd)
            return g, g
        return g, self._drop(node, g, self.dropout.resid)

    def _add_gradients(self, node: Node, found: tuple[Array, ...]) -> None:
        """Add the gradients by the operands of a node to those that other nodes gave."""
        for operand, g in zip(node.operands, found, strict=False):
            if g is None:
                continue
            if not self.plan.is_wanted(operand):
                continue
            if isinstance(operand, Weight):
                before = self.by_name.get(operand.name)
                self.by_name[operand.name] = g if before is None else before + g
            else:
                before = self.by_node.get(operand)
                self.by_node[operand] = g if before is None else self.sum(before, g)


def _block_name(node: Node) -> str:
    """Return the block of a layer norm: "h.3", or "ln_f"."""
    name: str = node.operands[1].name
    return name[: name.index(".ln_")] if ".ln_" in name else name


def _is_embedding(node: Node) -> bool:
    """Test for the sum of token and position embeddings."""
    return all(isinstance(x, Node) and x.op == "embed" for x in node.operands)
