"""GGUF files of any model: metadata, a list of tensors, and the tensors' data.

The file is little endian. The data of each tensor start at a multiple of 32 bytes, or of
`general.alignment`, without gaps (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; ggml's
reader, https://github.com/ggml-org/ggml/blob/master/src/gguf.cpp, rejects gaps). Versions 2 and 3
have the same layout; gptx writes 3.

The package `gguf` is not used: it needs 3 s and 160 MB for GPT-2's tokens, and raises arbitrary
exceptions for damaged files.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptx.conversions.containers.binary import CHUNK_NUMBERS, Array, BinaryFile
from gptx.conversions.containers.gguf_types import (
    BLOCK_TYPES,
    FLOAT_TYPES,
    TYPES_BY_ID,
    UNSUPPORTED_TYPES,
    TensorType,
)
from gptx.errors import WeightsError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
LEGACY_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")  # of ggml's files before GGUF
MAX_NAME_LENGTH, MAX_DIMENSIONS = 64, 4  # ggml's limits; the length in characters
# Python needs many times the bytes of an entry in the header: a file could fill the memory.
MAX_KEYS, MAX_TENSORS = 2**16, 130_000
WINDOW_BYTES = 2**18  # of the header, read at a time

# Types of metadata. A bool is read as a byte.
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1"}
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True)
class TensorInfo:
    """The entry of a tensor in the header.

    Attributes
    ----------
    name, type
        Name and type of the tensor.
    shape
        Shape in NumPy's order, with the contiguous dimension last; GGUF stores that one first.
    offset
        Position of its data in the file; 0 for a tensor to be written.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int = 0

    @property
    def n_bytes(self) -> int:
        """Size of its data in bytes."""
        return math.prod(self.shape) // self.type.block_numbers * self.type.block_bytes


