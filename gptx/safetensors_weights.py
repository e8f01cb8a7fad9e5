"""A model in safetensors files, one or several shards: its tensors, read on demand.

`open_weights` reads the headers and checks every tensor. `gptx.load` (through `gptx.weights`) and
conversions share it. `gptx.model_files` finds the files, `gptx.stored_weights` has the rules.

A file stores a quantized matrix as two or three tensors, as MLX's libraries do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gptx.config import GPT2Config
from gptx.dequantization import dequantize_stored
from gptx.errors import WeightsError
from gptx.quantization import Quantization, QuantizedTensor, check_packed
from gptx.safetensors_file import MAX_TENSORS, Entry, SafetensorsFile, widen_bfloat16
from gptx.stored_weights import (
    Tensor,
    check_weights,
    drop_unknown,
    have_same_numbers,
    is_float,
    is_linear_weight,
    no_float_message,
    settle_head,
)
from gptx.tensor_names import are_out_in, listed, model_names


@dataclass(frozen=True)
class _Part:
    """An array of a file: a tensor, or one of the three of a quantized matrix."""

    file: SafetensorsFile
    stored_name: str
    transposed: bool = False

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.stored_name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape[::-1] if self.transposed else self.entry.shape

    @property
    def is_float(self) -> bool:
        return is_float(self.entry.dtype)

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
        Quantization of the `QuantizedTensor` that `read` returns; None for floats.
    parts
        The array; or those of a quantized matrix: weight, scales, and offsets of the mode affine.
    stored
        Quantization in the file; None for floats.
    is_linear
        True for a quantized matrix of a linear layer: [out, in] in the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    quantization: Quantization | None
    parts: tuple[_Part, ...]
    stored: Quantization | None = None
    is_linear: bool = False

    @property
    def file_type(self) -> str | None:
        """Name of the type in the file if `read` returns floats for a quantized matrix."""
        return self.stored.type_name if self.stored and not self.quantization else None

    def map(self) -> Tensor:
        """Return the tensor on the file mapped into memory; see `read`.

        It is not copied, unless it is dequantized.
        """
        return self._assemble(_Part.map)

    def read(self) -> Tensor:
        """Read the tensor into memory: an array of `shape`, or a `QuantizedTensor` [out, in].

        Raises
        ------
        WeightsError, StorageError
            The file was truncated meanwhile, or cannot be read.
        """
        return self._assemble(_Part.read)

    def is_same(self, other: SafetensorsTensor) -> bool:
        """Return True if the tensor has the numbers of another one."""
        return self.stored == other.stored and all(
            have_same_numbers(mine.map(), theirs.map())
            for mine, theirs in zip(self.parts, other.parts, strict=True)
        )

    def _assemble(self, get: Callable[[_Part], np.ndarray]) -> Tensor:
        if self.stored is None:
            return get(self.parts[0])
        weight, scales, *others = map(get, self.parts)
        if others:
            scales, others = _float32(scales), [_float32(others[0])]
        kind = self.stored
        if self.quantization is not None:
            return QuantizedTensor(weight, scales, others[0], kind.group_size, kind.bits)
        floats = dequantize_stored(weight, scales, others[0] if others else None, kind)
        return floats.T if self.is_linear else floats


@dataclass(frozen=True)
class StoredModel:
    """A model in its safetensors files, checked.

    Attributes
    ----------
    tensors
        Name -> tensor, read on demand.
    config
        The given config, with the head and the quantization that the tensors have; None if none
        was given.
    notes
        Differences between the given config and the tensors, one sentence each.
    """

    tensors: dict[str, SafetensorsTensor]
    config: GPT2Config | None
    notes: tuple[str, ...] = ()

    def map(self) -> Mapping[str, Tensor]:
        """Return name -> tensor; each access maps the tensor into memory, or dequantizes it."""
        return _MappedTensors(self.tensors)


class _MappedTensors(Mapping[str, Tensor]):
    """The tensors of files; each access calls `SafetensorsTensor.map`."""

    def __init__(self, tensors: Mapping[str, SafetensorsTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].map()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_weights(
    paths: Iterable[Path], config: GPT2Config | None, *, ignore_unknown: bool = False
) -> StoredModel:
    """Read the headers of a safetensors file or of its shards, and check every tensor.

    `model_names` finds the tensors of the model in the file. Their shapes tell if the matrices of
    linear layers are [in, out], or [out, in] as those of mlx-lm.

    Parameters
    ----------
    config
        None if the files come without one. Then no tensor is checked against it.
    ignore_unknown
        Leave out tensors that a GPT-2 or the config does not have. Otherwise they are an error.

    Raises
    ------
    WeightsError
        A file is damaged, or a tensor is missing, unknown, duplicate or of another shape or type.
    StorageError
        A file cannot be read.
    """
    paths = list(paths)
    files: dict[str, SafetensorsFile] = {}
    for path in paths:
        file = SafetensorsFile(path)
        for stored_name in file.entries:
            if stored_name in files:
                raise WeightsError(f"{path}: duplicate tensor {stored_name}")
            files[stored_name] = file
        if len(files) > MAX_TENSORS:
            raise WeightsError(f"{path.parent} has over {MAX_TENSORS} tensors: this is not a GPT-2")
    try:
        names, notes = model_names(files, ignore_unknown=ignore_unknown)
        parts = {
            name: _Part(files[stored_name], stored_name) for stored_name, name in names.items()
        }
        found = _assembled(_in_out(parts), config.quantization if config else None)
        found, config, head_notes = settle_head(found, config, SafetensorsTensor.is_same)
        notes += head_notes
        if config is not None:
            if ignore_unknown:
                found, unknown_notes = drop_unknown(found, config)
                notes += unknown_notes
            config, quantization_notes = _settle_quantization(found, config)
            notes += quantization_notes
            check_weights(found, config)
    except WeightsError as error:
        raise WeightsError(f"{_location(paths)}: {error.message}") from None
    return StoredModel(found, config, notes)


def _in_out(parts: dict[str, _Part]) -> dict[str, _Part]:
    """Transpose the float matrices of linear layers if the files store them as [out, in].

    A quantized matrix is [out, in], and so are the float matrices beside one.
    """
    linear = {name: part for name, part in parts.items() if is_linear_weight(name)}
    floats = {name: part for name, part in linear.items() if part.entry.dtype != np.uint32}
    shapes = {name: part.shape for name, part in floats.items()}
    if len(floats) == len(linear) and not are_out_in(shapes):
        return parts
    transposed = {
        name: replace(part, transposed=True)
        for name, part in floats.items()
        if len(part.shape) == 2
    }
    return parts | transposed


def _settle_quantization(
    found: Mapping[str, SafetensorsTensor], config: GPT2Config
) -> tuple[GPT2Config, tuple[str, ...]]:
    """Return the config with the quantization that backends compute with, and notes on others."""
    given = config.quantization
    if given is None:
        return config, ()
    notes: tuple[str, ...] = ()
    read_as_floats = {t.stored for t in found.values() if t.stored and not t.quantization}
    if read_as_floats:
        kinds = ", ".join(sorted(map(str, read_as_floats)))
        notes = (f"matrices that are {kinds} are read as floats",)
    elif all(tensor.stored is None for tensor in found.values()):
        notes = (f"no tensor is {given} as in the config: all are floats",)
    is_computed = any(tensor.quantization for tensor in found.values())
    return replace(config, quantization=given.computed if is_computed else None), notes


def _location(paths: list[Path]) -> Path:
    return paths[0] if len(paths) == 1 else paths[0].parent


def _assembled(
    parts: dict[str, _Part], quantization: Quantization | None
) -> dict[str, SafetensorsTensor]:
    """Make one tensor of the arrays of each quantized matrix."""
    quantized = {
        name.rpartition(".")[0]: None  # a set that keeps its order
        for name, part in parts.items()
        if name.endswith((".scales", ".biases"))
        or (name.endswith(".weight") and part.entry.dtype == np.uint32)
    }
    kinds = dict(quantization.layers) if quantization else {}
    computed = quantization.computed if quantization else None
    matrices: dict[str, SafetensorsTensor] = {}
    for layer in quantized:
        kind = kinds.get(layer, quantization)
        if kind is None:
            raise WeightsError(
                f'tensor {layer}.weight is quantized, but config.json has no "quantization" of it: '
                "fetch config.json again"
            )
        kind = replace(kind, layers=())
        names = [f"{layer}.weight", f"{layer}.scales"]
        if kind.mode == "affine":
            names.append(f"{layer}.biases")
        if missing := [name for name in names if name not in parts]:
            raise WeightsError(f"{listed(missing)} missing: {layer} is incomplete")
        matrix = _matrix(names, tuple(parts.pop(name) for name in names), kind)
        matrices[names[0]] = replace(matrix, quantization=kind) if kind == computed else matrix
    arrays = {
        name: SafetensorsTensor(part.shape, part.entry.dtype, None, (part,))
        for name, part in parts.items()
    }
    return arrays | matrices


def _matrix(names: list[str], parts: tuple[_Part, ...], kind: Quantization) -> SafetensorsTensor:
    """Check the arrays of a quantized matrix against each other; it is read as floats."""
    for name, part in zip(names, parts, strict=True):
        if len(part.shape) != 2 or 0 in part.shape:
            raise WeightsError(f"tensor {name} has shape {list(part.shape)}, expected a matrix")
    for name, part in zip(names[1:], parts[1:], strict=True):
        if kind.mode == "affine" and not part.is_float:
            raise WeightsError(no_float_message(name, part.entry.dtype))
    weight, *groups = (
        np.broadcast_to(np.zeros((), dtype), part.shape)  # takes no memory
        for dtype, part in (
            (np.float32 if part.is_float and i else part.entry.dtype, part)
            for i, part in enumerate(parts)
        )
    )
    try:
        n_out, n_in = check_packed(
            kind, weight, **dict(zip(("scales", "offsets"), groups, strict=False))
        )
    except WeightsError as error:
        raise WeightsError(f"tensor {names[0]} is not {kind}: {error}") from None
    is_linear = is_linear_weight(names[0])
    shape = (n_in, n_out) if is_linear else (n_out, n_in)
    return SafetensorsTensor(shape, np.dtype(np.float32), None, parts, kind, is_linear)


def _float32(array: np.ndarray) -> np.ndarray:
    return widen_bfloat16(array).astype(np.float32, copy=False)
