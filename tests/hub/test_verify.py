"""gptx.hub.verify: hashes and sizes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gptx.hub.verify import matches

# The SHA-1 that `git hash-object` prints for a file with "hello\n".
GIT_HELLO = "ce013625030ba8dba906f756967f9e9ca394464a"


def test_hashes(tmp_path: Path) -> None:
    path = tmp_path / "hello"
    path.write_bytes(b"hello\n")
    sha256 = hashlib.sha256(b"hello\n").hexdigest()
    for etag in (GIT_HELLO, sha256):
        assert matches(path, etag, 6)
        assert matches(path, etag, None)
        assert not matches(path, etag, 7)
        assert not matches(path, etag[::-1], 6)


def test_etag_that_is_no_hash(tmp_path: Path) -> None:
    path = tmp_path / "hello"
    path.write_bytes(b"hello\n")
    assert matches(path, "123-456", 6)
    assert not matches(path, "123-456", 5)
