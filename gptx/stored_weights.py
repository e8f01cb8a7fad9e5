"""The weights of a model in its files: names, layouts, and the checks of both.

`gptx.load` (through `gptx.weights`) and conversions share this reader, so a fault has one message.
It reads headers; tensors are mapped or read on demand. `gptx.model_files` finds the files.

Names are the Hub's without the prefix `transformer.` (`h.0.attn.c_attn.weight`), layouts are the
Hub's Conv1D `[in, out]`, and a tied head is not stored twice. A quantized matrix is one
`QuantizedTensor` [out, in] under the name of its weight. A file stores it as three tensors, as
MLX's libraries do.

Readers of all formats decide with `settle_head` if the head is tied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from gptx.config import GPT2Config
from gptx.dequantization import dequantize_stored
from gptx.errors import WeightsError
from gptx.quantization import Quantization, QuantizedTensor, check_packed
from gptx.safetensors_file import (
    BFLOAT16,
    MAX_TENSORS,
    Entry,
    SafetensorsFile,
    widen_bfloat16,
)
from gptx.tensor_names import are_out_in, listed, model_names, unknown_error, unknown_note

Tensor = np.ndarray | QuantizedTensor
T = TypeVar("T")

# Names

_LINEAR_WEIGHT = re.compile(r"h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight")

TABLE = "wte.weight"
POSITIONS = "wpe.weight"
HEAD = "lm_head.weight"
TABLES = (TABLE, POSITIONS, HEAD)  # [N, C] in every layout

OWN_HEAD_NOTE = (
    "the config has tie_word_embeddings: true, but lm_head.weight differs from wte.weight: "
    "the model's own head is used"
)
COMPARE_NUMBERS = 2**18  # compared at a time: they stay in the cache of a core


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

    @property
    def file_type(self) -> str | None:
        """Name of the type in the file if `dtype` is another one, such as "Q6_K"; else None."""


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
            raise WeightsError(_no_float(name, part.entry.dtype))
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


def _no_float(name: str, dtype: np.dtype) -> str:
    return f"tensor {name} is of type {dtype}, expected a float type"


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == BFLOAT16


def settle_head(
    tensors: Mapping[str, T], config: GPT2Config | None, is_same: Callable[[T, T], bool]
) -> tuple[dict[str, T], GPT2Config | None, tuple[str, ...]]:
    """Decide by the tensors if the head is tied, as transformers 5 does.

    A config is often wrong about it. A head that equals the table of tokens is a duplicate, which
    is dropped. A head that differs is used. A head without a table is the table as well.

    Parameters
    ----------
    tensors
        Name -> tensor, in the form of the reader.
    config
        None if the files come without one. A config that unties the head decides.
    is_same
        Function that returns True if two tensors have the same shape and numbers.

    Returns
    -------
    tensors, config, notes
        The tensors and the config that fit each other, and the differences from the given config,
        one sentence each.
    """
    found = dict(tensors)
    if HEAD not in found or (config is not None and not config.tie_word_embeddings):
        return found, config, ()
    if TABLE not in found:
        found[TABLE] = found.pop(HEAD)
    elif is_same(found[HEAD], found[TABLE]):
        del found[HEAD]
    elif config is not None:
        return found, replace(config, tie_word_embeddings=False), (OWN_HEAD_NOTE,)
    return found, config, ()


def have_same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    """Compare the shapes and the numbers of two arrays of any types, some rows at a time.

    A NaN equals a NaN.
    """
    if a.shape != b.shape:
        return False
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    n_rows = max(1, COMPARE_NUMBERS * len(a) // max(1, a.size))
    for first in range(0, len(a), n_rows):
        x, y = (widen_bfloat16(array[first : first + n_rows]) for array in (a, b))
        if not (np.array_equal(x, y) or np.array_equal(x, y, equal_nan=True)):
            return False
    return True


def drop_unknown(
    found: Mapping[str, T], config: GPT2Config
) -> tuple[dict[str, T], tuple[str, ...]]:
    """Leave out the tensors that the config does not have; return the others, and a note."""
    expected = config.tensor_shapes()
    known = {name: tensor for name, tensor in found.items() if name in expected}
    unknown = [name for name in found if name not in expected]
    return known, (unknown_note(unknown),) if unknown else ()


def type_name(tensor: DescribedTensor) -> str:
    """Return the name of the type of a tensor: "float32", "bfloat16", "int4"."""
    if tensor.quantization is not None:
        return f"int{tensor.quantization.bits}"
    return "bfloat16" if tensor.dtype == BFLOAT16 else str(tensor.dtype)


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
        if missing == [HEAD]:
            raise WeightsError(
                f"tensor {HEAD} is missing, but the config has tie_word_embeddings: false: fetch "
                "the model again, or set it to true if the head is the table of tokens"
            )
        raise WeightsError(f"{listed(missing)} missing: the weights do not fit the config")
    if unknown := [name for name in found if name not in expected]:
        raise unknown_error(unknown)
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
