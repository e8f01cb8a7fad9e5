"""TensorFlow's checkpoints of version 2: named tensors in `X.index` and `X.data-00000-of-0000N`.

The index is a table in LevelDB's format: name -> a message of protocol buffers. The other files
have the numbers only (https://github.com/tensorflow/tensorflow,
tensorflow/core/protobuf/tensor_bundle.proto and core/util/tensor_bundle;
https://github.com/google/leveldb, doc/table_format.md). Every block of the index and every tensor
has a checksum, which is compared before the data are returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptx.conversions.containers.binary import Array, BinaryFile
from gptx.conversions.containers.crc32c import crc32c
from gptx.errors import NotFoundError, StorageError, WeightsError
from gptx.safetensors_file import BFLOAT16

MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
FOOTER_BYTES = 48  # at the end: position of the index block, padding, magic
TRAILER_BYTES = 5  # after each block: one for its compression, four for its checksum
# Names share prefixes: without bounds a small index could decode to a large one.
MAX_INDEX_BYTES, MAX_NAME_BYTES = 2**20, 250  # the index of OpenAI's 1558M has 21 kB
MAX_DIMENSIONS = 8

VERSION = 1  # the newest version of the index that this reader supports
FLOATS: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    14: BFLOAT16,
    19: np.dtype("<f2"),
}

# The fields of the messages that are used, and their types.
Kinds = dict[int, type]
HEADER: Kinds = {1: int, 2: int, 3: bytes}  # num_shards, endianness, version
VERSIONS: Kinds = {2: int}  # min_consumer
ENTRY: Kinds = {1: int, 2: bytes, 3: int, 4: int, 5: int, 6: int, 7: bytes}
SHAPE: Kinds = {2: bytes}  # dim
DIM: Kinds = {1: int}  # size


class _DamagedError(Exception):
    """A fault of an index; the message names it."""


@dataclass(frozen=True)
class BundleEntry:
    """A tensor as the index describes it.

    Attributes
    ----------
    dtype
        TensorFlow's number of its type, see `FLOATS`.
    shape
        Its shape.
    shard
        Number of the file with its data.
    offset, size
        Position of its data in that file, and their size, in bytes.
    crc
        Masked CRC-32C of its data.
    sliced
        True if its data are stored as slices under other names.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


