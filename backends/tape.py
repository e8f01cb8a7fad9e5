"""Record a forward pass instead of computing it, and fuse what belongs together.

The model runs, unchanged, on a `Tape`: a backend whose ops note what they were asked for. `record`
turns the notes into the few instructions that a compiled replay has: EMBED, LINEAR (layer norm,
product, bias, activation, residual) and ATTENTION (keys and values written, all of them read).
Tokens, positions, lengths and the number of rows are data of the replay and not on the tape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gptx.backends.base import OPS
from gptx.backends.positions import Positions

ACTIVATIONS = ("gelu_new", "gelu", "relu")


class Unknown(Exception):
    """The tape does not know what the model does; it has to be run op by op."""


@dataclass(eq=False)
class Value:
    """What an op will return: its name and its operands (values, weights, numbers)."""

    tape: Tape
    op: str
    operands: tuple[Any, ...]

    def __add__(self, other: Any) -> Value:
        return self.tape.note("add", self, other)

    def __getitem__(self, key: Any) -> Value:
        if key != (slice(None), slice(-1, None), slice(None)):
            raise Unknown(f"index {key}")
        return self.tape.note("last", self)  # of each sequence


class Tape:
    """A backend that notes its ops in the order in which they are called."""

    def __init__(self) -> None:
        self.values: list[Value] = []

    def note(self, op: str, *operands: Any) -> Value:
        """Append an op and return what stands for its result."""
        self.values.append(Value(self, op, operands))
        return self.values[-1]

    def __getattr__(self, op: str) -> Callable[..., Value]:
        if op not in OPS:
            raise Unknown(op)
        return lambda *operands: self.note(op, *operands)

    def split_heads(self, qkv: Value, n_head: int) -> tuple[Value, Value, Value]:
        """Queries, keys and values."""
        q, k, v = (self.note(name, qkv) for name in ("query", "key", "value"))
        return q, k, v

    def update(self, layer: int, k: Value, v: Value, positions: Positions) -> tuple[Value, Value]:
        """The cache's part: the model asks for no more of it."""
        return self.note("keys", k, layer), self.note("values", v, layer)


@dataclass
class Instruction:
    """One step of a replay; what it has not is None.

    Attributes
    ----------
    kind
        "embed", "linear" or "attention".
    source, target, residual
        Numbers of buffers; a target is never one of the other two.
    weight, bias
        As `Backend.linear`, `unembed` and `embed` take them.
    table
        Of the positions, for "embed".
    norm
        Weight, bias and epsilon of the layer norm before the product.
    activation
        One of `ACTIVATIONS`.
    is_head
        Whether this is `unembed`: the weight is [V, C].
    last
        Whether only the last token of each sequence is computed.
    layer, scale
        Of "attention".
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
    reads: list[Value] = field(default_factory=list, repr=False)


def record(forward: Callable[..., Any], model: Any, *, last_only: bool) -> list[Instruction]:
    """The instructions of one forward pass of `model` (see `gptx.model.forward`).

    Raises
    ------
    Unknown
        The model does something that the instructions do not cover.
    """
    tape = Tape()
    ids, index = tape.note("ids"), tape.note("index")
    recorded = replace(model, backend=tape)
    positions = Positions(index, 0, True, lambda x: x)
    try:
        logits = forward(recorded, ids, positions, tape, last_only=last_only)
    except (AttributeError, TypeError) as error:  # an operator or a method that no `Value` has
        raise Unknown(str(error)) from error
    instructions = _fuse(tape.values, Counter(v for value in tape.values for v in _of(value)))
    if not instructions or not instructions[-1].is_head or logits is not tape.values[-1]:
        raise Unknown("a forward pass that does not end in its logits")
    if [i.last for i in instructions] != [False] * (len(instructions) - 1) + [last_only]:
        raise Unknown("other tokens than the last in the logits, or fewer before them")
    return instructions


def _of(value: Value) -> list[Value]:
    return [operand for operand in value.operands if isinstance(operand, Value)]


def _fuse(values: list[Value], uses: Counter[Value]) -> list[Instruction]:
    instructions: list[Instruction] = []
    made: dict[Value, Instruction] = {}  # which instruction computes a value

    def begin(value: Value, kind: str, *reads: Value, **fields: Any) -> None:
        made[value] = Instruction(kind, reads=list(reads), **fields)
        instructions.append(made[value])

    def extend(value: Value, earlier: Value, *reads: Value, **fields: Any) -> None:
        """Make the instruction of `earlier` compute `value` too, if nobody else wants it."""
        instruction = made.get(earlier)
        if instruction is not instructions[-1] or uses[earlier] > 1:
            raise Unknown(f"{value.op} of {earlier.op}")
        made[value] = instruction
        instruction.reads += reads
        for name, what in fields.items():
            setattr(instruction, name, what)

    for value in values:
        match value.op, value.operands:
            case "ids" | "index" | "embed" | "last" | "layer_norm", _:
                pass  # taken up by who reads them
            case "query" | "key" | "value" | "keys" | "values", _:
                pass
            case "add", (
                Value(op="embed", operands=(Value(op="ids"), weight)),
                Value(op="embed", operands=(Value(op="index"), table)),
            ):
                begin(value, "embed", weight=weight, table=table)
            case "add", (Value() as x, Value(op="linear") as y):
                extend(value, y, x, residual=0)
            case "linear" | "unembed", (Value() as x, weight, *bias):
                x, norm = (x.operands[0], x.operands[1:]) if x.op == "layer_norm" else (x, None)
                x, last = (x.operands[0], True) if x.op == "last" else (x, False)
                fields = {"weight": weight, "norm": norm, "last": last}
                head = value.op == "unembed"
                begin(value, "linear", x, bias=bias[0] if bias else None, is_head=head, **fields)
            case activation, (Value(op="linear") as x,) if activation in ACTIVATIONS:
                extend(value, x, activation=activation)
            case "attention", (
                Value(op="query", operands=(q,)),
                Value(op="keys", operands=(Value(op="key", operands=(k,)), layer)),
                Value(op="values", operands=(Value(op="value", operands=(v,)), same)),
                _,
                scale,
            ) if q is k is v and layer == same:
                begin(value, "attention", q, layer=layer, scale=scale)
            case _:
                raise Unknown(value.op)
    _lay_out(instructions, made)
    return instructions


def _lay_out(instructions: list[Instruction], made: dict[Value, Instruction]) -> None:
    """Number the buffers, each used again as soon as nobody reads what is in it."""
    last_read = {}
    for i, instruction in enumerate(instructions):
        for value in instruction.reads:
            if value not in made:
                raise Unknown(f"a product of {value.op}")
            last_read[id(made[value])] = i
    free: list[int] = []
    n_buffers = 0
    for i, instruction in enumerate(instructions):
        if not free or instruction.is_head:  # the caller keeps the logits
            free.append(n_buffers)
            n_buffers += 1
        instruction.target = free.pop()
        operands = [made[value] for value in instruction.reads]
        if operands:
            instruction.source = operands[0].target
        if instruction.residual is not None:
            instruction.residual = operands[1].target
        free += {o.target for o in operands if last_read[id(o)] == i}
