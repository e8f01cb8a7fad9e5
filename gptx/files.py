"""Files: safetensors mapped into memory, and writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptx.errors import GptxError, StorageError, WeightsError

# NumPy has no bfloat16: this marks its bits, so that they can stay where they are in the file.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])

# safetensors' names of the types.
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


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Map a safetensors file into memory.

    Nothing is read before it is used, and nothing is copied but data that does not lie at a
    multiple of its size. bfloat16 comes as `BFLOAT16`, see `widened`.

    Returns
    -------
    tensors, metadata
        Read-only arrays by name, and the strings of the file's `__metadata__`.

    Raises
    ------
    WeightsError
        The file is truncated or its header is damaged.
    StorageError
        The file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # The safetensors library checks the header: its length, offsets, overlaps, and the size of
        # the file. What it accepts can be mapped as it says.
        with safe_open(path, framework="np"):
            pass
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(
                file.read(header_size), object_pairs_hook=_without_doubles
            )
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (SafetensorError, ValueError) as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}): fetch it again"
        ) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
    metadata = header.pop("__metadata__", None) or {}
    start = 8 + header_size
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = data[start + begin : start + end]
        tensors[name] = _view(raw, entry, f"{path}: {' '.join(name.split())}")
        tensors[name].flags.writeable = False
    return tensors, metadata


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is in its header twice")
    return found


def _view(raw: np.ndarray, entry: dict[str, Any], what: str) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise WeightsError(f"{what} is of type {entry['dtype']}, gptx reads {', '.join(DTYPES)}")
    dtype = np.dtype(DTYPES[entry["dtype"]])
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    try:
        array = raw.view(dtype).reshape(entry["shape"])
    except ValueError as error:  # no numbers in a shape that overflows, or over 64 dimensions
        raise WeightsError(f"{what} has a shape that NumPy does not take ({error})") from None
    return array


def widened(array: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, which loses nothing; any other type as it is."""
    if array.dtype != BFLOAT16:
        return array
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all, see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to: beside `path` first, then, if all went well, in its place in one step.

    Raises
    ------
    StorageError
        It cannot be written (disk full, no such folder, read-only); `path` is as it was.
    """
    path = Path(path)
    if not path.name:
        raise StorageError(f"{path} cannot be written (it is a folder)")
    # A name that nobody can foresee: two writers, or a link laid there, are not in the way.
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, GptxError):
            raise StorageError(f"{path} cannot be written ({error.strerror or error})") from error
        raise
