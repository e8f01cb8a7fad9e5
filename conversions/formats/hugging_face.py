"""A Hugging Face folder: config.json, safetensors (one file or shards), tokenizer files.

gptx's own form. What is read also has mlx-lm's names and quantized matrices; what is written has
the names and the layout of OpenAI's models on the Hub: without `transformer.`, Conv1D `[in, out]`,
no tied head, no masks (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import (
    Array,
    Checkpoint,
    Stored,
    config_of_shapes,
    float_array,
    plain,
)
from gptx.conversions.containers.binary import BinaryFile, dtype_name, write_array
from gptx.conversions.vocabularies.tokenizer_files import write_tokenizer
from gptx.errors import WeightsError
from gptx.files import DTYPES, create, safetensors_header
from gptx.hub.resolve import locate
from gptx.quantization import Quantization, QuantizedTensor
from gptx.tokenization.bpe import BytePairTokenizer
from gptx.weights import is_no_weight, our_name

WEIGHTS = "model.safetensors"
ALIGNMENT = 64  # of the data, so that mapped floats are aligned for vector instructions
MAX_NAME = 200  # letters: the Hub's have fewer than 50
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32"}


def detect(path: Path) -> bool:
    """Whether this is a folder with safetensors, or such a file."""
    if path.is_dir():
        names = (WEIGHTS, f"{WEIGHTS}.index.json")
        return (path / "config.json").is_file() and any((path / name).is_file() for name in names)
    return path.suffix == ".safetensors" or _begins_like_one(path)


def _begins_like_one(path: Path) -> bool:
    """Whether a file begins with the length of a header that can be there, and a header."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8
    except OSError:
        return False


