"""gptx.files: atomic writing."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from gptx.errors import StorageError
from gptx.files import atomic_file, atomic_write


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "new"
    for data in (b"one", b"", bytes(range(256)) * 100):
        atomic_write(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    atomic_write("new", b"data")
    assert (tmp_path / "new").read_bytes() == b"data"


@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "builtins.open"])
def test_a_failed_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, old: bytes | None
) -> None:
    def full(*args: Any, **options: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        with pytest.raises(StorageError) as caught:
            atomic_write(path, b"new")
    assert str(caught.value) == f"{path} cannot be written (No space left on device)"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"file": old} if old else {})


def test_an_interrupted_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> NoReturn:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_the_data_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real: dict[str, Any] = {"fsync": os.fsync, "replace": os.replace}

    def called(name: str, *args: Any) -> None:
        calls.append(name)
        real[name](*args)

    for name in real:
        monkeypatch.setattr(os, name, partial(called, name))
    atomic_write(tmp_path / "file", b"data")
    assert calls == ["fsync", "replace"]


def test_an_error_in_the_context_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_and_fail(error: Exception) -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise error

    for error in (StorageError("the source cannot be read"), ValueError("wrong")):
        with pytest.raises(type(error)) as caught:
            write_and_fail(error)
        assert caught.value is error  # its cause is not this file
    with pytest.raises(StorageError, match="file cannot be written"):
        write_and_fail(OSError("full"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "none" / "file", tmp_path / "file" / "file", tmp_path):
        with pytest.raises(StorageError, match="cannot be written"):
            atomic_write(path, b"data")
    for name in ("", ".", "/"):
        with pytest.raises(StorageError, match="it is a folder"):
            atomic_write(name, b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        atomic_write(tmp_path / "file", b"data")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
