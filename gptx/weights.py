"""Weights: safetensors files -> arrays on a backend, checked by key, shape and dtype.

Names are the Hub's without the `transformer.` prefix (`h.0.attn.c_attn.weight`), layouts are the
Hub's Conv1D `[in, out]`, and a tied head is not stored twice. A quantized matrix is one
`QuantizedTensor` [out, in] under its weight's name; in a file it is three tensors, as MLX writes
them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.errors import ParameterError, WeightsError
from gptx.files import BFLOAT16, read_safetensors, widened
from gptx.quantization import Quantization, QuantizedTensor, dequantize, quantize

Tensor = np.ndarray | QuantizedTensor

# The causal mask, which some files store as if it were a weight.
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

# What can be quantized: linear layers, and tables, which are [N, C] in every layout. Positions are
# a small one: mlx-lm quantizes them, gptx does not, and computes with floats.
LINEAR = re.compile(r"h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight")
POSITIONS = "wpe.weight"
TABLES = ("wte.weight", POSITIONS, "lm_head.weight")


@dataclass(frozen=True)
class LoadedWeights:
    """The weights of a model on a backend.

    Attributes
    ----------
    tree
        The tensors: `h.0.attn.c_attn.weight` is `tree.h[0].attn.c_attn.weight`.
    config
        The config given, with the quantization that the weights now have.
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
        Quantize the matrices in this way; None leaves them unchanged.
    threads
        CPU threads that quantize; None takes one for each processor.

    Raises
    ------
    WeightsError
        A file is damaged, or its tensors do not fit the config.
    ParameterError
        The matrices cannot be quantized in this way.
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


def read_weights(paths: Iterable[Path], config: GPT2Config) -> dict[str, Tensor]:
    """The tensors that `config` asks for, from one safetensors file or several shards.

    Names may have the prefix `transformer.`, or mlx-lm's `model.`, with which the matrices of
    linear layers lie `[out, in]`.

    Raises
    ------
    WeightsError
        A file is damaged, or a tensor is missing, unknown, there twice or misshapen.
    """
    found: dict[str, np.ndarray] = {}
    for path in paths:
        for stored, array in read_safetensors(path)[0].items():
            name, transposed = our_name(stored)
            if is_no_weight(name, config):
                continue
            if name in found:
                raise WeightsError(f"{path}: tensor {name} is there twice")
            found[name] = array.T if transposed and array.dtype != np.uint32 else array
    weights = _joined(found, config.quantization)
    check_weights(weights, config)
    return weights


def our_name(stored: str) -> tuple[str, bool]:
    """gptx's name of a tensor in a safetensors file, and whether it lies `[out, in]` there."""
    name = stored.removeprefix("transformer.").removeprefix("model.")
    return name, stored.startswith("model.") and LINEAR.fullmatch(name) is not None


def is_no_weight(name: str, config: GPT2Config) -> bool:
    """Whether the tensor of a file is left out: a mask, or a tied head that is stored twice."""
    tied_head = config.tie_word_embeddings and name.startswith("lm_head.")
    return tied_head or BUFFERS.fullmatch(name) is not None


def _joined(found: dict[str, np.ndarray], how: Quantization | None) -> dict[str, Tensor]:
    """Make one `QuantizedTensor` of the three tensors of each quantized matrix."""
    joined: dict[str, Tensor] = dict(found)
    quantized = {
        name.rpartition(".")[0]: None  # a set that keeps its order
        for name, array in found.items()
        if name.endswith((".scales", ".biases"))
        or (name.endswith(".weight") and array.dtype == np.uint32)
    }
    for layer in quantized:
        name = f"{layer}.weight"
        if how is None:
            raise WeightsError(
                f'tensor {name} is quantized, but the config has no "quantization" that says how: '
                "fetch config.json again"
            )
        parts = (name, f"{layer}.scales", f"{layer}.biases")
        if missing := [part for part in parts if part not in found]:
            raise WeightsError(f"{_names(missing)} missing: {layer} is not whole")
        weight, scales, biases = (found[part] for part in parts)
        try:
            matrix = QuantizedTensor(
                weight, _float32(scales), _float32(biases), how.group_size, how.bits
            )
        except WeightsError as error:
            raise WeightsError(f"tensor {name} is not {how}: {error}") from None
        for part in parts:
            del joined[part]
        joined[name] = matrix
    return joined


def _float32(array: np.ndarray) -> np.ndarray:
    wide = widened(array)
    return wide.astype(np.float32, copy=False) if wide.dtype.kind == "f" else wide


