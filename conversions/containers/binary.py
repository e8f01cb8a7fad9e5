"""Binary files: read at offsets and never beyond their end; written a few rows at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptx.errors import StorageError, WeightsError
from gptx.files import BFLOAT16, widened

Array = np.ndarray

CHUNK = 2**20  # numbers that are converted at a time
COLUMNS = 64  # of a transposed array that are copied at a time
DTYPES = ("float32", "float16", "bfloat16")  # what a file can be asked to be of


class BinaryFile:
    """A file that is read at offsets: what is beyond its end is refused before it is allocated.

    Raises
    ------
    StorageError
        It cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.size = os.stat(path).st_size
        except OSError as error:
            raise self._unreadable(error) from error

    def read(self, offset: int, n_bytes: int, what: str) -> bytes:
        """`n_bytes` bytes at `offset`; errors call them `what`.

        Raises
        ------
        WeightsError
            The file ends before.
        """
        self._check(offset, n_bytes, what)
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                data = file.read(n_bytes)
        except OSError as error:
            raise self._unreadable(error) from error
        if len(data) != n_bytes:  # somebody is writing it
            raise WeightsError(f"{self.path} ended while {what} was read: fetch it again")
        return data

    def array(self, offset: int, shape: tuple[int, ...], dtype: Any, what: str) -> Array:
        """An array of `shape` and `dtype` that begins at `offset`, in C order; see `read`."""
        dtype = np.dtype(dtype)
        count = math.prod(shape)
        self._check(offset, count * dtype.itemsize, what)
        try:
            array = np.fromfile(self.path, dtype, count, offset=offset)
        except OSError as error:
            raise self._unreadable(error) from error
        if array.size != count:
            raise WeightsError(f"{self.path} ended while {what} was read: fetch it again")
        return array.reshape(shape)

    def _check(self, offset: int, n_bytes: int, what: str) -> None:
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.size:
            raise WeightsError(
                f"{self.path} is truncated or damaged: {what} should lie in bytes {offset} to "
                f"{offset + n_bytes}, the file has {self.size}"
            )

    def _unreadable(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path} cannot be read ({error.strerror or error})")


def cast(array: Array, dtype: str, what: str) -> Array:
    """An array in C order and little endian as one of `DTYPES`; bfloat16 as its bits, uint16.

    Raises
    ------
    WeightsError
        A finite number becomes an infinity.
    """
    if dtype == "bfloat16" and array.dtype == BFLOAT16:
        return _in_c_order(array.view("<u2"))
    wide = _in_c_order(widened(array))
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "bfloat16":
            narrow = _bfloat16_bits(wide.astype("<f4", copy=False))
            infinite = (narrow & 0x7FFF) == 0x7F80
        else:
            narrow = wide.astype({"float32": "<f4", "float16": "<f2"}[dtype], copy=False)
            infinite = np.isinf(narrow) if narrow.itemsize < wide.itemsize else np.False_
        if infinite.any() and np.isfinite(wide[infinite]).any():
            raise WeightsError(f"{what} holds a number that is too large for {dtype}: keep float32")
    return narrow


def _in_c_order(array: Array) -> Array:
    """An array in C order; what lies transposed is copied a few columns at a time, which is several
    times faster, since the rows that they are read from stay in the cache."""
    if array.ndim != 2 or array.strides[0] >= array.strides[1]:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    for first in range(0, array.shape[1], COLUMNS):
        out[:, first : first + COLUMNS] = array[:, first : first + COLUMNS]
    return out


def _bfloat16_bits(x: Array) -> Array:
    """float32 rounded to bfloat16, halves to even, as its bits."""
    bits = x.view("<u4")
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    if (nan := np.isnan(x)).any():
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype("<u2")


def write_array(file: BinaryIO, array: Array, dtype: str, what: str) -> None:
    """Append the numbers of an array, in C order, as one of `DTYPES`.

    So many rows at a time that neither a cast nor a transposed array takes much memory.
    """
    for rows in chunks(array):
        file.write(cast(rows, dtype, what).data)


def chunks(array: Array) -> Iterator[Array]:
    """The rows of an array, about `CHUNK` numbers at a time."""
    rows = array.reshape(1, -1) if array.ndim < 2 else array
    step = max(1, CHUNK // max(1, math.prod(rows.shape[1:])))
    for first in range(0, len(rows), step):
        yield rows[first : first + step]


def dtype_name(dtype: np.dtype) -> str:
    """The one of `DTYPES` that holds a stored type: float64 becomes float32."""
    if dtype == BFLOAT16:
        return "bfloat16"
    return "float16" if dtype == np.float16 else "float32"
