"""Binary files: bounds-checked reads at offsets, and writes of arrays in blocks of rows."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gptx.errors import StorageError, WeightsError
from gptx.safetensors_file import BFLOAT16, widen_bfloat16

Array = np.ndarray

CHUNK_NUMBERS = 2**20  # converted at a time
COPY_COLUMNS = 64  # of a transposed array, copied at a time


class Writer(Protocol):
    """An object to which bytes are appended: a file that is open, for one."""

    def write(self, data: Any, /) -> Any:
        """Append bytes."""


class BinaryFile:
    """A file that is read at offsets; a read past the end is an error before any allocation.

    Attributes
    ----------
    path, size
        Path of the file, and its size in bytes.

    Raises
    ------
    StorageError
        The file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.size = os.stat(path).st_size
        except OSError as error:
            raise self._unreadable(error) from error

    def read(self, offset: int, n_bytes: int, label: str) -> bytes:
        """Read `n_bytes` bytes at `offset`.

        Parameters
        ----------
        label
            Name of these bytes in error messages.

        Raises
        ------
        WeightsError
            The file is too short.
        StorageError
            The file cannot be read.
        """
        self._check(offset, n_bytes, label)
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                data = file.read(n_bytes)
        except OSError as error:
            raise self._unreadable(error) from error
        if len(data) != n_bytes:  # another process truncated it meanwhile
            raise WeightsError(f"{self.path} ended while {label} was read: fetch it again")
        return data

    def array(self, offset: int, shape: tuple[int, ...], dtype: Any, label: str) -> Array:
        """Read an array in C order at `offset`; see `read` for the label and the errors."""
        dtype = np.dtype(dtype)
        count = math.prod(shape)
        self._check(offset, count * dtype.itemsize, label)
        try:
            array = np.fromfile(self.path, dtype, count, offset=offset)
        except OSError as error:
            raise self._unreadable(error) from error
        if array.size != count:
            raise WeightsError(f"{self.path} ended while {label} was read: fetch it again")
        return array.reshape(shape)

    def map(self, offset: int, shape: tuple[int, ...], dtype: Any, label: str) -> Array:
        """Map an array in C order into memory, read-only; see `read` for the label and the errors.

        The system reads the data when they are used: the file must not become shorter before. Only
        data that are not aligned are copied.
        """
        dtype = np.dtype(dtype)
        n_bytes = math.prod(shape) * dtype.itemsize
        self._check(offset, n_bytes, label)
        if offset % dtype.itemsize or not n_bytes:  # an empty file cannot be mapped
            return self.array(offset, shape, dtype, label)
        return self._mapped[offset : offset + n_bytes].view(dtype).reshape(shape)

    @cached_property
    def _mapped(self) -> Array:
        try:
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._unreadable(error) from error
        if len(mapped) < self.size:
            raise WeightsError(f"{self.path} became shorter while it was read: fetch it again")
        return np.frombuffer(mapped, np.uint8)

    def _check(self, offset: int, n_bytes: int, label: str) -> None:
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.size:
            raise WeightsError(
                f"{self.path} is truncated or damaged: expected {label} in bytes {offset} to "
                f"{offset + n_bytes}, the file has {self.size}: fetch it again"
            )

    def _unreadable(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path} cannot be read ({error.strerror or error})")


def cast(array: Array, dtype: str, label: str) -> Array:
    """Convert an array to another float type, in C order and little endian.

    Parameters
    ----------
    dtype
        "float32", "float16" or "bfloat16"; bfloat16 is returned as its bits, uint16.
    label
        Name of the array in error messages.

    Raises
    ------
    WeightsError
        A finite number is too large for the type.
    """
    if dtype == "bfloat16" and array.dtype == BFLOAT16:
        return _c_order(array.view("<u2"))
    wide = _c_order(widen_bfloat16(array))
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "bfloat16":
            narrow = _bfloat16_bits(wide.astype("<f4", copy=False))
            infinite = (narrow & 0x7FFF) == 0x7F80
        else:
            narrow = wide.astype({"float32": "<f4", "float16": "<f2"}[dtype], copy=False)
            infinite = np.isinf(narrow) if narrow.itemsize < wide.itemsize else np.False_
        if infinite.any() and np.isfinite(wide[infinite]).any():
            raise WeightsError(f"{label} has a number that is too large for {dtype}: use float32")
    return narrow


def _c_order(array: Array) -> Array:
    """Copy an array to C order, unless it has it.

    A transposed array is copied a few columns at a time: its rows then stay in the cache, and the
    copy is several times faster.
    """
    if array.ndim != 2 or array.strides[0] >= array.strides[1]:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    for first in range(0, array.shape[1], COPY_COLUMNS):
        out[:, first : first + COPY_COLUMNS] = array[:, first : first + COPY_COLUMNS]
    return out


def _bfloat16_bits(x: Array) -> Array:
    """Round float32 to bfloat16, ties to even; return its bits."""
    bits = x.view("<u4")
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    if (nan := np.isnan(x)).any():
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype("<u2")


def write_array(file: Writer, array: Array, dtype: str, label: str) -> None:
    """Append an array in C order, converted as by `cast`, in blocks of rows to limit the memory."""
    for rows in row_chunks(array):
        file.write(cast(rows, dtype, label).data)


def row_chunks(array: Array) -> Iterator[Array]:
    """Yield the rows of an array in blocks of about `CHUNK_NUMBERS` numbers."""
    rows = array.reshape(1, -1) if array.ndim < 2 else array
    step = max(1, CHUNK_NUMBERS // max(1, math.prod(rows.shape[1:])))
    for first in range(0, len(rows), step):
        yield rows[first : first + step]


def dtype_name(dtype: np.dtype) -> str:
    """Return the type to write an array of `dtype` in: its own, or float32 for float64."""
    if dtype == BFLOAT16:
        return "bfloat16"
    return "float16" if dtype == np.float16 else "float32"
