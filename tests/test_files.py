"""gptx.files: which safetensors files are read or refused, and files written whole."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from gptx.errors import StorageError, WeightsError
from gptx.files import atomic_file, atomic_write
from gptx.safetensors_file import DTYPES, read_safetensors, widen_bfloat16
from tests.support.safetensors_bytes import DATA, entry, safetensors, weights_path


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], dict[str, np.ndarray]]:
    """Read a file of the given bytes."""
    path = tmp_path / "file.safetensors"

    def read(data: bytes) -> dict[str, np.ndarray]:
        path.unlink(missing_ok=True)  # an earlier one may still be mapped
        path.write_bytes(data)
        return read_safetensors(path)[0]

    return read


@pytest.fixture
def refuse(read: Any, tmp_path: Path) -> Callable[..., None]:
    """Expect such a file to be refused, in one line that names it."""

    def refuse(data: bytes, says: str = "") -> None:
        with pytest.raises(WeightsError) as caught:
            read(data)
        message = str(caught.value)
        assert str(tmp_path / "file.safetensors") in message
        assert says in message
        assert "\n" not in message

    return refuse


# Reading what is right


BFLOAT16 = {
    0x0000: 0.0,
    0x8000: -0.0,
    0x3F80: 1.0,
    0xC000: -2.0,
    0x3EAB: 0.333984375,
    0x4049: 3.140625,
    0x7F7F: 2.0**127 * (2 - 2**-7),
    0x0080: 2.0**-126,
    0x0001: 2.0**-133,
    0x7F80: np.inf,
    0xFF80: -np.inf,
    0x7FC0: np.nan,
}


def test_bfloat16_becomes_float32_exactly(read: Any) -> None:
    data = struct.pack(f"<{len(BFLOAT16)}H", *BFLOAT16)
    mapped = read(safetensors({"a": entry("BF16", [3, 4], 0, 24)}, data))["a"]
    assert mapped.nbytes == 24
    array = widen_bfloat16(mapped)
    expected = np.array(list(BFLOAT16.values()), np.float32).reshape(3, 4)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(np.signbit(array), np.signbit(expected))


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "BF16"])
def test_types_come_as_they_are(read: Any, dtype: str) -> None:
    kind = np.dtype(DTYPES[dtype])
    expected = np.array([[0, 1], [1, 0], [1, 1]], kind)
    header = {"a": entry(dtype, [3, 2], 0, expected.nbytes)}
    array = read(safetensors(header, expected.tobytes()))["a"]
    assert array.dtype == kind
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("pad", range(8))
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_data_may_lie_anywhere(read: Any, dtype: str, pad: int) -> None:
    """The header's length decides where the data begins, and it need not be a multiple of 8."""
    bits = {"F64": [1.5, -2.0], "F32": [1.5, -2.0], "F16": [1.5, -2.0], "BF16": [0x3FC0, 0xC000]}
    data = np.array(bits[dtype], DTYPES[dtype]).tobytes()
    header = json.dumps({"a": entry(dtype, [2], 0, len(data))}).encode() + b" " * pad
    assert widen_bfloat16(read(safetensors(header, data))["a"]).tolist() == [1.5, -2.0]


@pytest.mark.parametrize(("dtype", "shape"), [("F32", [2]), ("F16", [4]), ("BF16", [4])])
@pytest.mark.parametrize("pad", [0, 1])
def test_arrays_are_read_only(read: Any, dtype: str, shape: list[int], pad: int) -> None:
    """So is what had to be copied, so that nobody writes to weights where it happens to work."""
    header = json.dumps({"a": entry(dtype, shape)}).encode()
    aligned = header + b" " * (-len(header) % 8)
    assert not read(safetensors(aligned + b" " * pad, DATA))["a"].flags.writeable


def test_shapes_without_numbers(read: Any) -> None:
    header = {"scalar": entry(shape=[], end=4), "none": entry(shape=[0, 3], begin=4, end=4)}
    found = read(safetensors(header, DATA[:4]))
    assert (found["scalar"].shape, found["scalar"].item()) == ((), 1.5)
    assert found["none"].shape == (0, 3)


