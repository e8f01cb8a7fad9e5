"""TensorFlow's checkpoints of version 2: named tensors in `X.index` and `X.data-00000-of-0000N`.

The index is a table of LevelDB's form whose keys are the names and whose values are messages of
protocol buffers; the other files hold the numbers and nothing else
(https://github.com/tensorflow/tensorflow, tensorflow/core/protobuf/tensor_bundle.proto and
core/util/tensor_bundle; https://github.com/google/leveldb, doc/table_format.md). Every block of the
index and every tensor has a checksum, and nothing is handed out that it does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptx.conversions.containers.binary import BinaryFile
from gptx.conversions.containers.crc32c import crc32c
from gptx.errors import NotFoundError, StorageError, WeightsError
from gptx.safetensors_file import BFLOAT16

Array = np.ndarray

MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
FOOTER = 48  # bytes at the end: where the index block lies, padding, magic
TRAILER = 5  # bytes after each block: a byte for its compression, and a checksum
# In bytes. Names share their beginnings, so that without bounds a few bytes could mean many.
MAX_INDEX, MAX_NAME = 2**20, 250  # the index of OpenAI's largest has 21 kB

VERSION = 1  # of the files that are read here
FLOATS: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    14: BFLOAT16,
    19: np.dtype("<f2"),
}

# The fields that are used of the messages, and whether they hold a number or further bytes.
Kinds = dict[int, type]
HEADER: Kinds = {1: int, 2: int, 3: bytes}  # num_shards, endianness, version
VERSIONS: Kinds = {2: int}  # min_consumer
ENTRY: Kinds = {1: int, 2: bytes, 3: int, 4: int, 5: int, 6: int, 7: bytes}
SHAPE: Kinds = {2: bytes}  # dim
DIM: Kinds = {1: int}  # size


class _Damaged(Exception):
    """What is wrong with an index."""


@dataclass(frozen=True)
class Entry:
    """What an index says of a tensor.

    Attributes
    ----------
    dtype
        TensorFlow's number of the type, see `FLOATS`.
    shape, shard, offset, size
        Where it lies, in bytes.
    crc
        Masked CRC-32C of these bytes.
    sliced
        It lies elsewhere, in pieces.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


