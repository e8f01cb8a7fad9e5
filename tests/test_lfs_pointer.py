"""gptx.lfs_pointer: pointers of git-lfs in place of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptx.errors import DataError, StorageError
from gptx.lfs_pointer import MAX_POINTER_BYTES, check_content

HEAD = b"version https://git-lfs.github.com/spec/v1\n"


def test_pointer(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for size in (len(HEAD), MAX_POINTER_BYTES):
        path.write_bytes(HEAD.ljust(size, b"x"))
        with pytest.raises(DataError, match=f"^{path} is a git-lfs pointer, .* `git lfs pull`"):
            check_content(path)


@pytest.mark.parametrize("content", [b"", b"{}", HEAD.ljust(MAX_POINTER_BYTES + 1), b" " + HEAD])
def test_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    check_content(tmp_path / "x")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be read .Is a directory"):
        check_content(tmp_path)
