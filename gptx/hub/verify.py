"""Check the content of a file against the hash that the Hub promises."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_SHA256 = re.compile("[0-9a-f]{64}")  # of a file in Large File Storage
_GIT_SHA1 = re.compile("[0-9a-f]{40}")  # of any other file


def matches(path: Path, etag: str, size: int | None) -> bool:
    """Compare a file with its ETag and its size in bytes.

    Parameters
    ----------
    etag
        SHA-256 of the content, or the SHA-1 of the git blob. The Hub sends no other kind; a mirror
        may, and then only the size is compared.
    size
        None if unknown.
    """
    actual_size = path.stat().st_size
    if size is not None and size != actual_size:
        return False
    if _SHA256.fullmatch(etag):
        hasher = hashlib.sha256()
    elif _GIT_SHA1.fullmatch(etag):
        hasher = hashlib.sha1(b"blob %d\0" % actual_size, usedforsecurity=False)
    else:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hasher).hexdigest() == etag
