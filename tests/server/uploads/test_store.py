"""The store: names, uploads, checks, publication by rename."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gptx
from gptx.conversions import convert
from gptx.errors import IntegrityError, NotFoundError, ParameterError, WeightsError
from gptx.server.uploads.store import UPLOADS, Store
from gptx.server.uploads.stored_models import (
    MAX_FILES,
    ConflictError,
    DiskFullError,
    LengthError,
    StoredFile,
    TooLargeError,
    WrongOffsetError,
)
from tests.support.conversions import BOTH_WAYS, contents, read_all, source_of, to_format
from tests.support.store_server import check_here, model_files, stored, visible

FILES = {"a.bin": b"0123456789", "b.bin": b"abc"}


def accept(path: Path) -> None:
    """Accept any model."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", check=check_here)


@pytest.fixture
def source(tmp_path: Path) -> dict[str, bytes]:
    return model_files(tmp_path / "source")


def send(store: Store, name: str, files: dict[str, bytes]) -> None:
    """Append all bytes of files."""
    for file, data in files.items():
        store.append(name, file, 0, data)


def test_a_model_appears_when_it_is_published(store: Store, source: dict[str, bytes]) -> None:
    store.begin("m", stored(source))
    send(store, "m", source)
    assert visible(store.root) == {}
    path = store.publish("m")
    assert visible(store.root) == {"m": source}
    assert path == store.path("m") == store.root / "m"
    assert store.model("m").ready
    gptx.load(path)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "/a", "a\\b", ".hidden", "a.", "ä", "a b", "a\n", "con", "NUL.x",
     "com1", "a\0", "%2e%2e", "~", "x" * 97],
)  # fmt: skip
def test_invalid_names(store: Store, name: str) -> None:
    for call in (
        lambda: store.begin(name, stored(FILES)),
        lambda: store.begin("m", stored({name: b""})) if len(name) < 97 else store.drop(name),
        lambda: store.create(name, "a.bin", 1),
        lambda: store.model(name),
        lambda: store.drop(name),
        lambda: store.append(name, "a.bin", 0, b""),
    ):
        with pytest.raises(ParameterError, match=r"the name of the (model|file) is"):
            call()
    assert [path.name for path in store.root.iterdir()] == [UPLOADS]


