"""The weights of a model in its files: names, layouts, and the checks of both.

`gptx.load` (through `gptx.weights`) and conversions share this reader, so a fault has one message.
It reads headers; tensors are mapped or read on demand. `gptx.model_files` finds the files.

Names are the Hub's without the prefix `transformer.` (`h.0.attn.c_attn.weight`), layouts are the
Hub's Conv1D `[in, out]`, and a tied head is not stored twice. A quantized matrix is one
`QuantizedTensor` [out, in] under the name of its weight. A file stores it as three tensors, as
MLX's libraries do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gptx.config import GPT2Config
from gptx.errors import WeightsError
from gptx.quantization import Quantization, QuantizedTensor
from gptx.safetensors_file import BFLOAT16, Entry, SafetensorsFile, widen_bfloat16

Tensor = np.ndarray | QuantizedTensor

# Names

_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_LINEAR_WEIGHT = re.compile(r"h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight")

POSITIONS = "wpe.weight"
TABLES = ("wte.weight", POSITIONS, "lm_head.weight")  # [N, C] in every layout


def is_mask_buffer(name: str) -> bool:
    """Test for a causal mask, which some files store beside the weights."""
    return _MASK_BUFFER.fullmatch(name) is not None


def is_dropped(name: str, config: GPT2Config) -> bool:
    """Test for a tensor that gptx does not read: a mask, or the duplicate of a tied head."""
    return is_mask_buffer(name) or (config.tie_word_embeddings and name.startswith("lm_head."))


def is_linear_weight(name: str) -> bool:
    """Test for the matrix of a linear layer, which is [in, out] here and [out, in] elsewhere."""
    return _LINEAR_WEIGHT.fullmatch(name) is not None


def should_quantize(name: str) -> bool:
    """Test for a tensor that `quantize_weights` quantizes: linear layers, tables of tokens.

    mlx-lm quantizes the small table of positions too; gptx reads that and computes with floats.
    """
    return _may_be_quantized(name) and name != POSITIONS


def _may_be_quantized(name: str) -> bool:
    return name in TABLES or is_linear_weight(name)


# Reading


class DescribedTensor(Protocol):
    """A tensor in a file, described before it is read; see `SafetensorsTensor`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as in `GPT2Config.tensor_shapes`."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the array; float32 for a quantized matrix."""

    @property
    def quantization(self) -> Quantization | None:
        """Quantization of the matrix; None for floats."""


@dataclass(frozen=True)
class _Part:
    """An array of a file: a tensor, or one of the three of a quantized matrix."""

    file: SafetensorsFile
    stored_name: str
    transposed: bool

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.stored_name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape[::-1] if self.transposed else self.entry.shape

    @property
    def is_float(self) -> bool:
        return _is_float(self.entry.dtype)

    def map(self) -> np.ndarray:
        array = self.file.map(self.stored_name)
        return array.T if self.transposed else array

    def read(self) -> np.ndarray:
        array = self.file.read(self.stored_name)
        return array.T if self.transposed else array


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor of a model in its files, read on demand.

    Attributes
    ----------
    shape
        Shape as in `GPT2Config.tensor_shapes`, for any layout in the file.
    dtype
        Type of the array that `read` returns; float32 for a quantized matrix.
    quantization
        Quantization of the matrix; None for floats.
    parts
        The array; or the three of a quantized matrix: weight, scales, offsets.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    quantization: Quantization | None
    parts: tuple[_Part, ...]

    def map(self) -> Tensor:
        """Return the tensor on the file mapped into memory, without a copy; see `read`."""
        return self._assemble(_Part.map)

    def read(self) -> Tensor:
        """Read the tensor into memory: an array of `shape`, or a `QuantizedTensor` [out, in].

        Raises
        ------
        WeightsError, StorageError
            The file was truncated meanwhile, or cannot be read.
        """
        return self._assemble(_Part.read)

    def _assemble(self, get: Callable[[_Part], np.ndarray]) -> Tensor:
        if self.quantization is None:
            return get(self.parts[0])
        weight, scales, offsets = map(get, self.parts)
        quantization = self.quantization
        return QuantizedTensor(
            weight, _float32(scales), _float32(offsets), quantization.group_size, quantization.bits
        )


def read_weights(paths: Iterable[Path], config: GPT2Config) -> dict[str, Tensor]:
    """Map the tensors of a model into memory; see `open_weights`.

    Raises
    ------
    WeightsError
        The config has a quantization, but no tensor is quantized.
    """
    paths = list(paths)
    found = open_weights(paths, config)
    if config.quantization and all(tensor.quantization is None for tensor in found.values()):
        raise WeightsError(
            f"{_location(paths)}: no tensor is quantized, but the config has "
            f"{config.quantization}: fetch the model again"
        )
    return {name: tensor.map() for name, tensor in found.items()}


