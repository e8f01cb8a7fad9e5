"""Weights: from the files of a model to a tree of arrays on a backend.

`load` takes any mapping of names to tensors. Each tensor is read, quantized and brought to the
backend before the next one is read, so the peak is the model on the backend and one tensor.
`gptx.stored_weights` describes names and layouts.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.errors import ParameterError, argument
from gptx.quantization import (
    Quantization,
    QuantizedTensor,
    check_group_size,
    dequantize,
    quantize,
)
from gptx.safetensors_file import widen_bfloat16
from gptx.stored_weights import (
    POSITIONS,
    TABLES,
    Tensor,
    is_linear_weight,
    should_quantize,
)

NO_NUMBA_NOTE = (
    "the quantized weights become floats, which take more memory and time, because Numba cannot be "
    "imported: run `pip install '.[fast]'` in a checkout of gptx"
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
    notes
        Differences between the files and what the backend computes with, one sentence each.
    """

    tree: SimpleNamespace
    config: GPT2Config
    fingerprint: str
    notes: tuple[str, ...] = ()


def load(
    found: Mapping[str, Tensor],
    config: GPT2Config,
    backend: Backend,
    *,
    quantization: Quantization | None = None,
    threads: int | None = None,
) -> LoadedWeights:
    """Quantize the tensors of a model and bring them to a backend, one at a time.

    Parameters
    ----------
    found
        Name -> tensor. Each is accessed once: a mapping can read it from a file then.
    quantization
        Quantization of the matrices; None keeps the one in the files.
    threads
        CPU threads that quantize; None takes one for each processor.

    Raises
    ------
    ParameterError
        This quantization of the matrices is not possible.
    WeightsError, StorageError
        A weight is not finite, or a file cannot be read.
    """
    described = quantized_config(config, quantization)
    change = None if described == config else quantization
    samples: dict[str, bytes] = {}
    dequantized: list[str] = []

    def bring(name: str) -> Any:
        tensor = _quantized(name, found[name], change, threads)
        samples[name] = _sample(tensor)
        weight = _on_backend(name, tensor, backend)
        if isinstance(tensor, QuantizedTensor) and isinstance(weight, np.ndarray):
            dequantized.append(name)
        return weight

    with backend.scope():
        tree = as_tree({name: bring(name) for name in found})
    is_slow = _has_numba_kernels(backend) and any(map(should_quantize, dequantized))
    notes = (NO_NUMBA_NOTE,) if is_slow else ()
    return LoadedWeights(tree, described, _checksum(samples), notes)


def _has_numba_kernels(backend: Backend) -> bool:
    """Test for a backend that computes with quantized values if Numba can be imported."""
    method = getattr(backend.pack_quantized, "__func__", None)
    has_kernels = backend.name == "numpy" and method is not Backend.pack_quantized
    return has_kernels and backend.dtype == "float32"


def quantized_config(config: GPT2Config, quantization: Quantization | None) -> GPT2Config:
    """Return the config of a model after `quantize_weights`, which needs no weights.

    Raises
    ------
    ParameterError
        The inputs of a matrix do not divide into groups, or it is quantized in another way.
    """
    if quantization is None or quantization == config.quantization:
        return config
    if config.quantization:
        raise ParameterError(
            f"the weights are {config.quantization} already, {quantization} was requested: "
            f"omit {argument('quantize')}, or use the model's float weights"
        )
    for name, shape in replace(config, n_layer=1).tensor_shapes().items():
        if should_quantize(name):
            n_in = shape[0] if is_linear_weight(name) else shape[1]
            check_group_size(n_in, quantization.group_size, name)
    return replace(config, quantization=quantization)


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
    described = quantized_config(config, quantization)
    change = None if described == config else quantization
    return {name: _quantized(name, x, change, threads) for name, x in found.items()}, described


def _quantized(
    name: str, tensor: Tensor, quantization: Quantization | None, threads: int | None
) -> Tensor:
    """Quantize a tensor if it is a matrix of floats."""
    if quantization is None or isinstance(tensor, QuantizedTensor) or not should_quantize(name):
        return tensor
    floats = widen_bfloat16(tensor)
    w = floats.T if is_linear_weight(name) else floats
    return quantize(w, quantization.bits, quantization.group_size, name=name, threads=threads)


def fingerprint(found: Mapping[str, Tensor]) -> str:
    """Return a checksum that differs between models of one shape.

    It covers biases, norms and one row of each matrix, since more would read the whole file.
    """
    return _checksum({name: _sample(tensor) for name, tensor in found.items()})


def _sample(tensor: Tensor) -> bytes:
    """Return the part of a tensor that the fingerprint covers, as float32."""
    floats = _floats(tensor if len(tensor.shape) == 1 else tensor[:1])
    return floats.astype(np.float32).tobytes()


def _checksum(samples: Mapping[str, bytes]) -> str:
    crc = 0
    for name in sorted(samples):
        crc = zlib.crc32(samples[name], crc)
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


def array_bytes(tree: Any) -> int:
    """Sum the bytes of the arrays in a tree of namespaces, lists and objects."""
    if hasattr(tree, "nbytes"):
        return int(tree.nbytes)
    children = tree if isinstance(tree, list | tuple) else getattr(tree, "__dict__", {}).values()
    return sum(map(array_bytes, children))
