"""GPT-2 as an ONNX graph: `gptx.model.forward`, run by a backend whose arrays are nodes.

The functions of ndonnx are an array API that traces instead of computing, so the generic ops make
the graph. An op is overridden if ONNX has one node for it (layer norm, softmax). It is also
overridden if it needs the size of an axis that is known only at run time: traced sizes are None.

Axes: B sequences, S new tokens, P tokens before them; the others are those of `gptx.model`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import ndonnx
import numpy as np
import onnx
import spox.opset.ai.onnx.v17 as operators
from onnx import helper

from gptx._version import __version__
from gptx.backends import Backend, Positions
from gptx.config import GPT2Config
from gptx.model import Transformer
from gptx.stored_weights import is_linear_weight
from gptx.weights import as_tree

Array = Any
Shape = tuple[str | int, ...]  # sizes of axes, or their names

# The first opset with LayerNormalization, and its file format. ndonnx writes a newer format but
# uses none of its features, which onnx's checker confirms.
OPSET, IR_VERSION = 17, 8

DOC_STRING = """GPT-2, traced by gptx. Axes: B sequences, S new tokens, P tokens before them.

The first call has P = 0. Each later one takes `present_key_values` of the one before as
`past_key_values`, and a mask that is longer by the new tokens. Prompts of different lengths are
padded on the left, with any token, and 0 in the mask. A sequence has no more tokens than
`wpe.weight` has rows."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix: int8 values, and a scale for each output (each row of a table)."""

    values: Array
    scales: Array


@dataclass(frozen=True)
class PaddedPositions(Positions):
    """Positions in a batch with padding.

    Padding has a position after all others. So no token attends to it, and it attends to all
    tokens: attention to none would make softmax a NaN.

    Attributes
    ----------
    keys, new
        Positions of all tokens, [B, P+S], and of the new ones among them, [B, S].
    """

    keys: Array
    new: Array


class Namespace:
    """ndonnx, with ONNX operators where its functions need several nodes or are missing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ndonnx, name)

    def matmul(self, a: Array, b: Array) -> Array:
        """Multiply arrays of any number of axes, with sizes of 0 too (an empty past)."""
        return node(operators.matmul, a, b)

    def take(self, x: Array, indices: Array, axis: int = 0) -> Array:
        """Select elements along an axis, for indices of any number of axes."""
        return node(operators.gather, x, indices, axis=axis)

    def reshape(self, x: Array, shape: tuple[int | None, ...]) -> Array:
        """Reshape; an axis of unknown size keeps its size."""
        for size, before in zip_longest(shape, x.shape, fillvalue=0):
            assert size is not None or before is None, f"{x.shape} as {shape}"
        sizes = operators.const(
            np.array([size or 0 for size in shape], np.int64)
        )  # 0 keeps the size
        return ndonnx.asarray(operators.reshape(x.unwrap_spox(), sizes))


class OnnxBackend(Backend):
    """A backend whose arrays are nodes of an ONNX graph."""

    name = "onnx"
    dtypes = ("float32",)

    def __init__(self) -> None:
        super().__init__(Namespace())

    def embed(self, ids: Array, table: Array) -> Array:
        """Select rows of a table, in one node; only the selected rows are dequantized."""
        xp = self.xp
        if not isinstance(table, QuantizedWeight):
            return xp.take(table, ids)
        rows = node(operators.cast, xp.take(table.values, ids), to=np.float32)
        # The new axis makes other scales than the head's in a loaded graph: onnxruntime fuses a
        # product with its scales only if they have one use.
        return rows * xp.take(table.scales[:, None], ids)

    def linear(self, x: Array, weight: Array, bias: Array) -> Array:
        """Multiply and add a bias, with three axes."""
        return self.xp.matmul(x, _floats(weight)) + bias

    def unembed(self, x: Array, table: Array) -> Array:
        """Multiply by the transposed table; int8 is transposed first, once at load time."""
        xp = self.xp
        if not isinstance(table, QuantizedWeight):
            return xp.matmul(x, xp.matrix_transpose(table))
        return xp.matmul(
            x, _floats(QuantizedWeight(xp.matrix_transpose(table.values), table.scales))
        )

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Normalize with LayerNormalization; its other outputs are unused."""
        arguments = (array.unwrap_spox() for array in (x, weight, bias))
        return ndonnx.asarray(operators.layer_normalization(*arguments, epsilon=eps)[0])

    def softmax(self, x: Array) -> Array:
        """Compute Softmax over the last axis."""
        return node(operators.softmax, x)

    def visible(self, k: Array, positions: Positions) -> Array:
        """Compare the positions of keys and queries; with padding, those of the keys have gaps."""
        assert isinstance(positions, PaddedPositions)
        return positions.keys[:, None, None, :] <= positions.new[:, None, :, None]


def node(operator: Any, *arrays: Array, **attributes: Any) -> Array:
    """Return the result of an ONNX operator of spox."""
    return ndonnx.asarray(operator(*(array.unwrap_spox() for array in arrays), **attributes))


def _floats(weight: Array) -> Array:
    """Dequantize a matrix [I, O] in a node that a runtime can fuse with a product."""
    if isinstance(weight, QuantizedWeight):
        return node(operators.dequantize_linear, weight.values, weight.scales, axis=1)
    return weight


