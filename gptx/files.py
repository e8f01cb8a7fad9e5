"""Files: safetensors mapped into memory, and writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import sys
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
    header, metadata, start = safetensors_header(path)
    try:
        with open(path, "rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = data[start + begin : start + end]
        tensors[name] = _view(raw, entry, f"{path}: {' '.join(name.split())}")
        tensors[name].flags.writeable = False
    return tensors, metadata


def safetensors_header(path: str | Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """The header of a safetensors file, checked.

    Returns
    -------
    entries, metadata, start
        Name -> "dtype", "shape" and "data_offsets" (begin and end, in bytes after `start`); the
        strings of `__metadata__`; and where the data begin.

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
        # the file. What it accepts can be read as it says.
        with safe_open(path, framework="np"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size), object_pairs_hook=_without_doubles)
    except (SafetensorError, ValueError) as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}): fetch it again"
        ) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
    return header, header.pop("__metadata__", None) or {}, 8 + size


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


def create(path: str | Path) -> BinaryIO:
    """Open a new file to write to, where nothing is yet."""
    return open(path, "xb")


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
    with atomic_path(path) as temporary, create(temporary) as file:
        yield file


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path beside `path` for a file or a folder of files, which then takes its place in one step.

    What was there before, a file or a folder, is gone then; if anything goes wrong, it is as it
    was, and so is everything around it.

    Raises
    ------
    StorageError
        It cannot be written (disk full, no such folder, read-only).
    """
    if not Path(path).name:
        raise StorageError(f"{path} cannot be written (it is a folder)")
    path = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
    # A name that nobody can foresee: two writers, or a link laid there, are not in the way.
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    try:
        yield temporary
        _flush(temporary)
        if path.is_dir() and temporary.is_dir():
            exchange(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and not isinstance(error, GptxError):
            raise StorageError(f"{path} cannot be written ({error.strerror or error})") from error
        raise
    finally:
        _remove(temporary)  # what is left: a half-written one, or the one from before


def _flush(path: Path) -> None:
    """Have the disk hold a file, or the files of a folder."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def exchange(a: Path, b: Path) -> None:
    """Let two folders change places: in one step where the system can (Linux, macOS).

    Elsewhere in three: a kill between them leaves both whole, the old one under another name.
    """
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    here, there = os.fsencode(a), os.fsencode(b)
    at_cwd = -100 if sys.platform == "linux" else -2
    swap = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    for name in ("renameat2", "renameatx_np"):
        if (rename := getattr(libc, name, None)) is not None:
            if rename(at_cwd, here, at_cwd, there, ctypes.c_uint(swap)) == 0:
                return
            break  # a file system that cannot
    aside = a.with_name(a.name + ".old")
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except BaseException:
        os.rename(aside, b)
        raise
    os.rename(aside, a)
