"""Safetensors files: the header is checked, the data are mapped into memory or read.

The format is a length, a JSON header and the bytes of the tensors
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptx.errors import StorageError, WeightsError

# NumPy has no bfloat16. This type marks its bits, so that they stay in the file until used.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])

# Names of types in the format -> types.
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": BFLOAT16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

ALIGNMENT_BYTES = 8  # of the data in a written file
MAX_NAME_LENGTH = 200  # characters; the Hub's names have fewer than 50
# 1558M has 580 tensors and a header of 0.06 MB.
MAX_HEADER_BYTES = 2**23
MAX_TENSORS = 20_000


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it.

    Attributes
    ----------
    dtype, shape
        Type and shape of the array.
    offset
        Position of the first byte in the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file with a valid header.

    Attributes
    ----------
    path
        Path of the file.
    entries
        Name -> `Entry`, in the order of the header.
    metadata
        The strings of `__metadata__`.

    Raises
    ------
    WeightsError
        The file is truncated, its header is invalid, or a type is not supported.
    StorageError
        The file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header, start = self._header()
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.entries = {name: self._entry(name, header[name], start) for name in header}

    def _header(self) -> tuple[dict[str, Any], int]:
        """Read the header; return it and the position of the data."""
        from safetensors import SafetensorError, safe_open

        try:
            with open(self.path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                is_complete = size <= os.fstat(file.fileno()).st_size - 8
                text = file.read(min(size, MAX_HEADER_BYTES)) if is_complete else b""
        except OSError as error:
            raise self._unreadable(error) from error
        if size > MAX_HEADER_BYTES and is_complete:
            raise self._too_large(f"a header of {size} bytes, expected at most {MAX_HEADER_BYTES}")
        if text.count(b"{") > MAX_TENSORS:  # each entry is an object
            raise self._too_large(f"over {MAX_TENSORS} tensors")
        try:
            # The safetensors library checks lengths, offsets, overlaps and the size of the file.
            with safe_open(self.path, framework="np"):
                pass
            return json.loads(text, object_pairs_hook=_unique), 8 + size
        except (SafetensorError, ValueError) as error:
            raise WeightsError(
                f"{self.path} is truncated or not a valid safetensors file ({error}): "
                "fetch it again"
            ) from None
        except OSError as error:
            raise self._unreadable(error) from error

    def _too_large(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path} has {what}: it is no GPT-2, or it is damaged")

    def _entry(self, name: str, entry: dict[str, Any], start: int) -> Entry:
        if not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise WeightsError(
                f"{self.path} has a tensor with an invalid name (over {MAX_NAME_LENGTH} characters "
                "or not printable): fetch it again"
            )
        if entry["dtype"] not in DTYPES:
            raise WeightsError(
                f"{self.path}: tensor {name} is of type {entry['dtype']}, "
                f"expected one of {', '.join(DTYPES)}"
            )
        dtype = np.dtype(DTYPES[entry["dtype"]])
        return Entry(dtype, tuple(entry["shape"]), start + entry["data_offsets"][0])

    def _unreadable(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path} cannot be read ({error.strerror or error})")

    @cached_property
    def _mapped(self) -> np.ndarray:
        try:
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._unreadable(error) from error
        return np.frombuffer(mapped, np.uint8)

    def map(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only array on the file mapped into memory.

        The system reads the data when they are used. Only data that are not aligned are copied.
        """
        entry = self.entries[name]
        raw = self._mapped[entry.offset : entry.offset + entry.nbytes]
        if raw.ctypes.data % entry.dtype.itemsize:
            raw = raw.copy()
        array = self._shaped(raw.view(entry.dtype), name)
        array.flags.writeable = False
        return array

    def read(self, name: str) -> np.ndarray:
        """Read a tensor into memory.

        Raises
        ------
        WeightsError
            The file was truncated after its header was read.
        StorageError
            The file cannot be read.
        """
        entry = self.entries[name]
        count = math.prod(entry.shape)
        try:
            array = np.fromfile(self.path, entry.dtype, count, offset=entry.offset)
        except OSError as error:
            raise self._unreadable(error) from error
        if array.size != count:
            raise WeightsError(f"{self.path} is truncated at tensor {name}: fetch it again")
        return self._shaped(array, name)

    def _shaped(self, array: np.ndarray, name: str) -> np.ndarray:
        try:
            return array.reshape(self.entries[name].shape)
        except ValueError as error:  # a size that overflows, or over 64 dimensions
            raise WeightsError(
                f"{self.path}: tensor {name} has a shape that NumPy does not support ({error}): "
                "fetch it again"
            ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict; the format forbids duplicate names because readers differ on them."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("duplicate name in the header")
    return found


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Map a safetensors file into memory; see `SafetensorsFile`.

    Returns
    -------
    tensors, metadata
        Read-only arrays by name, and the strings of `__metadata__`. bfloat16 has the type
        `BFLOAT16`; `widen_bfloat16` converts it.
    """
    file = SafetensorsFile(path)
    return {name: file.map(name) for name in file.entries}, file.metadata


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write arrays in memory to a file; the same arrays and metadata give the same bytes."""
    layout = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    write_arrays(file, layout, tensors.values(), metadata)


def write_arrays(
    file: BinaryIO,
    layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    arrays: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Write arrays that arrive one by one to a file.

    Parameters
    ----------
    layout
        Name -> type and shape of each array.
    arrays
        The arrays, in the order of `layout`.
    metadata
        The strings of `__metadata__`.
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in arrays:
        little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
        file.write(np.ascontiguousarray(little_endian).data)


def widen_bfloat16(array: np.ndarray) -> np.ndarray:
    """Convert bfloat16 to float32, which is exact; return other types unchanged."""
    if array.dtype != BFLOAT16:
        return array
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
