"""GGUF files: metadata, a list of tensors, and the tensors' data, whatever they mean.

Little endian; each tensor's data begins at a multiple of 32 bytes, or of what `general.alignment`
says, one after the other (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; ggml's own
reader, https://github.com/ggml-org/ggml/blob/master/src/gguf.cpp, refuses files with gaps).
Versions 2 and 3 are alike; version 3 is written.

Read here and not with the package `gguf`, which needs 3 seconds and 160 MB for the tokens of GPT-2,
maps files into memory, and raises whatever a damaged one leads to.
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

from gptx.config import MAX_LAYERS
from gptx.conversions.containers.binary import CHUNK, Array, BinaryFile
from gptx.conversions.containers.gguf_types import BLOCKS, FLOATS, OTHERS, TYPES, Type
from gptx.errors import WeightsError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MAX_NAME, MAX_DIMENSIONS = 64, 4  # ggml's
# A line of the header is a few bytes, what Python makes of it many times that.
MAX_KEYS, MAX_TENSORS = 2**16, 13 * MAX_LAYERS
WINDOW = 2**18  # bytes of the header that are read at a time

# Types of metadata. Bools are bytes, and so they are read.
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1"}
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True)
class Tensor:
    """A tensor's line in the header.

    Attributes
    ----------
    shape
        As NumPy's: the last dimension is the one that lies in one piece, which GGUF lists first.
    offset
        Of its data in the file that was read.
    """

    name: str
    shape: tuple[int, ...]
    type: Type
    offset: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) // self.type.block * self.type.size


class Container:
    """An opened file: the metadata, read at once; the tensors, read when they are asked for.

    Attributes
    ----------
    metadata
        Key -> number, string, list of strings or array of numbers. A float32 is the shortest
        decimal that means it: 1e-05, not 9.999999747378752e-06.

    Raises
    ------
    WeightsError
        It is damaged, or of a version that is not read.
    StorageError
        It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.file = BinaryFile(path)
        self._cursor = cursor = _Cursor(self.file)
        magic = cursor.take(4, "the magic number")
        if magic != MAGIC:
            raise WeightsError(f"{path} is no GGUF: it begins with {magic!r}, expected {MAGIC!r}")
        version = cursor.number("<u4", "the version")
        if version not in (2, VERSION):
            order = ", big endian" if version & 0xFFFF == 0 else ""
            raise WeightsError(
                f"{path} is of GGUF's version {version:#x}{order}, gptx reads 2 and 3 in little "
                "endian: convert it anew with llama.cpp"
            )
        self._n_tensors = self._count("tensors", MAX_TENSORS)
        self.metadata: dict[str, Any] = {}
        for _ in range(self._count("metadata", MAX_KEYS)):
            key = cursor.string("a key of the metadata")
            what = f"the metadata {key[:MAX_NAME]!r}"
            if key in self.metadata:
                raise WeightsError(f"{path} is damaged: {what} are there twice")
            self.metadata[key] = cursor.value(what)

    def _count(self, what: str, most: int) -> int:
        count: int = self._cursor.number("<u8", f"the number of {what}")
        if count > most:
            raise self._damaged(f"the number of {what} is {count}, expected at most {most}")
        return count

    def scalar(self, key: str, default: Any = None) -> Any:
        """The number or string of a key; `default` if there is no such key.

        Raises
        ------
        WeightsError
            It is a list or an array.
        """
        value = self.metadata.get(key, default)
        if isinstance(value, (list, Array)):
            raise self._damaged(f"{key} is {shown(value)}, expected one number or string")
        return value

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; all lie within the file, and it has nothing else.

        Raises
        ------
        WeightsError
            The list is damaged, the file truncated or too long, or a type is not read.
        """
        found: dict[str, Tensor] = {}
        end = 0
        alignment = self._alignment()
        for _ in range(self._n_tensors):
            tensor = self._tensor()
            if tensor.name in found:
                raise self._damaged(f"tensor {tensor.name} is there twice")
            if tensor.offset != end:
                raise self._damaged(
                    f"tensor {tensor.name} lies at {tensor.offset}, expected right after the one "
                    f"before, at {end}"
                )
            found[tensor.name] = tensor
            end += _padded(tensor.n_bytes, alignment)
        start = _padded(self._cursor.position, alignment)
        if self.file.size != start + end:
            raise WeightsError(
                f"{self.file.path} is truncated or damaged: it has {self.file.size} bytes, its "
                f"header tells of {start + end}: fetch it again"
            )
        return {name: replace(t, offset=start + t.offset) for name, t in found.items()}

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {shown(alignment)}, expected a power of two")
        return alignment

    def _tensor(self) -> Tensor:
        """The next tensor of the list, with its offset from the first one's."""
        cursor = self._cursor
        name = cursor.string("a tensor's name")
        if len(name) > MAX_NAME or not name.isprintable():
            raise self._damaged(f"a tensor's name is {shown(name)}")
        what = f"the line of tensor {name}"
        n = cursor.number("<u4", what)
        if not 1 <= n <= MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {n} dimensions")
        shape = tuple(cursor.number("<u8", what) for _ in range(n))[::-1]
        id = cursor.number("<u4", what)
        if id not in TYPES:
            read = ", ".join(kind.name for kinds in (FLOATS, BLOCKS) for kind in kinds.values())
            raise WeightsError(
                f"{self.file.path}: tensor {name} is of type {OTHERS.get(id, id)}, gptx reads "
                f"{read}: take a file of one of these"
            )
        if shape[-1] % TYPES[id].block:
            raise self._damaged(
                f"tensor {name} has shape {list(shape)}, which is no whole number of blocks of "
                f"{TYPES[id].block}"
            )
        return Tensor(name, shape, TYPES[id], cursor.number("<u8", what))

    def read(self, tensor: Tensor) -> Array:
        """The numbers of a tensor, of its type's dtype; blocks are decoded piece by piece."""
        what = f"tensor {tensor.name}"
        kind = tensor.type
        if kind.decode is None:
            return self.file.array(tensor.offset, tensor.shape, kind.dtype, what)
        numbers = np.empty((math.prod(tensor.shape) // kind.block, kind.block), np.float32)
        step = CHUNK // kind.block
        for first in range(0, len(numbers), step):
            rows = numbers[first : first + step]
            offset = tensor.offset + first * kind.size
            raw = self.file.array(offset, (len(rows), kind.size), np.uint8, what)
            rows[:] = kind.decode(raw)
        return numbers.reshape(tensor.shape)

    def _damaged(self, why: str) -> WeightsError:
        return WeightsError(f"{self.file.path} is damaged: {why}")


class _Cursor:
    """Goes through the header of a file, a window at a time."""

    def __init__(self, file: BinaryFile) -> None:
        self._file = file
        self._start = self._at = 0  # of the window in the file, of the cursor in the window
        self._window = b""

    @property
    def position(self) -> int:
        """Bytes of the file that were read."""
        return self._start + self._at

    def take(self, n: int, what: str) -> bytes:
        """The next n bytes."""
        if self._at + n > len(self._window):
            self._start += self._at
            size = max(n, min(WINDOW, self._file.size - self._start))
            self._window = self._file.read(self._start, size, what)
            self._at = 0
        self._at += n
        return self._window[self._at - n : self._at]

    def number(self, kind: str, what: str) -> Any:
        """The next number."""
        (number,) = np.frombuffer(self.take(int(kind[2:]), what), kind)
        return float(str(number)) if kind == "<f4" else number.item()

    def string(self, what: str) -> str:
        """The next string."""
        try:
            return self.take(int.from_bytes(self.take(8, what), "little"), what).decode()
        except UnicodeDecodeError:
            raise WeightsError(f"{self._file.path} is damaged: {what} is not UTF-8") from None

    def value(self, what: str) -> Any:
        """The next value of the metadata, after its type."""
        kind = self.number("<u4", what)
        if kind == STRING:
            return self.string(what)
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind != ARRAY:
            raise WeightsError(
                f"{self._file.path} is damaged: {what} are of the unknown type {kind}"
            )
        kind, n = self.number("<u4", what), self.number("<u8", what)
        if kind == STRING:
            if n > (self._file.size - self.position) // 8:
                raise WeightsError(
                    f"{self._file.path} is truncated or damaged: {what} should be {n} strings"
                )
            return [self.string(what) for _ in range(n)]
        if kind not in SCALARS:
            raise WeightsError(
                f"{self._file.path} is damaged: {what} are a list of the type {kind}"
            )
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(n * dtype.itemsize, what), dtype)


def shown(value: Any) -> str:
    """Something that was found, short enough for an error."""
    if isinstance(value, (list, Array)):
        return f"a list of {len(value)}"
    return repr(value[:MAX_NAME] if isinstance(value, str) else value)


# Writing


def head(metadata: dict[str, Any], tensors: Iterable[Tensor]) -> bytes:
    """All of a file but the tensors' data, each of which is to be padded, see `padding`.

    Parameters
    ----------
    metadata
        Strings, floats (float32), ints (uint32), `np.int32`, and lists of strings or ints.
    """
    lines = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(lines), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for tensor in lines:
        n = len(tensor.shape)
        sizes = struct.pack(f"<I{n}Q", n, *reversed(tensor.shape))
        parts += [_string(tensor.name), sizes, struct.pack("<IQ", tensor.type.id, offset)]
        offset += _padded(tensor.n_bytes, ALIGNMENT)
    data = b"".join(parts)
    return data + padding(len(data))


def padding(n_bytes: int) -> bytes:
    """What comes after so many bytes."""
    return bytes(-n_bytes % ALIGNMENT)


def _padded(n_bytes: int, alignment: int) -> int:
    return n_bytes + -n_bytes % alignment


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float | np.int32 | list[str] | list[int]) -> bytes:
    """A typed value of the metadata."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, np.int32):
        return struct.pack("<Ii", INT32, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    kind = INT32 if value and isinstance(value[0], int) else STRING
    items = (_string(x) if isinstance(x, str) else struct.pack("<i", x) for x in value)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(items)
