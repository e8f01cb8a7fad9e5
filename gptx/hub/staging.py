"""Partial downloads: one process at a time writes, and a later one resumes."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptx.file_lock import lock
from gptx.files import check_replaceable


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
    with lock(lock_file) as locked:
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
