"""gptx.files: atomic writing."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from gptx.errors import StorageError
from gptx.files import (
    atomic_file,
    atomic_path,
    atomic_write,
    check_replaceable,
    check_writable,
    exchange,
)


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


def make_socket(path: Path) -> None:
    # The length of a socket's path is limited, and a relative one is short.
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def make_device(path: Path) -> None:
    """Make a null device."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except OSError as error:
        pytest.skip(f"needs the right to make devices: {error}")


SPECIAL_FILES = [
    pytest.param(getattr(os, "mkfifo", None), "a FIFO", id="FIFO"),
    pytest.param(make_socket, "a socket", id="socket"),
    pytest.param(make_device, "a device", id="device"),
]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX files")


@posix
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "link"])
@pytest.mark.parametrize(("make", "kind"), SPECIAL_FILES)
def test_a_special_file_is_never_replaced(
    tmp_path: Path, make: Callable[[Path], None], kind: str, linked: bool
) -> None:
    special, link = tmp_path / "special", tmp_path / "link"
    make(special)
    before = special.lstat()
    if linked:
        link.symlink_to(special)
    path = link if linked else special
    with pytest.raises(StorageError) as caught:
        atomic_write(path, b"data")
    assert str(caught.value) == f"{path} is {kind}, expected a regular file: give another name"
    assert caught.value.exit_code == 74
    assert os.path.samestat(special.lstat(), before)
    assert stat.S_IFMT(special.lstat().st_mode) == stat.S_IFMT(before.st_mode)
    assert set(tmp_path.iterdir()) == {special, path}


@posix
def test_a_fifo_that_appears_during_the_write_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write() -> None:
        with atomic_file(path) as file:
            file.write(b"data")
            os.mkfifo(path)

    with pytest.raises(StorageError, match="is a FIFO"):
        write()
    assert list(tmp_path.iterdir()) == [path]
    assert path.is_fifo()


@posix
@pytest.mark.parametrize("name", ["/dev/null", "/dev/stdout", "/dev/full"])
def test_devices_of_the_system_are_refused(name: str) -> None:
    if not os.path.exists(name):
        pytest.skip("not on this system")
    if stat.S_ISREG(os.stat(name).st_mode):
        pytest.skip("standard output is a file")
    with pytest.raises(StorageError, match="expected a regular file"):
        check_replaceable(name)  # not a write: as root, a fault would replace the device


@posix
@pytest.mark.parametrize("old", [b"old", None], ids=["file", "dangling"])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, old: bytes | None) -> None:
    target, link, second = (tmp_path / name for name in ("target", "link", "second"))
    if old is not None:
        target.write_bytes(old)
    link.symlink_to("target")
    second.symlink_to(link)
    atomic_write(second, b"new")
    assert second.is_symlink()
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 3


@posix
def test_a_circle_of_links_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "circle"
    path.symlink_to("circle")
    with pytest.raises(StorageError, match="cannot be written"):
        atomic_write(path, b"data")
    assert path.is_symlink()


@posix
def test_a_mount_point_is_refused_before_the_content_is_written() -> None:
    mount = Path("/dev")  # of which tests write nothing
    if not mount.is_mount():
        pytest.skip("/dev is no mount point here")
    context = atomic_path(mount)
    with pytest.raises(StorageError, match="is a mount point: give a folder in it"):
        context.__enter__()


def write_folder(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text(text)


def test_a_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a path relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    for path, text in ((tmp_path / "folder", "one"), (Path("folder"), "two")):
        write_folder(path, text)
        assert (tmp_path / "folder" / "file").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path / "a", tmp_path / "b"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: (path / "file").read_text() for path in folder.iterdir()}


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="needs the system call")
def test_folders_are_exchanged_by_one_system_call(
    tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.rename", pytest.fail)
    exchange(*folders)
    assert contents(tmp_path) == {"a": "b", "b": "a"}


@pytest.mark.parametrize("failing", [None, "a", "b"])
def test_folders_are_exchanged_without_the_system_call(
    tmp_path: Path,
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    failing: str | None,
) -> None:
    """A rename that fails leaves both folders as they were."""
    real = os.rename

    def rename(source: Path, destination: Path) -> None:
        if source.name == failing:
            raise OSError(errno.EACCES, "Permission denied")
        real(source, destination)

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: None)  # a C library without that function
    monkeypatch.setattr("os.rename", rename)
    if failing is None:
        exchange(*folders)
        assert contents(tmp_path) == {"a": "b", "b": "a"}
    else:
        with pytest.raises(OSError, match="Permission denied"):
            exchange(*folders)
        assert contents(tmp_path) == {"a": "a", "b": "b"}


def test_an_old_folder_that_cannot_be_removed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> NoReturn:
        raise OSError(errno.EACCES, "Permission denied")

    write_folder(tmp_path / "folder", "one")
    with monkeypatch.context() as patch:
        patch.setattr("os.rmdir", fail)
        write_folder(tmp_path / "folder", "two")
    assert (tmp_path / "folder" / "file").read_text() == "two"


def test_a_file_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").write_bytes(b"old")
    for path in (tmp_path / "new", tmp_path / "old"):
        check_writable(path)
    for path, fault in (
        (tmp_path, "is a folder, expected the name of a file"),
        ("", "'' is a folder, expected the name of a file"),
        (tmp_path / "none" / "file", "cannot be written (its folder does not exist)"),
    ):
        with pytest.raises(StorageError, match=re.escape(fault)):
            check_writable(path)
    monkeypatch.setattr("os.access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(
        StorageError, match=re.escape("cannot be written (its folder is read-only)")
    ):
        check_writable(tmp_path / "new")
