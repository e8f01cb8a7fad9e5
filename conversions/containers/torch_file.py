"""Files of torch.save: a pickle that describes tensors, and their numbers.

Since PyTorch 1.6 the file is a zip archive with NAME/data.pkl, and NAME/data/KEY for each storage.
Before 1.6, and still with `_use_new_zipfile_serialization=False`, it is five pickles in a row: a
magic number, a version, the machine, the value, and the keys of the storages. The storages follow,
each after its length (https://github.com/pytorch/pytorch, torch/serialization.py, `_save` and
`_legacy_save`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptx.conversions.containers.binary import Array, BinaryFile
from gptx.conversions.containers.safe_pickle import MAX_PICKLE_BYTES, Unpickled
from gptx.conversions.containers.torch_globals import TorchStorage, TorchTensor
from gptx.conversions.containers.zip_archive import ZipEntry, zip_entries
from gptx.errors import GptxError, WeightsError

ZIP_MAGIC = b"PK\3\4"
LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
LEGACY_MAGIC = b"\x8a\x0a" + LEGACY_MAGIC_NUMBER.to_bytes(10, "little")  # in every pickle protocol
LEGACY_VERSION = 1001
MAX_DICT_DEPTH = 3  # of a dict in the saved value, in keys
READ_BYTES = 2**20  # at a time, for checksums
DETECT_BYTES = 600


def is_torch(path: Path) -> bool:
    """Return True if the start of a file, or the directory of an archive, is that of torch.save."""
    try:
        file = BinaryFile(path)
        head = file.read(0, min(file.size, DETECT_BYTES), "its start")
        if head[:1] == b"\x80":
            return LEGACY_MAGIC in head[:32]
        return head.startswith(ZIP_MAGIC) and (
            b"/data.pkl" in head or any(name.endswith("/data.pkl") for name in zip_entries(file))
        )
    except GptxError:
        return False


@dataclass
class _StorageLocation:
    """The position of a storage's first byte, and its CRC-32, or 0 if the file has none."""

    start: int
    crc: int
    checked: bool = False