def test_names_that_differ_in_case_only(store: Store) -> None:
    with pytest.raises(ParameterError, match=r"a\.bin and A\.bin differ in case only"):
        store.begin("m", stored({"a.bin": b"", "A.bin": b""}))
    store.begin("m", stored(FILES))
    with pytest.raises(ConflictError, match="exists as m"):
        store.begin("M", stored(FILES))
    with pytest.raises(ConflictError, match="exists as m"):
        store.create("M", "a.bin")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, f"has 0 files, expected 1 to {MAX_FILES}"),
        ({f"f{i}": StoredFile(0, 0, "0" * 64) for i in range(MAX_FILES + 1)}, "files, expected"),
        ({"a": StoredFile(0, -1, "0" * 64)}, "length -1"),
        ({"a": StoredFile(0, 1, "0" * 63)}, "expected 64 hexadecimal digits"),
        ({"a": StoredFile(0, 1, "A" * 64)}, "expected 64 hexadecimal digits"),
        ({"a": StoredFile(0, 1, None)}, "no SHA-256"),
        ({"a": StoredFile(0, None, "0" * 64)}, "no length"),
    ],
)
def test_invalid_manifests(store: Store, files: dict[str, StoredFile], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        store.begin("m", files)


def test_begin_again_changes_nothing(store: Store) -> None:
    store.begin("m", stored(FILES))
    store.append("m", "a.bin", 0, b"0123")
    again = store.begin("m", stored(FILES))
    assert {name: file.offset for name, file in again.files.items()} == {"a.bin": 4, "b.bin": 0}
    assert (again.offset, again.length, again.complete) == (4, 13, False)


def test_begin_with_other_files_is_a_conflict(store: Store) -> None:
    store.begin("m", stored(FILES))
    with pytest.raises(ConflictError, match="an upload of model m exists, with other files"):
        store.begin("m", stored(FILES | {"a.bin": b"other bytes"}))


def test_an_offset_in_the_past_or_the_future_appends_nothing(store: Store) -> None:
    store.begin("m", stored(FILES))
    assert store.append("m", "a.bin", 0, b"0123") == 4
    for offset in (0, 3, 5):
        with pytest.raises(WrongOffsetError) as caught:
            store.append("m", "a.bin", offset, b"4567")
        assert (caught.value.given, caught.value.offset) == (offset, 4)
    assert store.flush("m", "a.bin").offset == 4
    assert (store.root / UPLOADS / "m" / "a.bin").read_bytes() == b"0123"


def test_bytes_beyond_the_length_are_refused(store: Store) -> None:
    store.begin("m", stored(FILES))
    with pytest.raises(LengthError, match="has 3 bytes, and the request ends at 4"):
        store.append("m", "b.bin", 0, b"abcd")
    assert store.flush("m", "b.bin").offset == 0


def test_an_unknown_file(store: Store) -> None:
    store.begin("m", stored(FILES))
    with pytest.raises(NotFoundError, match="no upload of file 'c'"):
        store.append("m", "c", 0, b"")
    with pytest.raises(NotFoundError, match=r"no file '\.\./m/a\.bin'"):
        store.flush("m", "../m/a.bin")


def test_a_damaged_file_is_deleted(store: Store) -> None:
    store.begin("m", stored(FILES))
    store.append("m", "a.bin", 0, b"0123456780")
    with pytest.raises(IntegrityError, match=r"file a\.bin has SHA-256 [0-9a-f]{64}, expected"):
        store.verify("m", "a.bin")
    assert store.flush("m", "a.bin").offset == 0
    store.append("m", "a.bin", 0, FILES["a.bin"])
    store.verify("m", "a.bin")
    assert store.flush("m", "a.bin").verified


def test_an_incomplete_upload_is_not_published(store: Store, source: dict[str, bytes]) -> None:
    store.begin("m", stored(source))
    store.append("m", "config.json", 0, source["config.json"])
    with pytest.raises(ConflictError, match=r"is not complete \(model\.safetensors\)"):
        store.publish("m")
    with pytest.raises(NotFoundError, match="is not complete"):
        store.path("m")


def test_an_invalid_model_stays_out_of_sight(store: Store, source: dict[str, bytes]) -> None:
    bad = source | {"config.json": b"{}"}
    store.begin("m", stored(bad))
    send(store, "m", bad)
    with pytest.raises(WeightsError, match="the weights do not fit the config") as caught:
        store.publish("m")
    assert str(store.root) not in str(caught.value)
    assert visible(store.root) == {}
    assert store.model("m").error == str(caught.value)
    assert store.begin("m", stored(bad)).error is None  # it is checked again


def test_not_finite_numbers(store: Store, tmp_path: Path) -> None:
    """The default check is `gptx convert --check` in a process of its own."""
    source = model_files(tmp_path / "source")
    data = bytearray(source["model.safetensors"])
    data[-4:] = b"\xff" * 4
    source["model.safetensors"] = bytes(data)
    store = Store(tmp_path / "store")
    store.begin("m", stored(source))
    send(store, "m", source)
    with pytest.raises(WeightsError, match="has a number that is not finite"):
        store.publish("m")
    assert visible(store.root) == {}


@pytest.mark.parametrize("format", BOTH_WAYS)
def test_models_of_every_format(store: Store, tmp_path: Path, format: str) -> None:
    source = source_of("tiny", tmp_path)
    output = to_format(format, source, tmp_path)
    model = contents(output)
    model.setdefault("config.json", (source / "config.json").read_bytes())  # some need it
    store.begin("m", stored(model))
    send(store, "m", model)
    path = store.publish("m")
    assert path.name == ("m" if output.is_dir() else output.name)
    read_all(path)()


def test_files_without_a_manifest(store: Store, source: dict[str, bytes]) -> None:
    """Like the canister: append each file, then set up."""
    for file, data in source.items():
        store.create("m", file, len(data))
        store.append("m", file, 0, data)
    store.publish("m")
    assert visible(store.root) == {"m": source}
    digests = {name: file.sha256 for name, file in store.model("m").files.items()}
    assert digests == {name: file.sha256 for name, file in stored(source).items()}


def test_a_length_that_becomes_known(store: Store) -> None:
    store.create("m", "a.bin")
    store.append("m", "a.bin", 0, b"0123")
    with pytest.raises(LengthError, match="expected at least 4"):
        store.set_length("m", "a.bin", 3)
    store.set_length("m", "a.bin", 10)
    with pytest.raises(LengthError, match="is 11, expected 10"):
        store.set_length("m", "a.bin", 11)
    found = store.flush("m", "a.bin")
    assert (found.offset, found.length, found.complete) == (4, 10, False)


def test_a_file_begins_again_from_its_start(store: Store) -> None:
    store.create("m", "a.bin", 10)
    store.append("m", "a.bin", 0, b"0123")
    store.create("m", "a.bin", 5)
    assert store.flush("m", "a.bin") == StoredFile(0, 5)


def test_a_file_that_the_manifest_does_not_have(store: Store) -> None:
    store.begin("m", stored(FILES))
    for call in (lambda: store.create("m", "c", 3), lambda: store.create("m", "b.bin", 4)):
        with pytest.raises(ConflictError, match="has no such file"):
            call()
    assert store.create("m", "b.bin", 3) == stored(FILES)["b.bin"]


def test_the_limit_of_a_model(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", max_bytes=12)
    with pytest.raises(TooLargeError, match="model m has 13 bytes, expected at most 12"):
        store.begin("m", stored(FILES))
    store.create("m", "a.bin", 10)
    with pytest.raises(TooLargeError):
        store.create("m", "b.bin", 3)
    store.create("m", "b.bin")
    store.append("m", "b.bin", 0, b"ab")
    with pytest.raises(TooLargeError):
        store.append("m", "b.bin", 2, b"c")
    with pytest.raises(TooLargeError):
        store.set_length("m", "b.bin", 3)


def test_a_model_of_exactly_the_limit(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", max_bytes=13)
    store.begin("m", stored(FILES))
    store.create("n", "a.bin", 13)
    store.create("n", "b.bin")
    store.begin("o", stored({f"f{i}": b"" for i in range(MAX_FILES)}))


def test_the_free_space_for_the_rest_of_a_file(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create("m", "a.bin")
    store.append("m", "a.bin", 0, b"0123")
    store.create("m", "b.bin")
    free = SimpleNamespace(free=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(DiskFullError, match="needs 6 bytes"):
        store.set_length("m", "a.bin", 10)
    free.free = 6
    store.set_length("m", "a.bin", 10)


def test_a_model_larger_than_the_free_space(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12))
    with pytest.raises(DiskFullError, match="needs 13 bytes, and the disk has 12"):
        store.begin("m", stored(FILES))
    assert store.models() == []


def test_a_disk_that_becomes_full(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store keeps the part that was written, and its offset is that of the file."""
    write = os.write

    def fill(descriptor: int, data: memoryview) -> int:
        if len(data) < 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:4])

    store.begin("m", stored(FILES))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill)
        with pytest.raises(DiskFullError, match="No space left"):
            store.append("m", "a.bin", 0, FILES["a.bin"])
    assert store.flush("m", "a.bin").offset == 4
    store.append("m", "a.bin", 4, FILES["a.bin"][4:])
    store.verify("m", "a.bin")


def test_a_new_store_object_continues(store: Store, source: dict[str, bytes]) -> None:
    store.begin("m", stored(source))
    half = len(source["model.safetensors"]) // 2
    store.append("m", "config.json", 0, source["config.json"])
    store.append("m", "model.safetensors", 0, source["model.safetensors"][:half])
    again = Store(store.root, check=check_here)
    assert again.model("m").files["model.safetensors"].offset == half
    again.append("m", "model.safetensors", half, source["model.safetensors"][half:])
    again.publish("m")
    assert visible(store.root) == {"m": source}
    assert Store(store.root).path("m") == store.root / "m"


def test_an_abandoned_upload_expires(store: Store, source: dict[str, bytes]) -> None:
    def grow_old(name: str) -> None:
        for path in (store.root / UPLOADS / name).iterdir():
            os.utime(path, (0, 0))

    for name in ("old", "new", "complete", "other"):
        store.begin(name, stored(source))
    send(store, "complete", source)
    grow_old("complete")
    grow_old("old")
    store.append("old", "config.json", 0, source["config.json"][:1])  # the last byte counts
    Store(store.root)
    assert [one.name for one in store.models()] == ["complete", "new", "old", "other"]
    grow_old("old")
    store.begin("old", stored(source))  # it continues
    assert store.model("old").offset == 1
    store.create("another", "a.bin")
    assert [one.name for one in store.models()] == ["another", "complete", "new", "other"]
    grow_old("another")
    store.create("another", "b.bin")
    grow_old("new")
    store.begin("further", stored(source))
    assert [one.name for one in store.models()] == ["another", "complete", "further", "other"]
    grow_old("further")
    Store(store.root, upload_seconds=1e12)
    assert store.model("further")
    Store(store.root)
    assert [one.name for one in store.models()] == ["another", "complete", "other"]
    assert not list((store.root / UPLOADS).glob(".tmp-*"))


def test_a_published_model(store: Store, source: dict[str, bytes]) -> None:
    store.begin("m", stored(source))
    send(store, "m", source)
    path = store.publish("m")
    assert store.publish("m") == path
    assert store.begin("m", stored(source)).ready
    found = store.flush("m", "config.json")
    assert (found.complete, found.verified) == (True, True)
    with pytest.raises(ConflictError, match="model m exists, with other files"):
        store.begin("m", stored(FILES))
    with pytest.raises(ConflictError, match="model m exists"):
        store.create("m", "a.bin")
    with pytest.raises(NotFoundError):
        store.append("m", "config.json", len(source["config.json"]), b"x")
    assert [(model.name, model.ready) for model in store.models()] == [("m", True)]


def test_a_model_that_was_copied_by_hand(store: Store, tmp_path: Path) -> None:
    source = model_files(store.root / "m")
    assert store.path("m") == store.root / "m"
    assert store.model("m").files.keys() == source.keys()
    convert(store.root / "m", tmp_path / "model.gguf")
    (store.root / "n").mkdir()
    (tmp_path / "model.gguf").rename(store.root / "n" / "model.gguf")
    assert store.path("n") == store.root / "n" / "model.gguf"


def test_two_models_in_one_folder(store: Store, tmp_path: Path) -> None:
    convert("shakespeare", tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    files = {"a.gguf": data, "b.gguf": data}
    store.begin("m", stored(files))
    send(store, "m", files)
    with pytest.raises(WeightsError, match=r"m has the models: a\.gguf, b\.gguf, expected one"):
        store.publish("m")


@pytest.mark.parametrize("published", [False, True])
def test_drop(tmp_path: Path, source: dict[str, bytes], published: bool) -> None:
    store = Store(tmp_path / "store", check=accept)
    store.begin("m", stored(source))
    send(store, "m", source)
    if published:
        store.publish("m")
    store.drop("m")
    assert store.models() == []
    assert [path.name for path in (store.root / UPLOADS).iterdir()] == [".lock"]
    with pytest.raises(NotFoundError):
        store.drop("m")
    assert store.begin("m", stored(source)).offset == 0


def test_a_crash_while_files_are_deleted(
    store: Store, source: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store never shows a part of a model, and the next start deletes the rest."""
    store.begin("m", stored(source))
    send(store, "m", source)
    store.publish("m")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        store.drop("m")
    assert store.models() == []
    assert len(list((store.root / UPLOADS).iterdir())) == 2
    Store(store.root)
    assert [path.name for path in (store.root / UPLOADS).iterdir()] == [".lock"]


def test_drop_of_a_link_leaves_its_target(store: Store, tmp_path: Path) -> None:
    source = model_files(tmp_path / "elsewhere")
    (store.root / "m").symlink_to(tmp_path / "elsewhere")
    assert store.model("m").ready
    store.drop("m")
    assert store.models() == []
    assert visible(tmp_path)["elsewhere"] == source


def test_drop_file(store: Store) -> None:
    store.begin("m", stored(FILES))
    store.append("m", "b.bin", 0, b"abc")
    store.verify("m", "b.bin")
    store.drop_file("m", "b.bin")
    assert store.flush("m", "b.bin") == stored(FILES)["b.bin"]
    store.create("n", "a.bin", 3)
    store.drop_file("n", "a.bin")
    assert store.model("n").files == {}


def test_an_upload_that_is_dropped_during_its_check(
    tmp_path: Path, source: dict[str, bytes]
) -> None:
    """A later upload under the same name is not published by the check of the first."""

    def drop(path: Path) -> None:
        store.drop("m")
        store.begin("m", stored(source))

    store = Store(tmp_path / "store", check=drop)
    store.begin("m", stored(source))
    send(store, "m", source)
    with pytest.raises(NotFoundError, match="is not complete"):
        store.publish("m")
    assert visible(store.root) == {}


@pytest.mark.parametrize("again", [False, True])
def test_an_upload_that_is_dropped_while_its_sha256_is_computed(
    store: Store, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    digest = hashlib.file_digest

    def drop(*args: Any) -> Any:
        if again:
            store.drop("m")
            store.begin("m", stored(FILES))
            store.append("m", "a.bin", 0, FILES["a.bin"])
        else:
            store.drop_file("m", "a.bin")
        return digest(*args)

    store.begin("m", stored(FILES))
    store.append("m", "a.bin", 0, FILES["a.bin"])
    monkeypatch.setattr(hashlib, "file_digest", drop)
    with pytest.raises(NotFoundError, match="was deleted during its check"):
        store.verify("m", "a.bin")
    assert not store.flush("m", "a.bin").verified


def test_a_link_in_place_of_a_partial_file_is_not_followed(store: Store, tmp_path: Path) -> None:
    store.begin("m", stored(FILES))
    (tmp_path / "outside").write_bytes(b"")
    partial = store.root / UPLOADS / "m" / "a.bin"
    partial.unlink()
    partial.symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="cannot be written"):
        store.append("m", "a.bin", 0, b"0")
    assert (tmp_path / "outside").read_bytes() == b""


def test_an_empty_file(store: Store, source: dict[str, bytes]) -> None:
    files = source | {"notes.txt": b""}
    store.begin("m", stored(files))
    send(store, "m", source)
    store.publish("m")
    assert visible(store.root) == {"m": files}