class GrowingCache:
    """A KV cache for `forward`: keys and values of the past, with the new ones appended."""

    def __init__(self, past: Array) -> None:
        self.past = past
        self.present: list[Array] = []

    def update(self, layer: int, k: Array, v: Array, positions: Positions) -> tuple[Array, Array]:
        """Add keys and values [B, H, S, D]; return all so far, [B, H, P+S, D]."""
        # `gather` is one node; an index of ndonnx, x[i], would make two.
        index = [ndonnx.asarray(np.array(2 * layer + i)) for i in range(2)]
        before = [node(operators.gather, self.past, i, axis=0) for i in index]
        after = [ndonnx.concat(pair, axis=2) for pair in zip(before, (k, v), strict=True)]
        self.present += after
        return after[0], after[1]


def trace(config: GPT2Config, quantized: Collection[str], head: str) -> onnx.ModelProto:
    """Trace the graph of a model; its weights are inputs under their names.

    Parameters
    ----------
    config
        Settings of the model.
    quantized
        Names of the matrices that are int8.
    head
        "logits" for the logits of all tokens, "argmax" for the best next token of each sequence.

    Returns
    -------
    onnx.ModelProto
        The inputs are `input_ids` [B, S], `attention_mask` [B, P+S], `past_key_values`
        [2L, B, H, P, D] (keys and values of layer 0, of layer 1 ...) and the weights. A quantized
        weight is two inputs, `name` and `name_scale`. The outputs are `logits` [B, S, V] or
        `next_ids` [B, 1], and `present_key_values` [2L, B, H, P+S, D].
    """
    L, H, D = config.n_layer, config.n_head, config.head_dim
    ids = ndonnx.argument(dtype=ndonnx.int64, shape=("B", "S"))
    mask = ndonnx.argument(dtype=ndonnx.int64, shape=("B", "P+S"))
    past = ndonnx.argument(dtype=ndonnx.float32, shape=(2 * L, "B", H, "P", D))
    arguments: dict[str, Array] = {}
    weights: dict[str, Any] = {}
    for name, shape in config.tensor_shapes().items():
        dtype = ndonnx.int8 if name in quantized else ndonnx.float32
        weights[name] = arguments[name] = ndonnx.argument(dtype=dtype, shape=shape)
        if name in quantized:
            n_out = shape[1 if is_linear_weight(name) else 0]
            scales = ndonnx.argument(dtype=ndonnx.float32, shape=(n_out,))
            arguments[f"{name}_scale"] = scales
            weights[name] = QuantizedWeight(weights[name], scales)

    model = Transformer(config, as_tree(weights), OnnxBackend())
    cache = GrowingCache(past)
    positions = padded_positions(mask, past.dynamic_shape[3], config)
    logits = model.forward(ids, positions, cache, last_only=head == "argmax")
    if head == "argmax":
        result = {"next_ids": ndonnx.argmax(logits, axis=-1)}
    else:
        result = {"logits": logits}
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": past, **arguments}
    proto = ndonnx.build(inputs, {**result, "present_key_values": ndonnx.stack(cache.present)})
    V = config.vocab_size
    shapes: dict[str, Shape] = {
        "logits": ("B", "S", V),
        "next_ids": ("B", 1),
        "present_key_values": (2 * L, "B", H, "P+S", D),
    }
    finish(proto, shapes, DOC_STRING)
    return proto


def padded_positions(mask: Array, P: Array, config: GPT2Config) -> PaddedPositions:
    """Count the tokens whose mask [B, P+S] is 1; the new ones follow P tokens and padding."""
    counted = ndonnx.cumulative_sum(mask, axis=1) - 1  # [B, P+S]
    keys = ndonnx.where(mask > 0, counted, config.n_positions)
    index = counted[:, P:]  # [B, S]
    index = ndonnx.where(index < 0, 0, index)  # padding needs a valid index too
    return PaddedPositions(index, config.n_positions, False, lambda x: x, keys, keys[:, P:])


def finish(proto: onnx.ModelProto, shapes: Mapping[str, Shape], description: str) -> None:
    """Name a graph and the axes of its outputs, remove what is unused, and check it.

    Parameters
    ----------
    shapes
        Name of an output -> its shape.
    """
    graph = proto.graph
    _share_constants(graph)
    for entry in graph.node:
        if entry.op_type == "LayerNormalization":
            del entry.output[1:]
    for value in graph.output:
        type = value.type.tensor_type
        type.CopyFrom(helper.make_tensor_type_proto(type.elem_type, shapes[value.name]).tensor_type)
    graph.name = "gpt2"
    graph.doc_string = proto.doc_string = description
    proto.producer_name, proto.producer_version = "gptx", __version__
    proto.ir_version = IR_VERSION
    proto.ClearField("metadata_props")
    proto.ClearField("opset_import")
    proto.opset_import.append(helper.make_opsetid("", OPSET))
    onnx.checker.check_model(proto, full_check=True)


def _share_constants(graph: onnx.GraphProto) -> None:
    """Remove duplicate constants."""
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    nodes = []
    for entry in graph.node:
        if entry.op_type == "Constant":
            value = entry.attribute[0].SerializeToString(deterministic=True)
            same[entry.output[0]] = first.setdefault(value, entry.output[0])
            if same[entry.output[0]] != entry.output[0]:
                continue
        entry.input[:] = [same.get(name, name) for name in entry.input]
        nodes.append(entry)
    graph.ClearField("node")
    graph.node.extend(nodes)