class TensorBundle:
    """A checkpoint whose index has been read.

    Parameters
    ----------
    index
        Path of `X.index`.

    Attributes
    ----------
    entries
        Name -> tensor.
    sizes
        Path -> size in bytes, for each file of data.

    Raises
    ------
    WeightsError
        The index is truncated, damaged or not supported.
    StorageError
        The index cannot be read.
    """

    def __init__(self, index: Path) -> None:
        self.index = index
        file = BinaryFile(index)
        try:
            self.entries = dict(self._parse(file))
        except _DamagedError as error:
            raise WeightsError(f"{index} is damaged ({error}): fetch it again") from None
        ends: dict[Path, int] = {}
        for entry in self.entries.values():
            if not entry.sliced:
                path = self.path(entry)
                ends[path] = max(ends.get(path, 0), entry.offset + entry.size)
        self.sizes = ends

    def _parse(self, file: BinaryFile) -> Iterator[tuple[str, BundleEntry]]:
        table = _table(file)
        key, value = next(table, (None, b""))
        if key != b"":
            raise _DamagedError("its header is missing")
        header = _message(value, HEADER)
        self.n_shards = _last(header, 1)
        if _last(header, 2):
            raise WeightsError(f"{self.index} is of a big-endian machine, which is not supported")
        for message in header[3]:
            if (needs := _last(_message(message, VERSIONS), 2)) > VERSION:
                raise WeightsError(f"{self.index} has version {needs}, expected {VERSION}")
        for key, value in table:
            # A key that starts with 0 is a slice of a tensor that is `sliced`.
            name = key.decode(errors="backslashreplace")
            if not (name.isprintable() or key[:1] == b"\0"):
                raise _DamagedError(f"a name is {name!r}, expected a printable one")
            entry = _entry(value)
            if not entry.sliced and not 0 <= entry.shard < self.n_shards:
                raise _DamagedError(f"{name} is in file {entry.shard} of {self.n_shards}")
            yield name, entry

    def path(self, entry: BundleEntry) -> Path:
        """Return the path of the file with a tensor's data."""
        stem = self.index.name.removesuffix(".index")
        return self.index.with_name(f"{stem}.data-{entry.shard:05d}-of-{self.n_shards:05d}")

    def check_files(self) -> None:
        """Check that all files exist and have the sizes in the index.

        Raises
        ------
        NotFoundError
            A file is missing.
        WeightsError
            A file is too short or too long, or the files belong to another index.
        """
        for path, expected in self.sizes.items():
            if not path.is_file():
                others = _data_files(self.index)
                if others and not others[0].endswith(f"-of-{self.n_shards:05d}"):
                    raise WeightsError(
                        f"{self.index} needs {path.name}, but found {others[0]}: fetch both again"
                    )
                raise NotFoundError(
                    f"{path} is missing: fetch it, or give the path of a complete checkpoint"
                )
            size = BinaryFile(path).size
            if size != expected:
                fault = "truncated" if size < expected else "too long"
                raise WeightsError(
                    f"{path} is {fault}: it has {size} bytes, expected {expected} by its index: "
                    "fetch it again"
                )

    def dtype(self, name: str) -> np.dtype:
        """Return the type of the array that `read` returns.

        Raises
        ------
        WeightsError
            The tensor is not supported, or its size does not fit its shape and type.
        """
        entry = self.entries[name]
        if entry.sliced:
            raise WeightsError(f"{self.index}: {name} is stored in slices, which is not supported")
        if entry.dtype not in FLOATS:
            raise WeightsError(
                f"{self.index}: {name} is of TensorFlow's type {entry.dtype}, expected float32, "
                "float64, float16 or bfloat16"
            )
        dtype = FLOATS[entry.dtype]
        if entry.size != math.prod(entry.shape) * dtype.itemsize:
            raise WeightsError(
                f"{self.index} is damaged: {name} of shape {list(entry.shape)} has {entry.size} "
                "bytes: fetch it again"
            )
        return dtype

    def read(self, name: str) -> Array:
        """Read a tensor and compare its checksum.

        Raises
        ------
        WeightsError
            The tensor is damaged or truncated.
        StorageError
            The file cannot be read.
        """
        entry, dtype = self.entries[name], self.dtype(name)
        path = self.path(entry)
        array = BinaryFile(path).map(entry.offset, entry.shape, dtype, f"tensor {name}")
        if _masked(crc32c(array)) != entry.crc:
            raise WeightsError(
                f"{path} is damaged (the checksum of {name} differs): fetch it again"
            )
        return array


def is_bundle(index: Path) -> bool:
    """Return True for an index with a valid end, or with files of data beside it."""
    try:
        file = BinaryFile(index)
        complete = file.size >= FOOTER_BYTES and file.read(file.size - 8, 8, "its end") == MAGIC
    except (StorageError, WeightsError):
        return False
    return complete or bool(_data_files(index))


def _data_files(index: Path) -> list[str]:
    """Return the names of the files of data beside an index."""
    stem = f"{index.name.removesuffix('.index')}.data-"
    try:
        return sorted(path.name for path in index.parent.iterdir() if path.name.startswith(stem))
    except OSError:
        return []


def _entry(value: bytes) -> BundleEntry:
    """Decode a BundleEntryProto."""
    fields = _message(value, ENTRY)
    shape: list[int] = []
    for message in fields[2][-1:]:
        shape += (_last(_message(dim, DIM), 1) for dim in _message(message, SHAPE)[2])
    numbers = _last(fields, 4), _last(fields, 5)
    if min(*numbers, *shape) < 0 or len(shape) > MAX_DIMENSIONS:
        raise _DamagedError(f"a tensor has shape {shape[:9]}, and offset and size {numbers}")
    shard = _last(fields, 3)
    return BundleEntry(
        _last(fields, 1), tuple(shape), shard, *numbers, _last(fields, 6), bool(fields[7])
    )


