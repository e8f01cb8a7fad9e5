"""gptx.lfs_pointer: pointers of git-lfs in place of files."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest

from gptx.conversions.reading import read
from gptx.embedded import EMBEDDED
from gptx.errors import ConfigError, DataError, StorageError
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


@pytest.mark.parametrize(
    "files",
    [
        ("config.json", "model.safetensors"),
        ("config.json+", "pytorch_model.bin"),
        ("gpt2_metadata.json", "gpt2_vocab.bin", "gpt2_weights.bin"),
        ("checkpoint+", "model.ckpt.index", "model.ckpt.data-00000-of-00001"),
        ("model.gguf",),
        ("ckpt.pt",),
        ("gpt2_124M.bin",),
        ("model.mpk",),
        ("model_weights.json",),
        ("model.dat",),
    ],
    ids=lambda files: files[-1],
)
def test_formats(tmp_path: Path, files: tuple[str, ...]) -> None:
    """A name with "+" has its content, the others are pointers; the reader may need any of them."""
    for name in files:
        content = b"{}" if name.endswith("+") else HEAD
        (tmp_path / name.removesuffix("+")).write_bytes(content)
    path = tmp_path if len(files) > 1 else tmp_path / files[0]
    with pytest.raises(DataError, match=f"^{tmp_path}/[^ ]+ is a git-lfs pointer"):
        read(path)


def test_pointers_that_no_reader_needs(tmp_path: Path) -> None:
    copytree(EMBEDDED["shakespeare"], tmp_path, dirs_exist_ok=True)
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md"):
        (tmp_path / name).write_bytes(HEAD)
    assert read(tmp_path)[0] == "safetensors"


def test_an_error_about_another_file_stays(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
    (tmp_path / "pytorch_model.bin").write_bytes(HEAD)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read(tmp_path)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be read .Is a directory"):
        check_content(tmp_path)