class GgufFile:
    """An open GGUF file; its metadata are read at once, its tensors on request.

    Attributes
    ----------
    file
        The file.
    metadata
        Key -> number, string, list of strings or array of numbers. A float32 becomes the shortest
        decimal that rounds to it: 1e-05, not 9.999999747378752e-06.

    Raises
    ------
    WeightsError
        The file is damaged, or its version is not supported.
    StorageError
        The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.file = BinaryFile(path)
        self._cursor = cursor = _Cursor(self.file)
        magic = cursor.take(4, "the magic number")
        if magic in LEGACY_MAGICS:
            raise WeightsError(
                f"{path} is a ggml file from before GGUF, which gptx does not read: convert the "
                "original model again"
            )
        if magic != MAGIC:
            raise WeightsError(
                f"{path} is not a GGUF: it starts with {magic!r}, expected {MAGIC!r}"
            )
        version = cursor.number("<u4", "the version")
        if version & 0xFFFF == 0:
            raise WeightsError(
                f"{path} is a GGUF of a big-endian machine, expected little endian: convert it "
                "with gguf-convert-endian"
            )
        if version not in (2, VERSION):
            raise WeightsError(
                f"{path} has GGUF version {version}, expected 2 or 3: convert the original model "
                "again"
            )
        self._n_tensors = self._count("tensors", MAX_TENSORS)
        self.metadata: dict[str, Any] = {}
        for _ in range(self._count("metadata", MAX_KEYS)):
            key = cursor.string("a key of the metadata")
            label = f"the metadata {key[:MAX_NAME_LENGTH]!r}"
            if key in self.metadata:
                raise _damaged(self.file, f"duplicate key of {label}")
            self.metadata[key] = cursor.value(label)

    def _count(self, items: str, limit: int) -> int:
        count: int = self._cursor.number("<u8", f"the number of {items}")
        if count > limit:
            raise _damaged(self.file, f"the number of {items} is {count}, expected at most {limit}")
        return count

    def scalar(self, key: str, default: Any = None) -> Any:
        """Return the number or string of a key; `default` if the key is missing.

        Raises
        ------
        WeightsError
            The value is a list or an array.
        """
        value = self.metadata.get(key, default)
        if isinstance(value, (list, Array)):
            raise _damaged(
                self.file, f"{key} is {describe_value(value)}, expected one number or string"
            )
        return value

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name -> tensor; together they fill the file. Empty for a file with metadata only.

        Raises
        ------
        WeightsError
            The list is damaged, the file is truncated or too long, or a type is not supported.
        """
        found: dict[str, TensorInfo] = {}
        end = 0
        alignment = self._alignment()
        for _ in range(self._n_tensors):
            tensor = self._next_tensor()
            if tensor.name in found:
                raise _damaged(self.file, f"duplicate tensor {tensor.name}")
            if tensor.offset != end:
                raise _damaged(
                    self.file,
                    f"tensor {tensor.name} is at offset {tensor.offset}, expected {end}, the end "
                    "of the one before",
                )
            found[tensor.name] = tensor
            end += _aligned(tensor.n_bytes, alignment)
        if not found:  # then some writers add no padding
            return {}
        start = _aligned(self._cursor.position, alignment)
        if self.file.size != start + end:
            raise WeightsError(
                f"{self.file.path} is truncated or damaged: it has {self.file.size} bytes, "
                f"expected {start + end} by its header: fetch it again"
            )
        return {name: replace(t, offset=start + t.offset) for name, t in found.items()}

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _damaged(
                self.file,
                f"general.alignment is {describe_value(alignment)}, expected a power of two",
            )
        return alignment

    def _next_tensor(self) -> TensorInfo:
        """Read the next entry of the list; its offset is relative to the first tensor's."""
        cursor = self._cursor
        name = cursor.string("a tensor's name")
        if len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise _damaged(
                self.file,
                f"a tensor's name is {describe_value(name)}, expected a short printable one",
            )
        label = f"the entry of tensor {name}"
        n = cursor.number("<u4", label)
        if not 1 <= n <= MAX_DIMENSIONS:
            raise _damaged(
                self.file, f"tensor {name} has {n} dimensions, expected 1 to {MAX_DIMENSIONS}"
            )
        shape = tuple(cursor.number("<u8", label) for _ in range(n))[::-1]
        id = cursor.number("<u4", label)
        if id not in TYPES_BY_ID:
            names = ", ".join(kind.name for kind in (*FLOAT_TYPES.values(), *BLOCK_TYPES))
            raise WeightsError(
                f"{self.file.path}: tensor {name} is of type {UNSUPPORTED_TYPES.get(id, id)}, "
                f"expected one of {names}: quantize the model again, to one of these types"
            )
        kind = TYPES_BY_ID[id]
        if shape[-1] % kind.block_numbers:
            raise _damaged(
                self.file,
                f"tensor {name} has shape {list(shape)}, expected a last dimension that is a "
                f"multiple of {kind.block_numbers}",
            )
        return TensorInfo(name, shape, kind, cursor.number("<u8", label))

    def read_raw(self, tensor: TensorInfo) -> Array:
        """Return the data of a tensor, uint8 [n_bytes], mapped into memory."""
        label = f"tensor {tensor.name}"
        return self.file.map(tensor.offset, (tensor.n_bytes,), np.uint8, label)

    def read(self, tensor: TensorInfo) -> Array:
        """Return a tensor as an array of its type's dtype.

        Plain numbers are mapped into memory; blocks are decoded in chunks.
        """
        kind = tensor.type
        if kind.decoder is None:
            label = f"tensor {tensor.name}"
            return self.file.map(tensor.offset, tensor.shape, kind.dtype, label)
        raw = self.read_raw(tensor).reshape(-1, kind.block_bytes)
        numbers = np.empty((len(raw), kind.block_numbers), np.float32)
        step = CHUNK_NUMBERS // kind.block_numbers
        for first in range(0, len(raw), step):
            numbers[first : first + step] = kind.decode(raw[first : first + step])
        return numbers.reshape(tensor.shape)