def check_weights(found: Mapping[str, Tensor], config: GPT2Config) -> None:
    """Raise WeightsError unless `found` is what `config` asks for, no more and no less.

    In a quantized model some matrices may be floats all the same: mlx-lm leaves those as they are
    whose inputs are no whole number of groups.
    """
    expected = config.tensor_shapes()
    if missing := [name for name in expected if name not in found]:
        raise WeightsError(f"{_names(missing)} missing: the weights do not fit the config")
    if unknown := [name for name in found if name not in expected]:
        raise WeightsError(f"{_names(unknown)} unknown: the weights do not fit the config")
    for name, shape in expected.items():
        array = found[name]
        if isinstance(array, QuantizedTensor):
            how = Quantization(array.group_size, array.bits)
            wanted = config.quantization if _is_quantizable(name) else None
            if how != wanted:
                raise WeightsError(
                    f"tensor {name} is {how}, the config asks for {wanted or 'floats'}"
                )
            shape = shape[::-1] if LINEAR.fullmatch(name) else shape
        elif array.dtype.kind != "f" and array.dtype != BFLOAT16:
            raise WeightsError(f"tensor {name} is of type {array.dtype}, expected a float type")
        if array.shape != shape:
            raise WeightsError(
                f"tensor {name} has shape {list(array.shape)}, the config asks for {list(shape)}"
            )
    if config.quantization and not any(isinstance(x, QuantizedTensor) for x in found.values()):
        raise WeightsError(f"no tensor is quantized, the config asks for {config.quantization}")


def _is_quantizable(name: str) -> bool:
    return name in TABLES or LINEAR.fullmatch(name) is not None


def takes_codes(name: str) -> bool:
    """Whether gptx quantizes a tensor: linear layers, and tables of tokens."""
    return _is_quantizable(name) and name != POSITIONS


def quantize_weights(
    found: Mapping[str, Tensor],
    config: GPT2Config,
    how: Quantization | None,
    threads: int | None = None,
) -> tuple[dict[str, Tensor], GPT2Config]:
    """Quantize every linear layer and table of tokens; positions, norms and biases stay floats.

    Returns
    -------
    weights, config
        What they are then; as they were if that is so already, or if `how` is None.

    Raises
    ------
    ParameterError
        A matrix does not divide into groups of that size, or is quantized in another way.
    WeightsError
        A weight is not finite.
    """
    if how is None or how == config.quantization:
        return dict(found), config
    if config.quantization:
        raise ParameterError(
            f"{how} was asked for, but the weights are {config.quantization} already: "
            "leave quantize out, or take the model's float weights"
        )
    quantized: dict[str, Tensor] = {}
    for name, array in found.items():
        if isinstance(array, np.ndarray) and takes_codes(name):
            w = widened(array).T if LINEAR.fullmatch(name) else widened(array)
            quantized[name] = quantize(w, how.bits, how.group_size, name=name, threads=threads)
        else:
            quantized[name] = array
    return quantized, replace(config, quantization=how)


def fingerprint(found: Mapping[str, Tensor]) -> str:
    """A checksum that tells models of one shape apart: of biases, norms and a row of each matrix.

    Not of everything, since that would read the whole file.
    """
    crc = 0
    for name in sorted(found):
        array = found[name]
        sample = _floats(array if len(array.shape) == 1 else array[:1])
        crc = zlib.crc32(sample.astype(np.float32).tobytes(), crc)
    return f"{crc:08x}"


def _names(names: list[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]} is"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensors {', '.join(names[:3])}{more} are"


def _floats(array: Tensor) -> np.ndarray:
    return dequantize(array) if isinstance(array, QuantizedTensor) else widened(array)


def to_backend(found: Mapping[str, Tensor], backend: Backend) -> SimpleNamespace:
    """Bring the tensors to the backend, as a tree: `h.0.attn.c_attn.weight` becomes
    `tree.h[0].attn.c_attn.weight`."""
    return as_tree({name: _on_backend(name, array, backend) for name, array in found.items()})


def _on_backend(name: str, array: Tensor, backend: Backend) -> Any:
    if isinstance(array, QuantizedTensor) and name != POSITIONS:
        return backend.pack_quantized(array, table=name in TABLES)
    floats = _floats(array)
    return backend.pack_weight(floats) if LINEAR.fullmatch(name) else backend.asarray(floats)


def as_tree(found: Mapping[str, Any]) -> SimpleNamespace:
    """What is under the name `h.0.attn.c_attn.weight` as `tree.h[0].attn.c_attn.weight`."""
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