def test_tensors_in_another_order_than_their_data(read: Any) -> None:
    header = {"a": entry(shape=[1], begin=4, end=8), "b": entry(shape=[1], begin=0, end=4)}
    found = read(safetensors(header, DATA))
    assert (found["a"].item(), found["b"].item()) == (-2.0, 1.5)


@pytest.mark.parametrize(
    ("text", "expected"), [('{"k": "v"}', {"k": "v"}), ("{}", {}), ("null", {})]
)
def test_metadata(tmp_path: Path, text: str, expected: dict[str, str]) -> None:
    path = tmp_path / "a.safetensors"
    header = f'{{"__metadata__": {text}, "a": {json.dumps(entry())}}}'
    path.write_bytes(safetensors(header.encode(), DATA))
    tensors, metadata = read_safetensors(path)
    assert list(tensors) == ["a"]
    assert metadata == expected


# Damaged files


def test_every_truncation_is_refused(tmp_path: Path, refuse: Any) -> None:
    whole = weights_path(tmp_path / "micro").read_bytes()
    assert len(whole) < 3000
    for length in range(len(whole)):
        refuse(whole[:length])


def test_anything_after_the_data_is_refused(read: Any, refuse: Any) -> None:
    good = safetensors({"a": entry()}, DATA)
    assert list(read(good)) == ["a"]
    refuse(good + b"\0")


