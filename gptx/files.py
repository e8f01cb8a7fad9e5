"""Atomic writing of files and folders."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gptx.errors import GptxError, StorageError


def create(path: str | Path) -> BinaryIO:
    """Open a new file for writing; a file that exists is an error."""
    return open(path, "xb")


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that replaces it at the end of the context.

    Raises
    ------
    StorageError
        The file cannot be written (disk full, missing folder, read-only); `path` is unchanged.
    """
    with atomic_path(path) as temporary, create(temporary) as file:
        yield file


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; its file or folder replaces `path` at the end.

    An error or a crash leaves the old file or folder unchanged.

    Raises
    ------
    StorageError
        The path cannot be written (disk full, missing folder, read-only), or it is no regular file
        or folder: a device, FIFO or socket is never replaced.
    """
    if not Path(path).name:
        raise StorageError(f"{path} cannot be written (it is a folder)")
    check_replaceable(path)
    path = Path(os.path.realpath(path))  # a link stays, its target is replaced
    # Random: two writers use different names, and no link can be placed there in advance.
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    try:
        yield temporary
        _flush(temporary)
        check_replaceable(path)  # again: the content took time to write
        if path.is_dir() and temporary.is_dir():
            exchange(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and not isinstance(error, GptxError):
            raise StorageError(f"{path} cannot be written ({error.strerror or error})") from error
        raise
    finally:
        _remove(temporary)  # after an error the new content, after an exchange the old


_KINDS = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def check_replaceable(path: str | Path) -> None:
    """Raise StorageError if a path, or the target of its links, is no regular file or folder.

    A path that does not exist can be written, and so can the missing target of a link. The root of
    a mounted file system cannot: a rename does not cross file systems.
    """
    try:
        mode = os.stat(path).st_mode  # not of the real path: a link in /proc may have none
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror or error})") from error
    kind = _KINDS.get(stat.S_IFMT(mode))
    if kind is not None:
        raise StorageError(f"{path} is {kind}, expected a regular file: give another name")
    if stat.S_ISDIR(mode) and os.path.ismount(os.path.realpath(path)):
        raise StorageError(f"{path} is a mount point: give a folder in it")


def check_writable(path: str | Path) -> None:
    """Raise StorageError if a file cannot be written; for a call before long work.

    Only the write itself finds a full disk.
    """
    check_replaceable(path)
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise StorageError(f"{path or repr(path)} is a folder, expected the name of a file")
    if not real.parent.is_dir():
        raise StorageError(f"{path} cannot be written (its folder does not exist)")
    if not os.access(real.parent, os.W_OK):
        raise StorageError(f"{path} cannot be written (its folder is read-only)")


def _flush(path: Path) -> None:
    """Flush a file, or the files of a folder and of those in it, to the disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_dir():
            continue
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def exchange(a: Path, b: Path) -> None:
    """Exchange two folders: atomically where the system can (Linux, macOS).

    Elsewhere it takes three renames. A crash between them leaves both folders complete, the old
    one under another name.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    old, new = os.fsencode(a.absolute()), os.fsencode(b.absolute())
    folder = -1  # of relative paths
    swap = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    for name in ("renameat2", "renameatx_np"):
        if (rename := getattr(libc, name, None)) is not None:
            if rename(folder, old, folder, new, ctypes.c_uint(swap)) == 0:
                return
            break  # not supported by this file system
    aside = a.with_name(a.name + ".old")
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except BaseException:
        os.rename(aside, b)
        raise
    os.rename(aside, a)
