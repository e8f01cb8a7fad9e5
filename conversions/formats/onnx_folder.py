"""A folder with GPT-2 as ONNX: the graph, its weights beside it, config.json, tokenizer files.

The graph is traced from `gptx/model.py` (see `onnx_trace.py`). It is small and names the weights,
which lie in a file of their own, whatever their size: protobuf ends at 2 GB, a graph that holds its
weights has to be in memory whole, and numbers that lie by themselves can be mapped
(https://github.com/onnx/onnx/blob/main/docs/ExternalData.md). Written only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptx.conversions.checkpoint import Array, Checkpoint, float_array
from gptx.conversions.containers.binary import chunks, write_array
from gptx.conversions.formats.hugging_face import write_config
from gptx.errors import BackendError, ParameterError, WeightsError
from gptx.files import create
from gptx.quantization import Quantization
from gptx.stored_weights import is_linear_weight, should_quantize

MODEL, DATA = "model.onnx", "model.onnx.data"
HEADS = ("logits", "argmax")
INSTALL = "pip install 'gptx[onnx]'"

# Where a tensor begins: a large one where any system can map it into memory.
PAGE, ALIGNMENT, LARGE = 2**16, 64, 2**20


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
        It exists and is empty.
    quantization
        Keep the matrices as int8, with one scale for each output (whatever the group size is):
        onnxruntime computes with the codes, tract makes floats of them.
    head
        What the graph returns: "logits" [B, S, V], or with "argmax" the best next token of each
        sequence alone, `next_ids` [B, 1].

    Raises
    ------
    ParameterError
        There is no such head.
    BackendError
        The packages that make a graph are not installed.
    WeightsError
        A weight that is to be quantized is not finite.
    """
    if head not in HEADS:
        raise ParameterError(f"head is {head!r}, expected one of {', '.join(HEADS)}")
    names = () if quantization is None else _matrices(checkpoint)
    model = _trace()(checkpoint.config, names, head)
    with create(folder / DATA) as file:
        data = _Data(file, model.graph)
        for name, tensor in checkpoint.tensors.items():
            floats = float_array(tensor)
            if name in names:
                data.add_codes(name, floats)
            else:
                data.add_floats(name, floats)
    with create(folder / MODEL) as file:
        file.write(model.SerializeToString(deterministic=True))
    write_config(checkpoint, folder, "float32")


def _trace() -> Any:
    """`onnx_trace.trace`, whose packages nothing else needs."""
    try:
        return importlib.import_module("gptx.conversions.formats.onnx_trace").trace
    except ImportError as error:
        raise BackendError(
            f"ONNX needs ndonnx and onnx, which cannot be imported ({error}): {INSTALL}"
        ) from error


def _matrices(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What is quantized: linear layers, and tables of tokens."""
    return tuple(name for name in checkpoint.stored if should_quantize(name))


class _Data:
    """The file of the weights, each of which an input of the graph becomes a reference to."""

    def __init__(self, file: BinaryIO, graph: Any) -> None:
        self.file = file
        self.graph = graph

    def add_floats(self, name: str, floats: Array) -> None:
        """Append a tensor as float32."""
        begin = self._begin(4 * floats.size)
        write_array(self.file, floats, "float32", f"tensor {name}")
        self._refer(name, begin)

    def add_codes(self, name: str, floats: Array) -> None:
        """Append a matrix as int8 codes, and its scales."""
        scales = _scales(name, floats)
        begin = self._begin(floats.size)
        for codes in _codes(floats, scales):
            self.file.write(codes.data)
        self._refer(name, begin)
        self.add_floats(f"{name}_scale", scales.reshape(-1))

    def _begin(self, n_bytes: int) -> int:
        """Where a tensor of so many bytes begins."""
        end = self.file.tell()
        self.file.write(bytes(-end % (PAGE if n_bytes >= LARGE else ALIGNMENT)))
        return self.file.tell()

    def _refer(self, name: str, begin: int) -> None:
        """Make of an input a tensor whose numbers are in the file, from `begin` to its end."""
        inputs = self.graph.input
        (index,) = (i for i, value in enumerate(inputs) if value.name == name)
        type = inputs[index].type.tensor_type
        del inputs[index]
        tensor = self.graph.initializer.add(name=name, data_type=type.elem_type)
        tensor.dims.extend(dim.dim_value for dim in type.shape.dim)
        tensor.data_location = tensor.EXTERNAL
        length = self.file.tell() - begin
        for key, value in {"location": DATA, "offset": begin, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))


def _scales(name: str, floats: Array) -> Array:
    """One scale for each output: [1, O] of a linear layer [I, O], [V, 1] of a table [V, C]."""
    axis = 0 if is_linear_weight(name) else 1
    with np.errstate(all="ignore"):  # what is not finite is refused, not warned of
        low, high = (f(axis=axis, keepdims=True) for f in (floats.min, floats.max))
        scales = (np.maximum(high, -low) / 127).astype(np.float32)
    if not np.isfinite(scales).all():
        raise WeightsError(f"{name} holds a NaN or an infinity: it cannot be quantized")
    return np.maximum(scales, np.finfo(np.float32).tiny)


def _codes(floats: Array, scales: Array) -> Iterator[Array]:
    """The int8 codes of a matrix, w = scale · code, some rows at a time."""
    spread = np.broadcast_to(scales, floats.shape)
    for rows, scale in zip(chunks(floats), chunks(spread), strict=True):
        yield np.ascontiguousarray(np.rint(rows / scale), np.int8)