def open_weights(paths: Iterable[Path], config: GPT2Config | None) -> dict[str, SafetensorsTensor]:
    """Read the headers of a safetensors file or of its shards, and check every tensor.

    Stored names may have the prefix `transformer.`, or mlx-lm's `model.`, with which the matrices
    of linear layers are [out, in].

    Parameters
    ----------
    config
        None if the files come without one. Then no tensor is checked against it.

    Returns
    -------
    dict
        Name -> tensor.

    Raises
    ------
    WeightsError
        A file is damaged, or a tensor is missing, unknown, duplicate or of another shape or type.
    StorageError
        A file cannot be read.
    """
    paths = list(paths)
    parts: dict[str, _Part] = {}
    for path in paths:
        file = SafetensorsFile(path)
        for stored_name, entry in file.entries.items():
            name = stored_name.removeprefix("transformer.").removeprefix("model.")
            if is_mask_buffer(name) or (config is not None and is_dropped(name, config)):
                continue
            if name in parts:
                raise WeightsError(f"{path}: duplicate tensor {name}")
            out_in = stored_name.startswith("model.") and is_linear_weight(name)
            transposed = out_in and entry.dtype != np.uint32 and len(entry.shape) == 2
            parts[name] = _Part(file, stored_name, transposed)
    try:
        found = _assembled(parts, config.quantization if config else None)
        if config is not None:
            check_weights(found, config)
    except WeightsError as error:
        raise WeightsError(f"{_location(paths)}: {error}") from None
    return found


def _location(paths: list[Path]) -> Path:
    return paths[0] if len(paths) == 1 else paths[0].parent


def _assembled(
    parts: dict[str, _Part], quantization: Quantization | None
) -> dict[str, SafetensorsTensor]:
    """Make one tensor of the three arrays of each quantized matrix."""
    quantized = {
        name.rpartition(".")[0]: None  # a set that keeps its order
        for name, part in parts.items()
        if name.endswith((".scales", ".biases"))
        or (name.endswith(".weight") and part.entry.dtype == np.uint32)
    }
    matrices: dict[str, SafetensorsTensor] = {}
    for layer in quantized:
        names = [f"{layer}.{kind}" for kind in ("weight", "scales", "biases")]
        if quantization is None:
            raise WeightsError(
                f'tensor {names[0]} is quantized, but config.json has no "quantization": '
                "fetch config.json again"
            )
        if missing := [name for name in names if name not in parts]:
            raise WeightsError(f"{_names(missing)} missing: {layer} is incomplete")
        matrices[names[0]] = _matrix(names, tuple(parts.pop(name) for name in names), quantization)
    arrays = {
        name: SafetensorsTensor(part.shape, part.entry.dtype, None, (part,))
        for name, part in parts.items()
    }
    return arrays | matrices


def _matrix(
    names: list[str], parts: tuple[_Part, ...], quantization: Quantization
) -> SafetensorsTensor:
    """Check the three arrays of a quantized matrix against each other."""
    for name, part in zip(names, parts, strict=True):
        if len(part.shape) != 2 or 0 in part.shape:
            raise WeightsError(f"tensor {name} has shape {list(part.shape)}, expected a matrix")
    for name, part in zip(names[1:], parts[1:], strict=True):
        if not part.is_float:
            raise WeightsError(_no_float(name, part.entry.dtype))
    float32 = np.dtype(np.float32)
    weight, scales, offsets = (
        np.broadcast_to(np.zeros((), dtype), part.shape)  # takes no memory
        for dtype, part in zip((parts[0].entry.dtype, float32, float32), parts, strict=True)
    )
    try:
        n_out, n_in = QuantizedTensor(
            weight, scales, offsets, quantization.group_size, quantization.bits
        ).shape
    except WeightsError as error:
        raise WeightsError(f"tensor {names[0]} is not {quantization}: {error}") from None
    shape = (n_in, n_out) if is_linear_weight(names[0]) else (n_out, n_in)
    return SafetensorsTensor(shape, float32, quantization, parts)


def _float32(array: np.ndarray) -> np.ndarray:
    return widen_bfloat16(array).astype(np.float32, copy=False)


def _no_float(name: str, dtype: np.dtype) -> str:
    return f"tensor {name} is of type {dtype}, expected a float type"


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == BFLOAT16


def check_weights(found: Mapping[str, Tensor | DescribedTensor], config: GPT2Config) -> None:
    """Check names, shapes and types of all tensors of a model against its config.

    In a quantized model some matrices may be floats: mlx-lm does not quantize a matrix with inputs
    that do not divide into groups.

    Raises
    ------
    WeightsError
        A tensor is missing, unknown, or of another shape or type.
    """
    expected = config.tensor_shapes()
    if missing := [name for name in expected if name not in found]:
        raise WeightsError(f"{_names(missing)} missing: the weights do not fit the config")
    if unknown := [name for name in found if name not in expected]:
        raise WeightsError(f"{_names(unknown)} unknown: the weights do not fit the config")
    for name, expected_shape in expected.items():
        shape, dtype, quantization = _described(name, found[name])
        if quantization is not None:
            allowed = config.quantization if _may_be_quantized(name) else None
            if quantization != allowed:
                raise WeightsError(
                    f"tensor {name} is {quantization}, expected {allowed or 'floats'}"
                )
        elif not _is_float(dtype):
            raise WeightsError(_no_float(name, dtype))
        if shape != expected_shape:
            raise WeightsError(
                f"tensor {name} has shape {list(shape)}, expected {list(expected_shape)}: "
                "the weights do not fit the config"
            )


def _described(
    name: str, tensor: Tensor | DescribedTensor
) -> tuple[tuple[int, ...], np.dtype, Quantization | None]:
    """Return the shape in the Hub's layout, the type of floats, and the quantization."""
    if isinstance(tensor, np.ndarray):
        return tensor.shape, tensor.dtype, None
    if isinstance(tensor, QuantizedTensor):
        shape = tensor.shape[::-1] if is_linear_weight(name) else tensor.shape
        return shape, np.dtype(np.float32), tensor.quantization
    return tensor.shape, tensor.dtype, tensor.quantization


def _names(names: list[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]} is"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensors {', '.join(names[:3])}{more} are"