class Bundle:
    """A checkpoint whose index is read.

    Parameters
    ----------
    index
        Path of `X.index`.

    Attributes
    ----------
    entries
        By name.
    sizes
        How long each file of numbers is that holds any, by its path.

    Raises
    ------
    WeightsError
        The index is truncated, damaged, or of a kind that is not read here.
    StorageError
        It cannot be read.
    """

    def __init__(self, index: Path) -> None:
        self.index = index
        file = BinaryFile(index)
        try:
            self.entries = dict(self._parse(file))
        except _Damaged as error:
            raise WeightsError(f"{index} is damaged ({error}): fetch it again") from None
        ends: dict[Path, int] = {}
        for entry in self.entries.values():
            if not entry.sliced:
                path = self.path(entry)
                ends[path] = max(ends.get(path, 0), entry.offset + entry.size)
        self.sizes = ends

    def _parse(self, file: BinaryFile) -> Iterator[tuple[str, Entry]]:
        table = _table(file)
        key, value = next(table, (None, b""))
        if key != b"":
            raise _Damaged("it has no header")
        header = _message(value, HEADER)
        self.n_shards = _last(header, 1)
        if _last(header, 2):
            raise WeightsError(f"{self.index} was written on a big-endian machine: not supported")
        for message in header[3]:
            if (needs := _last(_message(message, VERSIONS), 2)) > VERSION:
                raise WeightsError(f"{self.index} is of version {needs}, gptx reads {VERSION}")
        for key, value in table:
            # What begins with a 0 is no text: it means a slice of a tensor that is `sliced`.
            name = key.decode(errors="backslashreplace")
            if not (name.isprintable() or key[:1] == b"\0"):
                raise _Damaged(f"a name is {name!r}")
            entry = _entry(value)
            if not entry.sliced and not 0 <= entry.shard < self.n_shards:
                raise _Damaged(f"{name} lies in file {entry.shard} of {self.n_shards}")
            yield name, entry

    def path(self, entry: Entry) -> Path:
        """The file that holds a tensor."""
        stem = self.index.name.removesuffix(".index")
        return self.index.with_name(f"{stem}.data-{entry.shard:05d}-of-{self.n_shards:05d}")

    def check_files(self) -> None:
        """Raise unless all files are there and as long as they have to be.

        Raises
        ------
        NotFoundError
            One is not there.
        WeightsError
            One is too short or too long, or those that are there belong to another index.
        """
        for path, expected in self.sizes.items():
            if not path.is_file():
                others = _data_files(self.index)
                if others and not others[0].endswith(f"-of-{self.n_shards:05d}"):
                    what = f"{self.index} asks for {path.name}, but {others[0]} is there"
                    raise WeightsError(f"{what}: fetch both again")
                raise NotFoundError(f"{path} is missing: fetch it, or give the path of a whole one")
            size = BinaryFile(path).size
            if size != expected:
                what = "truncated" if size < expected else "too long"
                raise WeightsError(
                    f"{path} is {what}: its index describes {expected} bytes, the file has {size}: "
                    "fetch it again"
                )

    def dtype(self, name: str) -> np.dtype:
        """Of the array that `read` returns.

        Raises
        ------
        WeightsError
            The tensor cannot be read here, or its size does not fit its shape and type.
        """
        entry = self.entries[name]
        if entry.sliced:
            raise WeightsError(f"{self.index}: {name} lies in slices, expected it to be whole")
        if entry.dtype not in FLOATS:
            what = f"{self.index}: {name} is of TensorFlow's type {entry.dtype}"
            raise WeightsError(f"{what}, expected float32, float64, float16 or bfloat16")
        dtype = FLOATS[entry.dtype]
        if entry.size != math.prod(entry.shape) * dtype.itemsize:
            shape = list(entry.shape)
            what = f"{self.index} is damaged: {name} of shape {shape} has {entry.size} bytes"
            raise WeightsError(f"{what}: fetch it again")
        return dtype

    def read(self, name: str) -> Array:
        """A tensor, after its checksum was found to be right.

        Raises
        ------
        WeightsError
            It is damaged or not all there.
        StorageError
            It cannot be read.
        """
        entry, dtype = self.entries[name], self.dtype(name)
        path = self.path(entry)
        array = BinaryFile(path).array(entry.offset, entry.shape, dtype, f"tensor {name}")
        if _masked(crc32c(array)) != entry.crc:
            raise WeightsError(f"{path} is damaged: {name} has a wrong checksum: fetch it again")
        return array


def is_bundle(index: Path) -> bool:
    """Whether this may be the index of such a checkpoint: by its end, or by what is beside it."""
    try:
        file = BinaryFile(index)
        whole = file.size >= FOOTER and file.read(file.size - 8, 8, "its end") == MAGIC
    except (StorageError, WeightsError):
        return False
    return whole or bool(_data_files(index))


def _data_files(index: Path) -> list[str]:
    """The names of the files beside an index that can be its own."""
    stem = f"{index.name.removesuffix('.index')}.data-"
    try:
        return sorted(path.name for path in index.parent.iterdir() if path.name.startswith(stem))
    except OSError:
        return []


def _entry(value: bytes) -> Entry:
    """A BundleEntryProto."""
    fields = _message(value, ENTRY)
    shape: list[int] = []
    for message in fields[2][-1:]:
        shape += (_last(_message(dim, DIM), 1) for dim in _message(message, SHAPE)[2])
    numbers = _last(fields, 4), _last(fields, 5)
    if min(numbers) < 0 or min(shape, default=0) < 0 or len(shape) > 8:
        raise _Damaged(f"a tensor has shape {shape[:9]} and lies at {numbers}")
    shard = _last(fields, 3)
    return Entry(_last(fields, 1), tuple(shape), shard, *numbers, _last(fields, 6), bool(fields[7]))


