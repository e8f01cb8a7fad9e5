"""Partial downloads: one process at a time writes, and a later one resumes."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptx.files import check_replaceable

_LOCKS_NOT_SUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def staging(path: Path, lock_file: Path) -> Iterator[Path]:
    """Reserve a path beside `path` for a partial download; wait for other processes.

    The caller publishes the download with `os.replace(partial, path)`. The next process resumes
    a partial download that remains.

    Parameters
    ----------
    path
        Published path of a file or a folder.
    lock_file
        File to lock meanwhile. huggingface_hub locks the same files in the same way.

    Yields
    ------
    Path
        `path` with the suffix ".incomplete". On a file system without locks a unique name, which
        no other process writes to and none resumes.
    """
    for folder in (path.parent, lock_file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(f"{path.name}.incomplete")
    for file in (path, incomplete, lock_file):
        check_replaceable(file)
    with _lock(lock_file) as locked:
        if locked:
            yield incomplete
            return
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.incomplete")
        try:
            yield partial
        finally:
            remove(partial)


def remove(path: Path) -> None:
    """Delete a file or a folder; ignore errors."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Lock a file exclusively; yield False if the file system does not support locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o664)  # other users wait for it, too
        try:
            locked = _acquire(descriptor)
            if not locked or _is_current(descriptor, path):
                yield locked
                return
        finally:
            os.close(descriptor)  # releases the lock


def _is_current(descriptor: int, path: Path) -> bool:
    """Test that no other process has deleted the lock file while this one waited."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


if sys.platform == "win32":
    import msvcrt

    def _acquire(descriptor: int) -> bool:
        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # gives up after 10 s
                return True
            except OSError as error:
                if error.errno != errno.EDEADLK:
                    raise

else:
    import fcntl

    def _acquire(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _LOCKS_NOT_SUPPORTED:
                raise
            return False
        return True
