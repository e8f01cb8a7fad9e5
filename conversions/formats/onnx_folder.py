"""A folder with GPT-2 as ONNX: the graph, its weights, config.json, tokenizer files.

`onnx_trace.py` traces the graph from `gptx/model.py`. The graph is small and refers to the weights
in a separate file: a protobuf is limited to 2 GB, must be in memory in one piece, and cannot be
mapped (https://github.com/onnx/onnx/blob/main/docs/ExternalData.md). The format is written only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptx.conversions.checkpoint import Array, Checkpoint, float_array, write_config_and_tokenizer
from gptx.conversions.containers.binary import row_chunks, write_array
from gptx.errors import BackendError, ParameterError, WeightsError, argument
from gptx.files import create
from gptx.quantization import Quantization
from gptx.stored_weights import is_linear_weight, should_quantize

MODEL, DATA = "model.onnx", "model.onnx.data"
HEADS = ("logits", "argmax")
INSTALL = "run `pip install '.[onnx]'` in a checkout of gptx"

# A large tensor is aligned to the largest page of any system, so that it can be mapped.
PAGE_BYTES, ALIGNMENT_BYTES, LARGE_TENSOR_BYTES = 2**16, 64, 2**20


def write(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    quantization: Quantization | None = None,
    head: str = "logits",
) -> None:
    """Write a folder that onnxruntime and tract run.

    Parameters
    ----------
    folder
        An empty folder.
    quantization
        Store the matrices as int8, with one scale for each output; the group size is ignored.
        onnxruntime computes with the integers, tract converts them to floats.
    head
        Output of the graph: "logits" [B, S, V], or "argmax", the best next token of each sequence,
        `next_ids` [B, 1].

    Raises
    ------
    ParameterError
        `head` is invalid.
    BackendError
        ndonnx or onnx is not installed.
    WeightsError
        A weight to be quantized is not finite.
    """
    if head not in HEADS:
        raise ParameterError(f"{argument('head')} is {head!r}, expected one of {', '.join(HEADS)}")
    quantized = [n for n in checkpoint.stored if quantization is not None and should_quantize(n)]
    model = import_tracer("gptx.conversions.formats.onnx_trace").trace(
        checkpoint.config, quantized, head
    )
    with create(folder / DATA) as file:
        data = _DataWriter(file, model.graph)
        for name, tensor in checkpoint.tensors.items():
            floats = float_array(tensor)
            if name in quantized:
                data.add_quantized(name, floats)
            else:
                data.add_floats(name, floats)
    with create(folder / MODEL) as file:
        file.write(model.SerializeToString(deterministic=True))
    write_config_and_tokenizer(checkpoint, folder, "float32")


def import_tracer(module: str) -> Any:
    """Import a module that uses the ONNX packages.

    Raises
    ------
    BackendError
        ndonnx or onnx is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"ONNX needs ndonnx and onnx, which cannot be imported ({error}): {INSTALL}"
        ) from error


class _DataWriter:
    """A writer of the weights' file; each written weight replaces an input of the graph."""

    def __init__(self, file: BinaryIO, graph: Any) -> None:
        self.file = file
        self.graph = graph

    def add_floats(self, name: str, floats: Array) -> None:
        """Append a tensor as float32."""
        begin = self._align(4 * floats.size)
        write_array(self.file, floats, "float32", f"tensor {name}")
        refer_to_data(self.graph, name, DATA, begin, self.file.tell() - begin)

    def add_quantized(self, name: str, floats: Array) -> None:
        """Append a matrix as int8, and its scales."""
        scales = _scales(name, floats)
        begin = self._align(floats.size)
        for rows in _quantize_rows(floats, scales):
            self.file.write(rows.data)
        refer_to_data(self.graph, name, DATA, begin, self.file.tell() - begin)
        self.add_floats(f"{name}_scale", scales.reshape(-1))

    def _align(self, n_bytes: int) -> int:
        """Pad the file for a tensor of `n_bytes` bytes; return the tensor's offset."""
        end = self.file.tell()
        alignment = PAGE_BYTES if n_bytes >= LARGE_TENSOR_BYTES else ALIGNMENT_BYTES
        self.file.write(bytes(-end % alignment))
        return self.file.tell()


def refer_to_data(graph: Any, name: str, location: str, begin: int, length: int) -> None:
    """Replace an input of a graph by a tensor whose bytes are in another file.

    Parameters
    ----------
    graph
        An `onnx.GraphProto`.
    location
        Name of the file.
    begin, length
        Place of the tensor in the file, in bytes.
    """
    inputs = graph.input
    (index,) = (i for i, value in enumerate(inputs) if value.name == name)
    type = inputs[index].type.tensor_type
    del inputs[index]
    tensor = graph.initializer.add(name=name, data_type=type.elem_type)
    tensor.dims.extend(dim.dim_value for dim in type.shape.dim)
    tensor.data_location = tensor.EXTERNAL
    for key, value in {"location": location, "offset": begin, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))


def _scales(name: str, floats: Array) -> Array:
    """Compute the scales of the outputs: [1, O] for a layer [I, O], [V, 1] for a table [V, C]."""
    axis = 0 if is_linear_weight(name) else 1
    with np.errstate(all="ignore"):  # numbers that are not finite raise an error below
        low, high = (f(axis=axis, keepdims=True) for f in (floats.min, floats.max))
        scales = (np.maximum(high, -low) / 127).astype(np.float32)
    if not np.isfinite(scales).all():
        raise WeightsError(f"tensor {name} has a NaN or an infinity: it cannot be quantized")
    return np.maximum(scales, np.finfo(np.float32).tiny)


def _quantize_rows(floats: Array, scales: Array) -> Iterator[Array]:
    """Yield the int8 values q of a matrix w = scale · q, in blocks of rows."""
    spread = np.broadcast_to(scales, floats.shape)
    for rows, scale in zip(row_chunks(floats), row_chunks(spread), strict=True):
        yield np.ascontiguousarray(np.rint(rows / scale), np.int8)