# The table


def _masked(crc: int) -> int:
    """How a checksum is stored, so that those of data with checksums in it are good ones, too."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table(file: BinaryFile) -> Iterator[tuple[bytes, bytes]]:
    """Keys, ascending, and values of a table."""
    if file.size > MAX_INDEX:
        raise _Damaged(f"it has {file.size} bytes, expected at most {MAX_INDEX}")
    footer = file.read(max(0, file.size - FOOTER), min(file.size, FOOTER), "its footer")
    if footer[-8:] != MAGIC or len(footer) < FOOTER:
        raise _Damaged("its end is not that of a table, perhaps it is truncated")
    _, at = _handle(footer, 0)  # of the metaindex block, which holds nothing
    index, _ = _handle(footer, at)
    before: bytes | None = None
    end = 0
    for _, value in _block(file, *index):
        (offset, size), _ = _handle(value, 0)
        if offset < end:  # or one large block could be read again and again
            raise _Damaged("its blocks do not lie one after the other")
        end = offset + size + TRAILER
        for key, found in _block(file, offset, size):
            if before is not None and key <= before:
                raise _Damaged("its names are not in order")
            before = key
            yield key, found


def _block(file: BinaryFile, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block, each key given by how it differs from the one before."""
    data = file.read(offset, size + TRAILER, "a block of the index")
    crc = int.from_bytes(data[-4:], "little")
    if _masked(crc32c(data[:-4])) != crc:
        raise _Damaged("a block has a wrong checksum")
    if data[-TRAILER]:
        raise WeightsError(
            f"{file.path} is compressed (method {data[-TRAILER]}), which gptx does not read: save "
            "the checkpoint again with TensorFlow"
        )
    data = data[:-TRAILER]
    # At the end stand the places where whole keys are, and how many there are: for searching.
    end = len(data) - 4 * (1 + int.from_bytes(data[-4:], "little"))
    if size < 4 or end < 0:
        raise _Damaged("a block is too short")
    key, at = b"", 0
    while at < end:
        shared, at = _varint(data, at)
        n_new, at = _varint(data, at)
        n_value, at = _varint(data, at)
        if shared > len(key) or shared + n_new > MAX_NAME or at + n_new + n_value > end:
            raise _Damaged("a block is not made of names and values")
        key = key[:shared] + data[at : at + n_new]
        yield key, data[at + n_new : at + n_new + n_value]
        at += n_new + n_value


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Offset and size of a block, and where the bytes after them begin."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


# Protocol buffers


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits a byte, the lowest first; and where the bytes after it begin."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Damaged("a number is not whole")
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFFFFFFFFFFFFFF, at
    raise _Damaged("a number has more than 64 bits")


def _message(data: bytes, kinds: Kinds) -> dict[int, list[Any]]:
    """The values of the fields in `kinds`, as often as they occur; the others are passed over."""
    fields: dict[int, list[Any]] = {number: [] for number in kinds}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == 0:
            value, at = _varint(data, at)
            value -= (value >> 63) << 64  # negative numbers are those of 64 bits
        elif wire in (1, 2, 5):
            size, at = _varint(data, at) if wire == 2 else (8 if wire == 1 else 4, at)
            value = data[at : at + size]
            at += size
            if at > len(data):
                raise _Damaged("a message is not whole")
            if wire != 2:
                value = int.from_bytes(value, "little")
        else:
            raise _Damaged(f"a message has a field of kind {wire}")
        if number in kinds:
            if not isinstance(value, kinds[number]):
                raise _Damaged(f"field {number} of a message is of another kind")
            fields[number].append(value)
    return fields


def _last(fields: dict[int, list[Any]], number: int) -> int:
    """The value of a field that occurs once; 0 is not written."""
    return fields[number][-1] if fields[number] else 0