GOOD = json.dumps({"a": entry()}).encode()
BAD_FILES = {
    "empty": b"",
    "no JSON": safetensors(b"<html>404 Not Found</html>", DATA),
    "JSON that ends early": safetensors(GOOD[:-1], DATA),
    "not UTF-8": safetensors(GOOD.replace(b"a", b"\xff", 1), DATA),
    "a list": safetensors([1, 2], DATA),
    "null": safetensors(None, DATA),
    "no header": safetensors(b"", DATA),
    "brackets without end": safetensors(b"[" * 100_000, DATA),
    "objects without end": safetensors(b'{"a":' * 20_000, DATA),
    "a header that is shorter than it says": safetensors(GOOD, DATA, len(GOOD) + 5),
    "a header that is longer than the file": safetensors(GOOD, DATA, 1_000_000),
    "a header of 2^63 bytes": safetensors(GOOD, DATA, 2**63),
    "a header of 2^64 - 1 bytes": safetensors(GOOD, DATA, 2**64 - 1),
    "a header that is longer than it says": safetensors(GOOD, DATA, len(GOOD) - 3),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a pickle": b"PK\x03\x04" + bytes(200),
    "an entry that is a number": safetensors({"a": 5}, DATA),
    "an entry without a shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA),
    "an entry without offsets": safetensors({"a": {"dtype": "F32", "shape": [2]}}, DATA),
    "offsets past the end": safetensors({"a": entry(shape=[4], end=16)}, DATA),
    "offsets that end before they begin": safetensors({"a": entry(begin=8, end=0)}, DATA),
    "negative offsets": safetensors({"a": entry(begin=-8, end=0)}, DATA),
    "offsets that are text": safetensors({"a": entry(begin="0", end="8")}, DATA),
    "huge offsets": safetensors({"a": entry(begin=0, end=2**64)}, DATA),
    "offsets that overlap": safetensors({"a": entry(), "b": entry(begin=4, end=12)}, DATA + DATA),
    "a gap": safetensors({"a": entry(), "b": entry(begin=12, end=20)}, DATA + DATA + DATA),
    "a gap at the start": safetensors({"a": entry(begin=8, end=16)}, DATA + DATA),
    "the same data twice": safetensors({"a": entry(), "b": entry()}, DATA),
    "data that nothing names": safetensors({"a": entry(shape=[1], end=4)}, DATA),
    "a shape that is too small": safetensors({"a": entry(shape=[1])}, DATA),
    "a shape that is too large": safetensors({"a": entry(shape=[3])}, DATA),
    "a negative shape": safetensors({"a": entry(shape=[-2])}, DATA),
    "two negative sizes": safetensors({"a": entry(shape=[-1, -2])}, DATA),
    "a fractional shape": safetensors({"a": entry(shape=[2.0])}, DATA),
    "a shape that overflows": safetensors({"a": entry(shape=[2**62, 2**62])}, DATA),
    "a shape that overflows to its size": safetensors({"a": entry(shape=[2**62 + 2, 4])}, DATA),
    "a shape that is no list": safetensors({"a": entry(shape=2)}, DATA),
    "nothing in a huge shape": safetensors({"a": entry(shape=[0, 2**62], end=0)}),
    "nothing in a larger shape": safetensors({"a": entry(shape=[0, 2**64 - 1], end=0)}),
    "too many dimensions": safetensors({"a": entry(shape=[1] * 70 + [2])}, DATA),
    "metadata that is no text": safetensors({"__metadata__": {"k": 1}, "a": entry()}, DATA),
    "metadata that is a list": safetensors({"__metadata__": ["k"], "a": entry()}, DATA),
    "a key twice in an entry": safetensors(
        GOOD.replace(b'"shape"', b'"shape":[1,2],"shape"'), DATA
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_files(refuse: Any, case: str) -> None:
    refuse(BAD_FILES[case])


@pytest.mark.parametrize("second", [entry(), entry("I32", [1, 2]), entry("F16", [4])])
def test_a_name_twice_is_refused(refuse: Any, second: dict[str, Any]) -> None:
    """The format forbids it, because readers differ in which of the two they take."""
    header = f'{{"a": {json.dumps(entry())}, "a": {json.dumps(second)}}}'
    refuse(safetensors(header.encode(), DATA))


@pytest.mark.parametrize(("dtype", "shape"), [("F8_E4M3", [8]), ("F8_E5M2", [8]), ("F8_E8M0", [8])])
def test_types_that_are_not_read(refuse: Any, dtype: str, shape: list[int]) -> None:
    refuse(safetensors({"wte.weight": entry(dtype, shape)}, DATA), f"wte.weight is of type {dtype}")


@pytest.mark.parametrize("dtype", ["F31", "float32", "f32", ""])
def test_types_that_do_not_exist(refuse: Any, dtype: str) -> None:
    refuse(safetensors({"a": entry(dtype)}, DATA))


def test_a_name_with_a_line_end_stays_in_one_line(refuse: Any) -> None:
    refuse(safetensors({"a\nb": entry("F8_E4M3", [8])}, DATA), "is of type F8_E4M3")


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        read_safetensors(tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.safetensors cannot be read"):
        read_safetensors(tmp_path / "none.safetensors")


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = weights_path(tmp_path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(StorageError, match="cannot be read"):
        read_safetensors(path)


def test_a_file_that_breaks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    path = weights_path(tmp_path)
    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(StorageError, match=r"cannot be read \(Input/output error\)"):
        read_safetensors(path)


# Writing


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "new"
    for data in (b"one", b"", bytes(range(256)) * 100):
        atomic_write(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_takes_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_data_is_on_the_disk_before_it_is_in_its_place(
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


def test_what_fails_while_a_file_is_written_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_and_fail(error: Exception) -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise error

    for error in (StorageError("the source cannot be read"), ValueError("wrong")):
        with pytest.raises(type(error)) as caught:
            write_and_fail(error)
        assert caught.value is error  # it is not of this file
    with pytest.raises(StorageError, match="file cannot be written"):
        write_and_fail(OSError("full"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "none" / "file", tmp_path / "file" / "file", tmp_path):
        with pytest.raises(StorageError, match="cannot be written"):
            atomic_write(path, b"data")
    for name in ("", ".", "/"):
        with pytest.raises(StorageError, match="it is a folder"):
            atomic_write(name, b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        atomic_write(tmp_path / "file", b"data")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