class TorchFile:
    """A file of torch.save; opening it reads its pickles only.

    Attributes
    ----------
    path, size
        Path of the file, and its size in bytes.
    value
        The saved value, see `Unpickled`.

    Raises
    ------
    WeightsError
        The file is damaged, or its pickle needs more than tensors need.
    StorageError
        The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = BinaryFile(path)
        self.size = self._file.size
        self._big_endian = False
        try:
            head = self._file.read(0, min(4, self._file.size), "its start")
            open_file = self._open_archive if head == ZIP_MAGIC else self._open_legacy
            pickled, self._locations = open_file()
        except WeightsError as error:
            if str(path) in str(error):
                raise
            raise WeightsError(f"{path} cannot be read: {error}") from None
        self.value = pickled.value

    def _open_archive(self) -> tuple[Unpickled, dict[str, _StorageLocation]]:
        entries = zip_entries(self._file)
        folders = [name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise WeightsError(f"the archive has {len(folders)} files data.pkl, expected one")
        if f"{folders[0]}constants.pkl" in entries:
            raise WeightsError("it is a program of TorchScript: save the model's state_dict()")
        pickled = Unpickled(self._content(entries[f"{folders[0]}data.pkl"]))
        if (order := entries.get(f"{folders[0]}byteorder")) is not None:
            self._big_endian = self._content(order) == b"big"
        locations = {}
        for key, storage in pickled.storages.items():
            entry = entries.get(f"{folders[0]}data/{key}")
            if entry is None or entry.n_bytes != storage.size * storage.dtype.itemsize:
                raise WeightsError("a storage of its tensors is missing or has another size")
            locations[key] = _StorageLocation(entry.start(self._file), entry.crc)
        return pickled, locations

    def _content(self, entry: ZipEntry) -> bytes:
        if entry.n_bytes > MAX_PICKLE_BYTES:
            raise WeightsError(
                f"{entry.name} has {entry.n_bytes} bytes, expected at most {MAX_PICKLE_BYTES}"
            )
        data = self._file.read(entry.start(self._file), entry.n_bytes, entry.name)
        if entry.crc not in (0, zlib.crc32(data)):
            raise WeightsError(f"{entry.name} is damaged (its CRC-32 differs): fetch it again")
        return data

    def _open_legacy(self) -> tuple[Unpickled, dict[str, _StorageLocation]]:
        file = self._file
        data = file.read(0, min(file.size, MAX_PICKLE_BYTES), "its start")
        magic = Unpickled(data)
        version = Unpickled(data, magic.end)
        for found, expected in (
            (magic.value, LEGACY_MAGIC_NUMBER),
            (version.value, LEGACY_VERSION),
        ):
            if not isinstance(found, int) or found != expected:
                raise WeightsError("its start is not that of a PyTorch file")
        machine = Unpickled(data, version.end)
        pickled = Unpickled(data, machine.end)
        keys = Unpickled(data, pickled.end)
        if not isinstance(keys.value, list) or len(keys.value) != len(pickled.storages):
            raise WeightsError("its list of storages is invalid")
        at = keys.end
        locations: dict[str, _StorageLocation] = {}
        for key in keys.value:
            storage = pickled.storages.get(key) if isinstance(key, str) else None
            if storage is None or key in locations:
                raise WeightsError("its list of storages is invalid")
            size = int.from_bytes(file.read(at, 8, "the size of a storage"), "little")
            if size != storage.size:
                raise WeightsError(f"a storage has {size} numbers, its tensors need {storage.size}")
            locations[key] = _StorageLocation(at + 8, 0)
            at += 8 + size * storage.dtype.itemsize
        if at != file.size:
            raise WeightsError(f"it has {file.size} bytes, expected {at}: fetch it again")
        return pickled, locations

    def tensors(self, value: dict[str, Any]) -> dict[str, FileTensor]:
        """Return the tensors of a dict in `self.value`; other items are left out.

        Raises
        ------
        WeightsError
            A name is invalid.
        """
        found = {
            name: FileTensor(self, item)
            for name, item in value.items()
            if isinstance(item, TorchTensor)
        }
        for name in found:
            if not (name.isascii() and name.isprintable()):
                raise WeightsError(f"{self.path} is damaged: a tensor has an invalid name")
        return found

    def find_dicts(self, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, dict[str, Any]]:
        """Find dicts in `self.value`, down to `MAX_DICT_DEPTH` keys below it.

        Parameters
        ----------
        is_wanted
            Function that selects a dict; those inside of a selected dict are not searched.

        Returns
        -------
        dict
            Keys on the way, with a point between (`model.ema`) -> dict; the outer ones first.
        """
        found: dict[str, dict[str, Any]] = {}
        level: list[tuple[str, Any]] = [("", self.value)]
        seen: set[int] = set()  # a file can contain one dict any number of times
        for _ in range(MAX_DICT_DEPTH + 1):
            inner: list[tuple[str, Any]] = []
            for path, value in level:
                if not isinstance(value, dict) or id(value) in seen:
                    continue
                seen.add(id(value))
                if is_wanted(value):
                    found[path] = value
                    continue
                for key, item in value.items():
                    if isinstance(item, dict):
                        inner.append((f"{path}.{key}" if path else key, item))
            level = inner
        return found

    def _read(self, tensor: TorchTensor, label: str) -> Array:
        storage, location = tensor.storage, self._locations[tensor.storage.key]
        size = storage.dtype.itemsize
        numbers = self._file.map(
            location.start + tensor.offset * size, (tensor.extent,), storage.dtype, label
        )
        if location.crc and not location.checked:
            all_read = tensor.extent == storage.size
            crc = zlib.crc32(numbers.data) if all_read else self._crc(storage)
            if crc != location.crc:
                raise WeightsError(
                    f"{self.path}: {label} is damaged (its CRC-32 differs): fetch it again"
                )
            location.checked = True
        if self._big_endian:
            numbers = numbers.byteswap()
        strides = [step * size for step in tensor.strides]
        return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides)

    def _crc(self, storage: TorchStorage) -> int:
        """Compute the CRC-32 of a storage."""
        crc, start = 0, self._locations[storage.key].start
        end = start + storage.size * storage.dtype.itemsize
        for at in range(start, end, READ_BYTES):
            crc = zlib.crc32(self._file.read(at, min(READ_BYTES, end - at), "a storage"), crc)
        return crc


@dataclass(frozen=True)
class FileTensor:
    """A tensor and the file that has its numbers."""

    file: TorchFile
    view: TorchTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.view.shape

    @property
    def dtype(self) -> np.dtype:
        """Type of the array."""
        return self.view.storage.dtype

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def reader(self, name: str) -> Callable[[], Array]:
        """Return a function that reads the tensor; its first call compares the storage's CRC-32.

        Parameters
        ----------
        name
            Name of the tensor in error messages.

        Raises
        ------
        WeightsError
            The tensor overlaps itself, so that a small file could fill the memory. The function
            raises it if the tensor is damaged.
        """
        if math.prod(self.shape) > self.view.extent:
            raise WeightsError(f"{self.file.path}: tensor {name} overlaps itself")
        return lambda: self.file._read(self.view, f"tensor {name}")
