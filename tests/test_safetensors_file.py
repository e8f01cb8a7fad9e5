"""gptx.safetensors_file: valid files are mapped and read, damaged ones are refused."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from gptx.errors import StorageError, WeightsError
from gptx.safetensors_file import (
    DTYPES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    SafetensorsFile,
    read_safetensors,
    widen_bfloat16,
    write_safetensors,
)
from tests.support.files.safetensors_bytes import DATA, entry, safetensors, weights_path


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], dict[str, np.ndarray]]:
    """A function that maps and reads a file of the given bytes."""
    path = tmp_path / "file.safetensors"

    def read(data: bytes) -> dict[str, np.ndarray]:
        path.unlink(missing_ok=True)  # an earlier file may still be mapped
        path.write_bytes(data)
        mapped, _ = read_safetensors(path)
        file = SafetensorsFile(path)
        for name, array in mapped.items():
            copy = file.read(name)
            assert (copy.dtype, copy.shape) == (array.dtype, array.shape)
            assert copy.tobytes() == array.tobytes()
        return mapped

    return read


@pytest.fixture
def expect_error(read: Any, tmp_path: Path) -> Callable[..., None]:
    """A function that expects an error for such a file, in one line with its path."""

    def expect_error(data: bytes, expected: str = "") -> None:
        with pytest.raises(WeightsError) as caught:
            read(data)
        message = str(caught.value)
        assert str(tmp_path / "file.safetensors") in message
        assert expected in message
        assert "\n" not in message

    return expect_error


# Valid files


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
def test_every_type(read: Any, dtype: str) -> None:
    kind = np.dtype(DTYPES[dtype])
    expected = np.array([[0, 1], [1, 0], [1, 1]], kind)
    header = {"a": entry(dtype, [3, 2], 0, expected.nbytes)}
    array = read(safetensors(header, expected.tobytes()))["a"]
    assert array.dtype == kind
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("pad", range(8))
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_data_at_any_offset(read: Any, dtype: str, pad: int) -> None:
    """The data begin after the header, whose length need not be a multiple of 8."""
    bits = {"F64": [1.5, -2.0], "F32": [1.5, -2.0], "F16": [1.5, -2.0], "BF16": [0x3FC0, 0xC000]}
    data = np.array(bits[dtype], DTYPES[dtype]).tobytes()
    header = json.dumps({"a": entry(dtype, [2], 0, len(data))}).encode() + b" " * pad
    assert widen_bfloat16(read(safetensors(header, data))["a"]).tolist() == [1.5, -2.0]


@pytest.mark.parametrize(("dtype", "shape"), [("F32", [2]), ("F16", [4]), ("BF16", [4])])
@pytest.mark.parametrize("pad", [0, 1])
def test_mapped_arrays_are_read_only(read: Any, dtype: str, shape: list[int], pad: int) -> None:
    """A copy of data that are not aligned is read-only too."""
    header = json.dumps({"a": entry(dtype, shape)}).encode()
    aligned = header + b" " * (-len(header) % 8)
    assert not read(safetensors(aligned + b" " * pad, DATA))["a"].flags.writeable


def test_scalars_and_empty_tensors(read: Any) -> None:
    header = {"scalar": entry(shape=[], end=4), "none": entry(shape=[0, 3], begin=4, end=4)}
    found = read(safetensors(header, DATA[:4]))
    assert (found["scalar"].shape, found["scalar"].item()) == ((), 1.5)
    assert found["none"].shape == (0, 3)


def test_names_in_another_order_than_the_data(read: Any) -> None:
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


def test_every_truncation_is_refused(tmp_path: Path, expect_error: Any) -> None:
    complete = weights_path(tmp_path / "micro").read_bytes()
    assert len(complete) < 3000
    for length in range(len(complete)):
        expect_error(complete[:length])


def test_bytes_after_the_data_are_refused(read: Any, expect_error: Any) -> None:
    good = safetensors({"a": entry()}, DATA)
    assert list(read(good)) == ["a"]
    expect_error(good + b"\0")


GOOD = json.dumps({"a": entry()}).encode()
BAD_FILES = {
    "empty": b"",
    "no JSON": safetensors(b"<html>404 Not Found</html>", DATA),
    "truncated JSON": safetensors(GOOD[:-1], DATA),
    "not UTF-8": safetensors(GOOD.replace(b"a", b"\xff", 1), DATA),
    "a list": safetensors([1, 2], DATA),
    "null": safetensors(None, DATA),
    "no header": safetensors(b"", DATA),
    "unclosed brackets": safetensors(b"[" * 100_000, DATA),
    "unclosed objects": safetensors(b'{"a":' * 20_000, DATA),
    "a header shorter than its length": safetensors(GOOD, DATA, len(GOOD) + 5),
    "a header longer than the file": safetensors(GOOD, DATA, 1_000_000),
    "a header of 2^63 bytes": safetensors(GOOD, DATA, 2**63),
    "a header of 2^64 - 1 bytes": safetensors(GOOD, DATA, 2**64 - 1),
    "a header longer than its length": safetensors(GOOD, DATA, len(GOOD) - 3),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a pickle": b"PK\x03\x04" + bytes(200),
    "a number as entry": safetensors({"a": 5}, DATA),
    "an entry without a shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA),
    "an entry without offsets": safetensors({"a": {"dtype": "F32", "shape": [2]}}, DATA),
    "offsets past the end": safetensors({"a": entry(shape=[4], end=16)}, DATA),
    "offsets in reverse order": safetensors({"a": entry(begin=8, end=0)}, DATA),
    "negative offsets": safetensors({"a": entry(begin=-8, end=0)}, DATA),
    "offsets of text": safetensors({"a": entry(begin="0", end="8")}, DATA),
    "huge offsets": safetensors({"a": entry(begin=0, end=2**64)}, DATA),
    "overlapping offsets": safetensors({"a": entry(), "b": entry(begin=4, end=12)}, DATA + DATA),
    "a gap": safetensors({"a": entry(), "b": entry(begin=12, end=20)}, DATA + DATA + DATA),
    "a gap at the start": safetensors({"a": entry(begin=8, end=16)}, DATA + DATA),
    "two names for the same data": safetensors({"a": entry(), "b": entry()}, DATA),
    "data without a name": safetensors({"a": entry(shape=[1], end=4)}, DATA),
    "a shape that is too small": safetensors({"a": entry(shape=[1])}, DATA),
    "a shape that is too large": safetensors({"a": entry(shape=[3])}, DATA),
    "a negative shape": safetensors({"a": entry(shape=[-2])}, DATA),
    "two negative sizes": safetensors({"a": entry(shape=[-1, -2])}, DATA),
    "a fractional shape": safetensors({"a": entry(shape=[2.0])}, DATA),
    "a shape that overflows": safetensors({"a": entry(shape=[2**62, 2**62])}, DATA),
    "a shape that overflows to its size": safetensors({"a": entry(shape=[2**62 + 2, 4])}, DATA),
    "a number as shape": safetensors({"a": entry(shape=2)}, DATA),
    "an empty tensor of a huge shape": safetensors({"a": entry(shape=[0, 2**62], end=0)}),
    "an empty tensor of a larger shape": safetensors({"a": entry(shape=[0, 2**64 - 1], end=0)}),
    "too many dimensions": safetensors({"a": entry(shape=[1] * 70 + [2])}, DATA),
    "metadata of numbers": safetensors({"__metadata__": {"k": 1}, "a": entry()}, DATA),
    "a list as metadata": safetensors({"__metadata__": ["k"], "a": entry()}, DATA),
    "a duplicate key in an entry": safetensors(
        GOOD.replace(b'"shape"', b'"shape":[1,2],"shape"'), DATA
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_files(expect_error: Any, case: str) -> None:
    expect_error(BAD_FILES[case])


@pytest.mark.parametrize("second", [entry(), entry("I32", [1, 2]), entry("F16", [4])])
def test_a_duplicate_name_is_refused(expect_error: Any, second: dict[str, Any]) -> None:
    """The format forbids it, because readers differ in which of the two they take."""
    header = f'{{"a": {json.dumps(entry())}, "a": {json.dumps(second)}}}'
    expect_error(safetensors(header.encode(), DATA), "duplicate name")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_types_that_are_not_supported(expect_error: Any, dtype: str) -> None:
    expected = f"wte.weight is of type {dtype}, expected one of F64, F32"
    expect_error(safetensors({"wte.weight": entry(dtype, [8])}, DATA), expected)


@pytest.mark.parametrize("dtype", ["F31", "float32", "f32", ""])
def test_types_that_do_not_exist(expect_error: Any, dtype: str) -> None:
    expect_error(safetensors({"a": entry(dtype)}, DATA))


@pytest.mark.parametrize("name", ["a\nb", "x" * 5000, "\0"])
def test_a_name_that_would_spoil_a_message_is_not_repeated(expect_error: Any, name: str) -> None:
    expect_error(safetensors({name: entry()}, DATA), "a tensor with an invalid name")


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        read_safetensors(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.safetensors cannot be read"):
        read_safetensors(tmp_path / "none.safetensors")


def test_a_file_without_permission(tmp_path: Path) -> None:
    path = weights_path(tmp_path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(StorageError, match="cannot be read"):
        read_safetensors(path)


def test_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    path = weights_path(tmp_path)
    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(StorageError, match=r"cannot be read \(Input/output error\)"):
        read_safetensors(path)


def test_a_file_that_is_truncated_after_its_header_was_read(tmp_path: Path) -> None:
    path = weights_path(tmp_path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"is truncated at tensor ln_f\.bias"):
        file.read("ln_f.bias")
    path.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        file.read("ln_f.bias")


# Large headers


def no_parser(*args: Any, **options: Any) -> NoReturn:
    raise AssertionError("the header was parsed")


def test_a_header_of_many_tensors_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.safetensors"
    few = {f"h.{i}.x": entry(shape=[0], end=0) for i in range(MAX_TENSORS - 1)}
    path.write_bytes(safetensors(few))
    assert len(SafetensorsFile(path).entries) == MAX_TENSORS - 1
    # The escape hides the name of a key from a search, but no brace.
    many = json.dumps(few | {"last": entry(shape=[0], end=0)}).encode()
    path.write_bytes(safetensors(many.replace(b"data_", b"data\\u005f")))
    monkeypatch.setattr("safetensors.safe_open", no_parser)
    monkeypatch.setattr(json, "loads", no_parser)
    with pytest.raises(WeightsError) as caught:
        SafetensorsFile(path)
    assert str(caught.value) == (
        f"{path} has over {MAX_TENSORS} tensors: it is no GPT-2, or it is damaged"
    )


def test_a_long_header_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(safetensors(b"{}" + b" " * (MAX_HEADER_BYTES - 2)))
    assert not SafetensorsFile(path).entries
    monkeypatch.setattr("safetensors.safe_open", no_parser)
    path.write_bytes(safetensors(b"{}" + b" " * (MAX_HEADER_BYTES - 1)))
    with pytest.raises(WeightsError, match=f"has a header of {MAX_HEADER_BYTES + 1} bytes"):
        SafetensorsFile(path)


def test_the_length_of_another_file_is_not_taken_for_a_header(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"{" * (MAX_TENSORS + 20))
    with pytest.raises(WeightsError, match="truncated or not a valid safetensors file"):
        SafetensorsFile(path)


def test_a_written_file_is_read_by_the_safetensors_library() -> None:
    """The data begin at a multiple of 8 bytes; equal arrays give equal bytes."""
    from safetensors.numpy import load

    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.array(7, np.uint8),
        "empty": np.zeros((0, 3), np.int64),
    }
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        write_safetensors(file, tensors, {"position": "3"})
    data = files[0].getvalue()
    assert data == files[1].getvalue()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    found = load(data)
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
