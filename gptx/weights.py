"""Weights: from the files of a model to a tree of arrays on a backend.

`load` runs all steps: `read_weights` (mapped arrays, checked) -> `quantize_weights` ->
`to_backend`. Names and layouts are described in `gptx.stored_weights`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.errors import ParameterError
from gptx.quantization import Quantization, QuantizedTensor, dequantize, quantize
from gptx.safetensors_file import widen_bfloat16
from gptx.stored_weights import (
    POSITIONS,
    TABLES,
    Tensor,
    is_linear_weight,
    read_weights,
    should_quantize,
)


@dataclass(frozen=True)
class LoadedWeights:
    """The weights of a model on a backend.

    Attributes
    ----------
    tree
        The tensors: `h.0.attn.c_attn.weight` is `tree.h[0].attn.c_attn.weight`.
    config
        The given config, with the quantization of the loaded weights.
    fingerprint
        See `fingerprint`.
    """

    tree: SimpleNamespace
    config: GPT2Config
    fingerprint: str


def load(
    files: Iterable[Path],
    config: GPT2Config,
    backend: Backend,
    *,
    quantization: Quantization | None = None,
    threads: int | None = None,
) -> LoadedWeights:
    """Read, check and quantize the weights of a model, and bring them to a backend.

    Parameters
    ----------
    files
        The safetensors file, or its shards.
    quantization
        Quantization of the matrices; None keeps the one in the files.
    threads
        CPU threads that quantize; None takes one for each processor.

    Raises
    ------
    WeightsError
        A file is damaged, or its tensors do not fit the config.
    ParameterError
        This quantization of the matrices is not possible.
    StorageError
        A file cannot be read.
    """
    return load_arrays(
        read_weights(files, config), config, backend, quantization=quantization, threads=threads
    )


def load_arrays(
    found: Mapping[str, Tensor],
    config: GPT2Config,
    backend: Backend,
    *,
    quantization: Quantization | None = None,
    threads: int | None = None,
) -> LoadedWeights:
    """Quantize weights that are in memory and bring them to a backend; see `load`."""
    found, config = quantize_weights(found, config, quantization, threads)
    with backend.scope():
        tree = to_backend(found, backend)
    return LoadedWeights(tree, config, fingerprint(found))


def quantize_weights(
    found: Mapping[str, Tensor],
    config: GPT2Config,
    quantization: Quantization | None,
    threads: int | None = None,
) -> tuple[dict[str, Tensor], GPT2Config]:
    """Quantize every linear layer and table of tokens; positions, norms and biases stay floats.

    Returns
    -------
    weights, config
        The quantized weights and their config; unchanged if `quantization` is None or the config's.

    Raises
    ------
    ParameterError
        The inputs of a matrix do not divide into groups, or it is quantized in another way.
    WeightsError
        A weight is not finite.
    """
    if quantization is None or quantization == config.quantization:
        return dict(found), config
    if config.quantization:
        raise ParameterError(
            f"the weights are {config.quantization} already, {quantization} was requested: "
            "omit quantize, or use the model's float weights"
        )
    quantized: dict[str, Tensor] = {}
    for name, array in found.items():
        if isinstance(array, np.ndarray) and should_quantize(name):
            floats = widen_bfloat16(array)
            w = floats.T if is_linear_weight(name) else floats
            quantized[name] = quantize(
                w, quantization.bits, quantization.group_size, name=name, threads=threads
            )
        else:
            quantized[name] = array
    return quantized, replace(config, quantization=quantization)


def fingerprint(found: Mapping[str, Tensor]) -> str:
    """Return a checksum that differs between models of one shape.

    It covers biases, norms and one row of each matrix, since more would read the whole file.
    """
    crc = 0
    for name in sorted(found):
        array = found[name]
        sample = _floats(array if len(array.shape) == 1 else array[:1])
        crc = zlib.crc32(sample.astype(np.float32).tobytes(), crc)
    return f"{crc:08x}"


def _floats(array: Tensor) -> np.ndarray:
    return dequantize(array) if isinstance(array, QuantizedTensor) else widen_bfloat16(array)


def to_backend(found: Mapping[str, Tensor], backend: Backend) -> SimpleNamespace:
    """Bring tensors to a backend, as a tree (see `as_tree`); call it in the backend's scope."""
    return as_tree({name: _on_backend(name, array, backend) for name, array in found.items()})


def _on_backend(name: str, array: Tensor, backend: Backend) -> Any:
    if isinstance(array, QuantizedTensor) and name != POSITIONS:
        return backend.pack_quantized(array, table=name in TABLES)
    floats = _floats(array)
    return backend.pack_weight(floats) if is_linear_weight(name) else backend.asarray(floats)


def as_tree(found: Mapping[str, Any]) -> SimpleNamespace:
    """Make a tree of names: `h.0.attn.c_attn.weight` becomes `tree.h[0].attn.c_attn.weight`."""
    tree: dict[str, Any] = {}
    for name, leaf in found.items():
        *branches, last = name.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[last] = leaf
    blocks = tree.pop("h")
    tree["h"] = [blocks[str(layer)] for layer in range(len(blocks))]
    return _attributes(tree)


def _attributes(node: Any) -> Any:
    if isinstance(node, dict):
        return SimpleNamespace(**{name: _attributes(child) for name, child in node.items()})
    if isinstance(node, list):
        return [_attributes(child) for child in node]
    return node