class _Cursor:
    """A position in the header of a file, which is read a window at a time."""

    def __init__(self, file: BinaryFile) -> None:
        self._file = file
        self._start = self._at = 0  # start of the window in the file, position in the window
        self._window = b""

    @property
    def position(self) -> int:
        """Position in the file, in bytes."""
        return self._start + self._at

    def take(self, n: int, label: str) -> bytes:
        """Read the next n bytes."""
        if self._at + n > len(self._window):
            self._start += self._at
            size = max(n, min(WINDOW_BYTES, self._file.size - self._start))
            self._window = self._file.read(self._start, size, label)
            self._at = 0
        self._at += n
        return self._window[self._at - n : self._at]

    def number(self, kind: str, label: str) -> Any:
        """Read the next number."""
        (number,) = np.frombuffer(self.take(int(kind[2:]), label), kind)
        return float(str(number)) if kind == "<f4" else number.item()

    def string(self, label: str) -> str:
        """Read the next string."""
        try:
            return self.take(int.from_bytes(self.take(8, label), "little"), label).decode()
        except UnicodeDecodeError:
            raise _damaged(self._file, f"{label} is not UTF-8") from None

    def value(self, label: str) -> Any:
        """Read the next value of the metadata and its type, which comes first."""
        kind = self.number("<u4", label)
        if kind == STRING:
            return self.string(label)
        if kind in SCALARS:
            return self.number(SCALARS[kind], label)
        if kind != ARRAY:
            raise _damaged(self._file, f"{label} has unknown type {kind}")
        kind, n = self.number("<u4", label), self.number("<u8", label)
        if kind == STRING:
            if n > (self._file.size - self.position) // 8:
                raise _damaged(self._file, f"{label} has the length {n}, longer than the file")
            return [self.string(label) for _ in range(n)]
        if kind not in SCALARS:
            raise _damaged(self._file, f"{label} is an array of unknown type {kind}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(n * dtype.itemsize, label), dtype)


def _damaged(file: BinaryFile, reason: str) -> WeightsError:
    return WeightsError(f"{file.path} is damaged: {reason}: fetch it again")


def describe_value(value: Any) -> str:
    """Format a value of a file for an error message, in a bounded length."""
    if isinstance(value, (list, Array)):
        return f"a list of {len(value)}"
    return repr(value[:MAX_NAME_LENGTH] if isinstance(value, str) else value)


# Writing


def encode_header(metadata: dict[str, Any], tensors: Iterable[TensorInfo]) -> bytes:
    """Return all of a file before the tensors' data; `padding` must follow the data of each.

    Parameters
    ----------
    metadata
        Key -> string, float (written as float32), int (uint32), `np.int32`, or list of strings or
        ints.
    """
    infos = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(infos), len(metadata))]
    parts += [_encode_string(key) + _encode_value(value) for key, value in metadata.items()]
    offset = 0
    for tensor in infos:
        n = len(tensor.shape)
        sizes = struct.pack(f"<I{n}Q", n, *reversed(tensor.shape))
        place = struct.pack("<IQ", tensor.type.id, offset)
        parts += [_encode_string(tensor.name), sizes, place]
        offset += _aligned(tensor.n_bytes, ALIGNMENT)
    data = b"".join(parts)
    return data + padding(len(data))


def padding(n_bytes: int) -> bytes:
    """Return the zeros that follow `n_bytes` bytes of data."""
    return bytes(-n_bytes % ALIGNMENT)


def _aligned(n_bytes: int, alignment: int) -> int:
    return n_bytes + -n_bytes % alignment


def _encode_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encode_value(value: str | int | float | np.int32 | list[str] | list[int]) -> bytes:
    """Encode a value of the metadata with its type."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _encode_string(value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, np.int32):
        return struct.pack("<Ii", INT32, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    kind = INT32 if value and isinstance(value[0], int) else STRING
    items = (_encode_string(x) if isinstance(x, str) else struct.pack("<i", x) for x in value)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(items)
