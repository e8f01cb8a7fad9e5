"""Quantized variants of a float32 ONNX graph, for `benchmarks.wasm`: an operator for each product.

Every product of activations with a weight becomes the operator. The table of the embeddings stays
float32, since the runtime has no fast operator for its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray
MICROSOFT = "com.microsoft"
BLOCK = 32  # inputs that share a scale in MatMulNBits


def matmul_n_bits(bits: int, accuracy_level: int) -> Callable[..., list[Any]]:
    """Return a maker of MatMulNBits; level 0 computes in float32, level 4 in int8."""

    def make(name: str, w: Array, x: str, y: str) -> list[Any]:
        n_out, n_in = w.shape
        groups = w.reshape(n_out, n_in // BLOCK, BLOCK)
        half = 2 ** (bits - 1)
        scales = np.maximum(abs(groups).max(-1, keepdims=True) / (half - 1), 1e-30)
        values = (np.rint(groups / scales) + half).astype(np.uint8)
        if bits == 4:
            values = values[..., 0::2] | values[..., 1::2] << 4
        attributes = {"K": n_in, "N": n_out, "bits": bits, "block_size": BLOCK}
        return [
            numpy_helper.from_array(values, f"{name}_q"),
            numpy_helper.from_array(scales[..., 0].astype(np.float32), f"{name}_scale"),
            helper.make_node(
                "MatMulNBits",
                [x, f"{name}_q", f"{name}_scale"],
                [y],
                domain=MICROSOFT,
                accuracy_level=accuracy_level,
                **attributes,
            ),
        ]

    return make


def dynamic_quantize_matmul(name: str, w: Array, x: str, y: str) -> list[Any]:
    """Make DynamicQuantizeMatMul: int8 weights, uint8 activations."""
    scales = (np.maximum(abs(w).max(1), 1e-30) / 127).astype(np.float32)
    values = np.ascontiguousarray(np.rint(w.T / scales).astype(np.int8))
    return [
        numpy_helper.from_array(values, f"{name}_q"),
        numpy_helper.from_array(scales, f"{name}_scale"),
        helper.make_node(
            "DynamicQuantizeMatMul", [x, f"{name}_q", f"{name}_scale"], [y], domain=MICROSOFT
        ),
    ]


def dequantize_linear(name: str, w: Array, x: str, y: str) -> list[Any]:
    """Make DequantizeLinear and MatMul, as `gptx convert --to onnx --quantize int8`."""
    scales = (np.maximum(abs(w).max(1), 1e-30) / 127).astype(np.float32)
    values = np.ascontiguousarray(np.rint(w.T / scales).astype(np.int8))
    return [
        numpy_helper.from_array(values, f"{name}_q"),
        numpy_helper.from_array(scales, f"{name}_scale"),
        helper.make_node(
            "DequantizeLinear", [f"{name}_q", f"{name}_scale"], [f"{name}_floats"], axis=1
        ),
        helper.make_node("MatMul", [x, f"{name}_floats"], [y]),
    ]


VARIANTS: dict[str, Callable[..., list[Any]]] = {
    "int8 DequantizeLinear": dequantize_linear,
    "int8 MatMulNBits": matmul_n_bits(8, 0),
    "int8 MatMulNBits, level 4": matmul_n_bits(8, 4),
    "int4 MatMulNBits": matmul_n_bits(4, 0),
    "int8 DynamicQuantizeMatMul": dynamic_quantize_matmul,
}


def quantized(model: onnx.ModelProto, make: Callable[..., list[Any]]) -> onnx.ModelProto:
    """Return a float32 graph, whose weights are in it, with an operator for each product."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    transposed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in weights
    }
    kept, replaced = [], set()
    for node in graph.node:
        name = transposed.get(node.input[1], node.input[1]) if node.op_type == "MatMul" else ""
        if name in weights:
            w = numpy_helper.to_array(weights[name])
            w = w if node.input[1] in transposed else w.T
            for made in make(name, np.ascontiguousarray(w), node.input[0], node.output[0]):
                (graph.initializer if hasattr(made, "data_type") else kept).append(made)
            replaced.add(name)
        elif node.output[0] not in transposed:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    unread = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unread:
        graph.initializer.remove(tensor)
    assert replaced, "the graph has no product with a weight"
    result.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return result
