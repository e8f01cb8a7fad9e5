"""What torch.save writes: a pickle, and the numbers of its tensors beside it.

Since PyTorch 1.6 it is a zip archive: NAME/data.pkl, and each storage as NAME/data/KEY. Before, and
to this day with `_use_new_zipfile_serialization=False`, it was four pickles one behind the other
(a magic number, a version, the machine, the value), a fifth with the keys of the storages, and then
these in that order, each with its length
(https://github.com/pytorch/pytorch, torch/serialization.py, `_save` and `_legacy_save`).
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptx.conversions.checkpoint import Array, Stored
from gptx.conversions.containers.binary import BinaryFile
from gptx.conversions.containers.safe_pickle import MAX_BYTES, Unpickled
from gptx.conversions.containers.torch_names import Storage, Tensor, extent
from gptx.conversions.containers.zip_archive import Record, records
from gptx.errors import GptxError, WeightsError

ARCHIVE = b"PK\3\4"
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
MAGIC = b"\x8a\x0a" + MAGIC_NUMBER.to_bytes(10, "little")  # as every protocol pickles it
VERSION = 1001
PIECE = 2**20  # bytes that are looked at at a time


def is_torch(path: Path) -> bool:
    """Whether a file begins as torch.save begins one, or is an archive with such a pickle."""
    try:
        file = BinaryFile(path)
        head = file.read(0, min(file.size, 600), "its beginning")
        if head[:1] == b"\x80":
            return MAGIC in head[:32]
        return head.startswith(ARCHIVE) and (
            b"/data.pkl" in head or any(name.endswith("/data.pkl") for name in records(file))
        )
    except GptxError:
        return False


class TorchFile:
    """A file of torch.save; nothing but its pickles has been read.

    Attributes
    ----------
    value
        What was saved, see `Unpickled`.

    Raises
    ------
    WeightsError
        It is damaged, or its pickle asks for more than tensors need.
    StorageError
        It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file = BinaryFile(path)
        self._swapped = False
        try:
            head = self._file.read(0, min(4, self._file.size), "its beginning")
            pickled, self._places = self._archive() if head == ARCHIVE else self._pickles()
        except WeightsError as error:
            if str(path) in str(error):
                raise
            raise WeightsError(f"{path} cannot be read: {error}") from None
        self.value = pickled.value

    def _archive(self) -> tuple[Unpickled, dict[str, _Place]]:
        found = records(self._file)
        folders = [name[: -len("data.pkl")] for name in found if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise WeightsError(f"{len(folders)} files in the archive are data.pkl, expected one")
        pickled = Unpickled(self._content(found[f"{folders[0]}data.pkl"]))
        if (order := found.get(f"{folders[0]}byteorder")) is not None:
            self._swapped = self._content(order) == b"big"
        places = {}
        for key, storage in pickled.storages.items():
            record = found.get(f"{folders[0]}data/{key}")
            if record is None or record.n_bytes != storage.size * storage.dtype.itemsize:
                raise WeightsError("a storage of its tensors is missing, or of another size")
            places[key] = _Place(record.start(self._file), record.crc)
        return pickled, places

    def _content(self, record: Record) -> bytes:
        if record.n_bytes > MAX_BYTES:
            raise WeightsError(f"{record.name} has {record.n_bytes} bytes, more than {MAX_BYTES}")
        data = self._file.read(record.start(self._file), record.n_bytes, record.name)
        if record.crc not in (0, zlib.crc32(data)):
            raise WeightsError(f"{record.name} is damaged (its CRC-32 differs): fetch it again")
        return data

    def _pickles(self) -> tuple[Unpickled, dict[str, _Place]]:
        file = self._file
        data = file.read(0, min(file.size, MAX_BYTES), "its beginning")
        magic = Unpickled(data)
        version = Unpickled(data, magic.end)
        for found, expected in ((magic.value, MAGIC_NUMBER), (version.value, VERSION)):
            if not isinstance(found, int) or found != expected:
                raise WeightsError("it does not begin as a file of PyTorch")
        machine = Unpickled(data, version.end)
        pickled = Unpickled(data, machine.end)
        keys = Unpickled(data, pickled.end)
        if not isinstance(keys.value, list) or len(keys.value) != len(pickled.storages):
            raise WeightsError("it does not list the storages of its tensors")
        at = keys.end
        places: dict[str, _Place] = {}
        for key in keys.value:
            storage = pickled.storages.get(key) if isinstance(key, str) else None
            if storage is None or key in places:
                raise WeightsError("it does not list the storages of its tensors")
            size = int.from_bytes(file.read(at, 8, "the size of a storage"), "little")
            if size != storage.size:
                raise WeightsError(f"a storage has {size} numbers, its tensors need {storage.size}")
            places[key] = _Place(at + 8, 0)
            at += 8 + size * storage.dtype.itemsize
        if at != file.size:
            raise WeightsError(f"it should have {at} bytes and has {file.size}: fetch it again")
        return pickled, places

    def state_dict(self, value: Any) -> dict[str, Tensor]:
        """The tensors of a part of `value`, by name.

        Raises
        ------
        WeightsError
            It is no dict of tensors alone.
        """
        if not isinstance(value, dict) or not value:
            raise WeightsError(f"{self._file.path} holds no tensors under names")
        for name, tensor in value.items():
            if not (name.isascii() and name.isprintable() and len(name) <= 200):
                raise WeightsError(f"{self._file.path} is damaged: a tensor has no proper name")
            if not isinstance(tensor, Tensor):
                raise WeightsError(f"{self._file.path}: {name} is no tensor, expected one")
        return dict(value)

    def stored(self, tensor: Tensor, name: str, *, transposed: bool = False) -> Stored:
        """A tensor of the file, to be read later.

        Raises
        ------
        WeightsError
            It holds the same numbers again and again, as no weight does.
        """
        if math.prod(tensor.shape) > extent(tensor.shape, tensor.strides):
            raise WeightsError(f"{self._file.path}: tensor {name} overlaps with itself")
        shape = tensor.shape[::-1] if transposed else tensor.shape

        def read() -> Array:
            array = self._read(tensor, f"tensor {name}")
            return array.T if transposed else array

        return Stored(shape, tensor.storage.dtype, read)

    def _read(self, tensor: Tensor, what: str) -> Array:
        storage, place = tensor.storage, self._places[tensor.storage.key]
        size = storage.dtype.itemsize
        count = extent(tensor.shape, tensor.strides)
        numbers = self._file.array(
            place.start + tensor.offset * size, (count,), storage.dtype, what
        )
        if place.crc and not place.checked:
            crc = zlib.crc32(numbers.data) if count == storage.size else self._crc(storage)
            if crc != place.crc:
                raise WeightsError(
                    f"{self._file.path}: {what} is damaged (its CRC-32 differs): fetch it again"
                )
            place.checked = True
        if self._swapped:
            numbers = numbers.byteswap()
        strides = [step * size for step in tensor.strides]
        return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides)

    def is_same(self, tensor: Tensor, other: TorchFile, theirs: Tensor) -> bool:
        """Whether a tensor of this file has the numbers of one of another, bit for bit."""
        if self is other and tensor == theirs:
            return True
        layout = (tensor.shape, tensor.strides, tensor.storage.dtype)
        if layout != (theirs.shape, theirs.strides, theirs.storage.dtype):
            return False
        return all(map(operator.eq, self._pieces(tensor), other._pieces(theirs)))

    def _pieces(self, tensor: Tensor) -> Iterator[bytes]:
        """The bytes from the first number of a tensor to its last."""
        size = tensor.storage.dtype.itemsize
        start = self._places[tensor.storage.key].start + tensor.offset * size
        end = start + extent(tensor.shape, tensor.strides) * size
        for at in range(start, end, PIECE):
            yield self._file.read(at, min(PIECE, end - at), "a tensor")

    def _crc(self, storage: Storage) -> int:
        """That of a whole storage of which a tensor is a part."""
        crc = 0
        for piece in self._pieces(Tensor(storage, 0, (storage.size,), (1,))):
            crc = zlib.crc32(piece, crc)
        return crc


@dataclass
class _Place:
    """Where a storage begins, and its CRC-32, or 0 if there is none."""

    start: int
    crc: int
    checked: bool = False