# The table


def _masked(crc: int) -> int:
    """Mask a checksum as the format does, because CRCs of data with CRCs in them are weak."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table(file: BinaryFile) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys of a table, in ascending order, and their values."""
    if file.size > MAX_INDEX_BYTES:
        raise _DamagedError(f"it has {file.size} bytes, expected at most {MAX_INDEX_BYTES}")
    footer = file.read(max(0, file.size - FOOTER_BYTES), min(file.size, FOOTER_BYTES), "its footer")
    if footer[-8:] != MAGIC or len(footer) < FOOTER_BYTES:
        raise _DamagedError("its end is invalid: perhaps it is truncated")
    _, at = _handle(footer, 0)  # skips the metaindex block, which is empty
    index, _ = _handle(footer, at)
    before: bytes | None = None
    end = 0
    for _, value in _block(file, *index):
        (offset, size), _ = _handle(value, 0)
        if offset < end:  # a small index could otherwise decode one block many times
            raise _DamagedError("its blocks are not in order")
        end = offset + size + TRAILER_BYTES
        for key, found in _block(file, offset, size):
            if before is not None and key <= before:
                raise _DamagedError("its names are not in order")
            before = key
            yield key, found


def _block(file: BinaryFile, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block; a key is stored without the prefix it shares."""
    data = file.read(offset, size + TRAILER_BYTES, "a block of the index")
    crc = int.from_bytes(data[-4:], "little")
    if _masked(crc32c(data[:-4])) != crc:
        raise _DamagedError("the checksum of a block differs")
    if data[-TRAILER_BYTES]:
        raise WeightsError(
            f"{file.path} is compressed (method {data[-TRAILER_BYTES]}), which is not supported: "
            "save the checkpoint again with TensorFlow"
        )
    data = data[:-TRAILER_BYTES]
    # The end has the positions of complete keys and their count, for a search.
    end = len(data) - 4 * (1 + int.from_bytes(data[-4:], "little"))
    if size < 4 or end < 0:
        raise _DamagedError("a block is too short")
    key, at = b"", 0
    while at < end:
        shared, at = _varint(data, at)
        n_new, at = _varint(data, at)
        n_value, at = _varint(data, at)
        if shared > len(key) or shared + n_new > MAX_NAME_BYTES or at + n_new + n_value > end:
            raise _DamagedError("an entry of a block is invalid")
        key = key[:shared] + data[at : at + n_new]
        yield key, data[at + n_new : at + n_new + n_value]
        at += n_new + n_value


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Decode the offset and size of a block; return also the position after them."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


# Protocol buffers


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode a number, seven bits a byte, lowest first; return also the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _DamagedError("a number is truncated")
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFFFFFFFFFFFFFF, at
    raise _DamagedError("a number has more than 64 bits")


def _message(data: bytes, kinds: Kinds) -> dict[int, list[Any]]:
    """Decode a message: number -> values, for the fields in `kinds`; skip the others."""
    fields: dict[int, list[Any]] = {number: [] for number in kinds}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == 0:
            value, at = _varint(data, at)
            value -= (value >> 63) << 64  # two's complement of 64 bits
        elif wire in (1, 2, 5):
            size, at = _varint(data, at) if wire == 2 else (8 if wire == 1 else 4, at)
            value = data[at : at + size]
            at += size
            if at > len(data):
                raise _DamagedError("a message is truncated")
            if wire != 2:
                value = int.from_bytes(value, "little")
        else:
            raise _DamagedError(f"a message has a field of wire type {wire}")
        if number in kinds:
            if not isinstance(value, kinds[number]):
                raise _DamagedError(f"field {number} of a message has another type")
            fields[number].append(value)
    return fields


def _last(fields: dict[int, list[Any]], number: int) -> int:
    """Return the value of a field; a missing one is 0."""
    return fields[number][-1] if fields[number] else 0
