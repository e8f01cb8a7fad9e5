"""Locks between processes, on a file or a folder."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NOT_SUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def lock(path: Path) -> Iterator[bool]:
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


@contextmanager
def lock_folder(path: Path) -> Iterator[bool]:
    """Lock a folder without a file in it and without a wait; yield False if it is locked already.

    Where folders cannot be locked (Windows, some file systems), yield True.
    """
    if sys.platform == "win32":
        yield True
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)  # releases the lock


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed; return False if it is locked already.

    Where it cannot be locked (Windows, some file systems), return True.
    """
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    return True


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
            if error.errno not in _NOT_SUPPORTED:
                raise
            return False
        return True
