"""Pointers of git-lfs: small texts that a clone without git-lfs has in place of large files."""

from __future__ import annotations

from pathlib import Path

from gptx.errors import DataError, StorageError

SIGNATURE = b"version https://git-lfs.github.com/spec/v"
MAX_POINTER_BYTES = 1024  # Source: the specification of git-lfs, docs/spec.md


def check_named_files(folder: Path, message: str = "") -> None:
    """Check the content of the files of a folder that an error names; of all without a message.

    Files that no reader needs may be pointers.

    Raises
    ------
    DataError
        One of them is a pointer of git-lfs.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and (not message or path.name in message):
            check_content(path)


def check_content(path: Path) -> None:
    """Open a regular file, and check that it has its content.

    Raises
    ------
    DataError
        It is a pointer of git-lfs.
    StorageError
        It cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(MAX_POINTER_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
    if head.startswith(SIGNATURE) and len(head) <= MAX_POINTER_BYTES:
        raise DataError(
            f"{path} is a git-lfs pointer, expected the content of the file: "
            f"run `git lfs pull` in its folder, or download it again"
        )