def read(path: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open a folder, or one safetensors file with the config.json beside it, if there is one.

    Raises
    ------
    ConfigError, WeightsError, TokenizerError
        What the files hold is damaged, or no GPT-2 that gptx can run.
    NotFoundError, StorageError
        A file is missing, or cannot be read.
    """
    if not path.is_dir():
        beside = path.with_name("config.json")
        if config is None and beside.is_file():
            config = GPT2Config.from_file(beside)
        return _checkpoint((path,), config, None)
    files = locate(path)
    found = GPT2Config.from_file(files.config)
    tokenizer = BytePairTokenizer(files.tokenizer) if files.tokenizer else None
    return _checkpoint(files.weights, config or found, tokenizer)


@dataclass(frozen=True)
class _Entry:
    """A tensor of a file, as its header tells."""

    file: BinaryFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    name: str
    transposed: bool

    def read(self) -> Array:
        array = self.file.array(self.offset, self.shape, self.dtype, f"tensor {self.name}")
        return array.T if self.transposed else array

    def stored(self) -> Stored:
        shape = self.shape[::-1] if self.transposed else self.shape
        return Stored(shape, self.dtype, self.read)


def _checkpoint(
    paths: tuple[Path, ...], config: GPT2Config | None, tokenizer: BytePairTokenizer | None
) -> Checkpoint:
    entries: dict[str, _Entry] = {}
    for path in paths:
        for entry in _entries(path):
            if config is not None and is_no_weight(entry.name, config):
                continue
            if entry.name in entries:
                raise WeightsError(f"{path}: tensor {entry.name} is there twice")
            entries[entry.name] = entry
    notes: tuple[str, ...] = ()
    if config is None:
        shapes = {name: entry.stored().shape for name, entry in entries.items()}
        config, notes = config_of_shapes(shapes)
        entries = {n: e for n, e in entries.items() if not is_no_weight(n, config)}
    stored = dict(_joined(entries, config.quantization))
    return Checkpoint(config, stored, tokenizer, notes)


def _entries(path: Path) -> Iterator[_Entry]:
    header, _, start = safetensors_header(path)
    file = BinaryFile(path)
    for raw, entry in header.items():
        if not raw.isprintable() or len(raw) > MAX_NAME:
            raise WeightsError(f"{path} has a tensor with no readable name: it is damaged")
        name, transposed = our_name(raw)
        if entry["dtype"] not in DTYPES:
            what = f"{path}: tensor {name} is of type {entry['dtype']}"
            raise WeightsError(f"{what}, gptx reads {', '.join(DTYPES)}")
        dtype = np.dtype(DTYPES[entry["dtype"]])
        shape = tuple(entry["shape"])
        transposed = transposed and dtype != np.uint32 and len(shape) == 2
        yield _Entry(file, start + entry["data_offsets"][0], shape, dtype, name, transposed)


def _joined(
    entries: Mapping[str, _Entry], how: Quantization | None
) -> Iterator[tuple[str, Stored]]:
    """The tensors; the codes, scales and biases of a quantized matrix are one."""
    parts_of = {
        name: (
            name,
            f"{name.removesuffix('.weight')}.scales",
            f"{name.removesuffix('.weight')}.biases",
        )
        for name, entry in entries.items()
        if entry.dtype == np.uint32
    }
    done = {part for parts in parts_of.values() for part in parts[1:]}
    for name, entry in entries.items():
        if name in done:
            continue
        if name not in parts_of:
            yield name, entry.stored()
            continue
        if how is None:
            raise WeightsError(
                f'tensor {name} is quantized, but there is no "quantization" in a config.json '
                "that says how"
            )
        if missing := [part for part in parts_of[name] if part not in entries]:
            raise WeightsError(f"tensor {missing[0]} is missing: {name} is not whole")
        parts = tuple(entries[part] for part in parts_of[name])
        if odd := [part for part in parts if len(part.shape) != 2 or 0 in part.shape]:
            raise WeightsError(
                f"tensor {odd[0].name} has shape {list(odd[0].shape)}, expected a matrix"
            )
        matrix = _Matrix(parts, how)
        n_out, n_in = matrix.check().shape
        _, linear = our_name(f"model.{name}")
        shape = (n_in, n_out) if linear else (n_out, n_in)
        yield name, Stored(shape, np.dtype(np.float32), matrix.read, how)


@dataclass(frozen=True)
class _Matrix:
    """The three parts of a quantized matrix."""

    parts: tuple[_Entry, ...]
    how: Quantization

    def check(self) -> QuantizedTensor:
        """One with these shapes, which takes no memory; raises if the parts do not fit."""
        return self._join(lambda part: np.broadcast_to(np.zeros((), part.dtype), part.shape))

    def read(self) -> QuantizedTensor:
        return self._join(_Entry.read)

    def _join(self, get: Callable[[_Entry], Array]) -> QuantizedTensor:
        weight, scales, biases = (get(part) for part in self.parts)
        how = self.how
        try:
            return QuantizedTensor(
                weight, _float32(scales), _float32(biases), how.group_size, how.bits
            )
        except WeightsError as error:
            raise WeightsError(f"tensor {self.parts[0].name} is not {how}: {error}") from None


def _float32(array: Array) -> Array:
    wide = float_array(array)
    return wide.astype(np.float32, copy=False) if wide.dtype.kind == "f" else wide


# Writing


@dataclass(frozen=True)
class Part:
    """A tensor of the file to be written, and how to get its numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # one of NAMES

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * (2 if self.dtype.endswith("16") else 4)


def write(checkpoint: Checkpoint, folder: Path, *, dtype: str | None = None) -> None:
    """Write a folder that gptx, transformers and mlx-lm load.

    Parameters
    ----------
    folder
        It exists and is empty.
    dtype
        "float32", "float16" or "bfloat16"; None leaves each tensor as it is (float64 as float32).
    """
    parts = [
        (Part(name, tensor.shape, dtype or dtype_name(tensor.dtype)),)
        for name, tensor in checkpoint.stored.items()
    ]
    tensors = ((plain(tensor),) for tensor in checkpoint.tensors.values())
    write_safetensors(folder / WEIGHTS, parts, tensors, "pt")
    write_config(checkpoint, folder, dtype)


def write_config(checkpoint: Checkpoint, folder: Path, dtype: str | None) -> None:
    """Write config.json and the tokenizer's files."""
    data = checkpoint.config.to_dict()
    found = {dtype_name(tensor.dtype) for tensor in checkpoint.stored.values()}
    if dtype or len(found) == 1:
        data["torch_dtype"] = dtype or found.pop()
    with create(folder / "config.json") as file:
        file.write((json.dumps(data, indent=2) + "\n").encode())
    if checkpoint.tokenizer is not None:
        write_tokenizer(checkpoint.tokenizer, checkpoint.config, folder)


def write_safetensors(
    path: Path,
    layout: Sequence[tuple[Part, ...]],
    tensors: Iterator[tuple[Array, ...]],
    made_for: str,
) -> None:
    """Write a safetensors file whose data come one by one.

    Parameters
    ----------
    layout, tensors
        The parts that each item of `tensors` brings, and their arrays.
    made_for
        What the file calls its format, "pt" or "mlx": transformers asks for it.
    """
    header: dict[str, object] = {"__metadata__": {"format": made_for}}
    end = 0
    for part in (part for parts in layout for part in parts):
        begin, end = end, end + part.n_bytes
        header[part.name] = {
            "dtype": NAMES[part.dtype],
            "shape": part.shape,
            "data_offsets": (begin, end),
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % ALIGNMENT)
    with create(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for parts, arrays in zip(layout, tensors, strict=True):
            for part, array in zip(parts, arrays, strict=True):
                if part.dtype == "uint32":
                    file.write(np.ascontiguousarray(array, "<u4").data)
                else:
                    write_array(file, array, part.dtype, f"tensor {part.name}")
