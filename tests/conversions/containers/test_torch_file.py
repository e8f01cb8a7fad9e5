"""gptx.conversions.containers.torch_file: files of torch.save, valid and damaged."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.conversions.containers import torch_file
from gptx.conversions.containers.torch_file import TorchFile, is_torch
from gptx.errors import StorageError, WeightsError
from tests.support.files.torch_files import (
    CONTAINERS,
    MACHINE,
    MAGIC,
    VERSION,
    Pickle,
    View,
    legacy_bytes,
    view,
    zip_bytes,
    zip_of,
)

Open = Callable[[bytes], TorchFile]
NUMBERS = np.arange(24, dtype=np.float32)
VALUE = {"w": View(NUMBERS, 2, (3, 4), (6, 1)), "b": view(np.ones(3)), "epoch": 3}


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Return a function that opens a file of given bytes."""

    def open_file(data: bytes) -> TorchFile:
        (tmp_path / "m.pt").write_bytes(data)
        return TorchFile(tmp_path / "m.pt")

    return open_file


@pytest.mark.parametrize("container", CONTAINERS)
def test_tensors_are_views_of_their_storages(container: str, opened: Open) -> None:
    data = CONTAINERS[container](VALUE)
    file = opened(data)
    assert file.size == len(data)
    tensors = file.tensors(file.value)
    assert list(tensors) == ["w", "b"]
    w = tensors["w"]
    assert (w.shape, w.dtype, w.nbytes) == ((3, 4), np.float32, 48)
    np.testing.assert_array_equal(w.reader("w")(), NUMBERS.reshape(4, 6)[:3, 2:])
    np.testing.assert_array_equal(tensors["b"].reader("b")(), np.ones(3))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (zip_bytes(VALUE), True),
        (legacy_bytes(VALUE), True),
        (zip_bytes(VALUE, folder="n" * 300), True),
        (b"\x80\x05\x95" + bytes(8) + MAGIC[2:], True),  # protocol 5
        (b"\x80\x02}.", False),
        (b"\x81" + MAGIC[1:], False),
        (bytes(40) + MAGIC, False),
        (b"PK\3\4" + bytes(700), False),
        (b"PK\3\5/data.pkl", False),
        (b"", False),
    ],
)
def test_detection(data: bytes, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(data)
    assert is_torch(tmp_path / "m.pt") == expected


def test_an_archive_is_found_by_its_directory(tmp_path: Path) -> None:
    """PyTorch of other versions stores the pickle after other files."""
    data = zip_of(Pickle({}).code, {"x": np.zeros(1000)})
    moved = data.replace(b"archive/data.pkl", b"archive/dataXpkl", 1)
    (tmp_path / "m.pt").write_bytes(moved)
    assert is_torch(tmp_path / "m.pt")


def test_a_missing_file(tmp_path: Path) -> None:
    assert not is_torch(tmp_path / "m.pt")
    with pytest.raises(StorageError):
        TorchFile(tmp_path / "m.pt")


def test_a_message_has_the_path_once(opened: Open, tmp_path: Path) -> None:
    path = str(tmp_path / "m.pt")
    for data, expected in (
        (MAGIC + b"\x80\x02N.", f"{path} cannot be read: its start is not that of a PyTorch file"),
        (zip_of(b"\x80\x02", {}), f"{path} cannot be read: its pickle is truncated"),
        (zip_bytes(VALUE)[:-1], f"{path} is damaged or not an archive"),
    ):
        with pytest.raises(WeightsError) as caught:
            opened(data)
        assert str(caught.value).startswith(expected)
        assert str(caught.value).count(path) == 1


# Archives


def test_archives_with_another_number_of_pickles(opened: Open) -> None:
    with pytest.raises(WeightsError, match=r"has 0 files data\.pkl, expected one"):
        opened(zip_bytes({}).replace(b"data.pkl", b"data.pkk"))


def test_a_program_of_torchscript_is_named(opened: Open, tmp_path: Path) -> None:
    """It has compressed files, too."""
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl"):
            archive.writestr(f"m/{name}", b"text" * 9)
    with pytest.raises(WeightsError, match="it is a program of TorchScript: save the model's"):
        opened((tmp_path / "m.pt").read_bytes())


def test_a_storage_that_is_missing_or_of_another_size(opened: Open) -> None:
    pickle = Pickle(VALUE)
    assert opened(zip_of(pickle.code, pickle.storages)).value["epoch"] == 3
    for change in ({"1": np.zeros(4, np.float32)}, {"1": np.zeros(2, np.float32)}):
        with pytest.raises(WeightsError, match="a storage of its tensors is missing or has"):
            opened(zip_of(pickle.code, pickle.storages | change))
    with pytest.raises(WeightsError, match="a storage of its tensors is missing or has"):
        opened(zip_of(pickle.code, {"0": pickle.storages["0"]}))


def test_a_pickle_that_is_too_long_is_not_read(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, n = zip_bytes(VALUE), len(Pickle(VALUE).code)
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", n)
    assert opened(data).value["epoch"] == 3
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", n - 1)
    with pytest.raises(WeightsError, match=f"data.pkl has {n} bytes, expected at most {n - 1}"):
        opened(data)


def test_checksums(opened: Open) -> None:
    """A changed pickle is refused; a storage is checked at its first read only."""
    data = zip_bytes(VALUE)
    changed = data.replace(b"epoch", b"apoch", 1)
    with pytest.raises(WeightsError, match=r"data\.pkl is damaged \(its CRC-32 differs\)"):
        opened(changed)
    at = data.index(NUMBERS.tobytes())
    file = opened(data[: at + 95] + b"\x99" + data[at + 96 :])
    tensors = file.tensors(file.value)
    assert tensors["b"].reader("b")().sum() == 3
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"tensor w is damaged \(its CRC-32 differs\)"):
            tensors["w"].reader("w")()


def test_a_file_without_checksums(opened: Open) -> None:
    """PyTorch can leave them out: they are 0."""
    data = zip_bytes(VALUE)
    at = data.index(NUMBERS.tobytes())
    entry = data.rindex(b"archive/data/0") - 46 + 16
    data = data[:entry] + bytes(4) + data[entry + 4 :]
    file = opened(data[: at + 95] + b"\x41" + data[at + 96 :])
    assert file.tensors(file.value)["w"].reader("w")().shape == (3, 4)


def test_numbers_of_a_big_endian_machine(opened: Open) -> None:
    file = opened(zip_bytes(VALUE, order="big"))
    found = file.tensors(file.value)["w"].reader("w")()
    np.testing.assert_array_equal(found, NUMBERS.reshape(4, 6)[:3, 2:])


# Files of pickles in a row


def parts(**changes: bytes) -> bytes:
    """Return a file of one storage of three numbers, with some parts replaced."""
    pickle = Pickle({"b": view(np.ones(3))}, legacy=True)
    found = {"magic": MAGIC, "version": VERSION, "machine": MACHINE, "value": pickle.code}
    found |= {"keys": Pickle(["0"]).code, "size": struct.pack("<q", 3)}
    found |= {"numbers": np.ones(3, np.float32).tobytes()}
    return b"".join((found | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": Pickle(5).code}, "its start is not that of a PyTorch file"),
        ({"version": Pickle(1002).code}, "its start is not that of a PyTorch file"),
        ({"version": Pickle("1001").code}, "its start is not that of a PyTorch file"),
        ({"keys": Pickle([]).code}, "its list of storages is invalid"),
        ({"keys": Pickle({"0": 1}).code}, "its list of storages is invalid"),
        ({"keys": Pickle(["1"]).code}, "its list of storages is invalid"),
        ({"keys": Pickle([0]).code}, "its list of storages is invalid"),
        ({"keys": Pickle([[]]).code}, "its list of storages is invalid"),
        ({"keys": Pickle(["0", "0"]).code}, "its list of storages is invalid"),
        ({"size": struct.pack("<q", 2)}, "a storage has 2 numbers, its tensors need 3"),
        ({"numbers": bytes(11)}, "bytes, expected"),
        ({"numbers": bytes(13)}, "bytes, expected"),
        ({"size": b"", "numbers": b""}, "is truncated or damaged"),
    ],
)
def test_invalid_parts_are_refused(opened: Open, changes: dict[str, Any], message: str) -> None:
    assert opened(parts()).value["b"].shape == (3,)
    with pytest.raises(WeightsError, match=message):
        opened(parts(**changes))


def test_one_storage_cannot_be_listed_twice(opened: Open) -> None:
    pickle = Pickle(VALUE, legacy=True)
    head = MAGIC + VERSION + MACHINE + pickle.code + Pickle(["0", "0"]).code
    numbers = struct.pack("<q", 24) + NUMBERS.tobytes()
    with pytest.raises(WeightsError, match="its list of storages is invalid"):
        opened(head + numbers * 2)


# Dicts and names


def test_dicts_are_found_by_their_keys(opened: Open) -> None:
    value = {"a": {"x": 1, "in": {"x": 2}}, "b": {"c": {"x": 3, "d": {"x": 4}}}, "l": [{"x": 5}]}
    file = opened(zip_bytes(value))
    assert list(file.find_dicts(lambda found: "x" in found)) == ["a", "b.c"]
    assert file.find_dicts(lambda found: found.get("x") == 4) == {"b.c.d": {"x": 4}}
    assert list(file.find_dicts(lambda found: True)) == [""]


def test_a_dict_of_several_keys_is_found_once(opened: Open) -> None:
    inner = b"}X\1\0\0\0xK\1s"
    code = b"\x80\x02}(X\1\0\0\0a" + inner + b"q\1X\1\0\0\0bh\1u."
    file = opened(zip_of(code, {}))
    assert list(file.find_dicts(lambda found: "x" in found)) == ["a"]


@pytest.mark.parametrize("name", ["ä", "a\n", "\x7f"])
def test_an_invalid_name_is_refused(name: str, opened: Open) -> None:
    file = opened(zip_bytes({name: view(np.ones(3))}))
    with pytest.raises(WeightsError, match="a tensor has an invalid name"):
        file.tensors(file.value)


def test_a_tensor_that_overlaps_itself_is_refused(opened: Open) -> None:
    value = {"rows": View(NUMBERS, 0, (25, 1), (0, 1)), "one": View(NUMBERS, 0, (1, 24), (0, 1))}
    file = opened(zip_bytes(value))
    tensors = file.tensors(file.value)
    assert tensors["one"].reader("one")().shape == (1, 24)
    with pytest.raises(WeightsError, match="tensor rows overlaps itself"):
        tensors["rows"].reader("rows")
