"""gptx.conversions.containers.messagepack: records of Burn, and the numbers of their tensors."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.conversions.containers import messagepack
from gptx.conversions.containers.binary import BinaryFile
from gptx.conversions.containers.messagepack import Kind, Record, Schema
from gptx.errors import WeightsError
from tests.support.files.burn_bytes import pack


@settings(max_examples=40)
@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 65535)), min_size=1), st.data())
def test_numbers_of_any_length_are_found_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], data: Any
) -> None:
    """The bits of float16 are stored in one, two or three bytes."""
    path = tmp_path_factory.getbasetemp() / "numbers.mpk"
    path.write_bytes(pack(np.array(values, np.uint16).view(np.float16)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messagepack, "CHUNK_NUMBERS", data.draw(st.integers(3, 40)))
        patch.setattr(messagepack, "SCALAR_RUN", data.draw(st.integers(1, 8)))
        found = Record(BinaryFile(path), Kind.TENSOR)
        bits = found.read(found.tensors[""]).view(np.uint16)
    assert bits.tolist() == values


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_of_more_than_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    values = np.arange(35, dtype=dtype).reshape(5, 7) - 17.25
    (tmp_path / "x").write_bytes(pack(values))
    monkeypatch.setattr(messagepack, "CHUNK_NUMBERS", 8)
    found = Record(BinaryFile(tmp_path / "x"), Kind.TENSOR)
    np.testing.assert_array_equal(found.read(found.tensors[""]), values)


def test_numbers_of_another_type_among_them_are_refused(tmp_path: Path) -> None:
    data = bytearray(pack(np.ones(40, np.float32)))
    data[data.index(b"\xca", 100)] = 0xCE  # an integer of as many bytes
    (tmp_path / "x").write_bytes(data)
    found = Record(BinaryFile(tmp_path / "x"), Kind.TENSOR)
    with pytest.raises(WeightsError, match="not a list of numbers of one type"):
        found.read(found.tensors[""])


# Structure


def record(path: Path, data: bytes, schema: Schema) -> Record:
    path.write_bytes(data)
    return Record(BinaryFile(path), schema)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.mpk"


def text_forms(n: int) -> list[bytes]:
    """Return the markers and lengths that a text of n bytes can have."""
    forms = [bytes([0xA0 + n])] if n < 32 else []
    forms += [struct.pack(">BB", 0xD9, n)] if n < 256 else []
    forms += [struct.pack(">BH", 0xDA, n), struct.pack(">BI", 0xDB, n)]
    return forms


@pytest.mark.parametrize("n", [0, 1, 31, 32, 255, 256, 1024])
def test_texts_of_every_form(path: Path, n: int) -> None:
    for head in text_forms(n):
        assert record(path, head + b"x" * n, Kind.TEXT).texts == {"": "x" * n}


@pytest.mark.parametrize("head", [b"\x9f", b"\xc0", b"\xd8\x01", b"\xdc\0\x01"])
def test_other_markers_are_no_text(path: Path, head: bytes) -> None:
    with pytest.raises(WeightsError, match=r"the record is not text \(near byte 1\)"):
        record(path, head + b"x" * 40, Kind.TEXT)


def test_a_text_has_at_most_1024_bytes(path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a text of at most 1024 bytes"):
        record(path, struct.pack(">BH", 0xDA, 1025) + b"x" * 1025, Kind.TEXT)


def test_a_text_that_is_not_utf_8(path: Path) -> None:
    assert record(path, b"\xa2a\xff", Kind.TEXT).texts == {"": "a\ufffd"}


def list_forms(n: int) -> list[bytes]:
    forms = [bytes([0x90 + n])] if n < 16 else []
    return [*forms, struct.pack(">BH", 0xDC, n), struct.pack(">BI", 0xDD, n)]


@pytest.mark.parametrize("n", [0, 1, 15, 16, 300])
def test_lists_of_every_form(path: Path, n: int) -> None:
    for head in list_forms(n):
        found = record(path, head + b"\xa1x" * n, [Kind.TEXT])
        assert found.lengths == {"": n}
        assert found.texts == {f".{i}": "x" for i in range(n)}


@pytest.mark.parametrize("head", [b"\x8f", b"\xa0", b"\xdb\0\0\0\0", b"\xde\0\0"])
def test_other_markers_are_no_list(path: Path, head: bytes) -> None:
    with pytest.raises(WeightsError, match="the record is not a list"):
        record(path, head, [Kind.TEXT])


def test_a_list_has_at_most_10000_items(path: Path) -> None:
    assert record(path, struct.pack(">BH", 0xDC, 10_000) + b"\xc0" * 10_000, [Kind.NIL]).lengths
    with pytest.raises(WeightsError, match="is not a list of at most 10000"):
        record(path, struct.pack(">BH", 0xDC, 10_001) + b"\xc0" * 10_001, [Kind.NIL])


def test_a_list_without_a_schema_is_empty(path: Path) -> None:
    assert record(path, b"\x90", []).lengths == {"": 0}
    with pytest.raises(WeightsError, match="is not a list of at most 0"):
        record(path, b"\x91\xc0", [])


def struct_forms(n: int) -> list[bytes]:
    forms = [bytes([0x80 + n])] if n < 16 else []
    return [*forms, struct.pack(">BH", 0xDE, n), struct.pack(">BI", 0xDF, n)]


@pytest.mark.parametrize("n", [1, 2, 15, 16])
def test_structs_of_every_form_and_order(path: Path, n: int) -> None:
    schema: Schema = {f"f{i:02}": Kind.TEXT for i in range(n)}
    fields = [b"\xa3" + name.encode() + b"\xa3" + name.encode() for name in schema]
    for head in struct_forms(n):
        for order in (fields, fields[::-1]):
            found = record(path, head + b"".join(order), schema)
            assert found.texts == {name: name for name in schema}


def test_names_of_nested_values(path: Path) -> None:
    schema: Schema = {"a": {"b": Kind.TEXT}, "c": [{"d": Kind.NIL, "e": Kind.TEXT}]}
    data = b"\x82\xa1a\x81\xa1b\xa1x\xa1c\x91\x82\xa1d\xc0\xa1e\xa1y"
    found = record(path, data, schema)
    assert found.texts == {"a.b": "x", "c.0.e": "y"}
    assert found.lengths == {"c": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x81\xa1a\xc0", "the record is not a struct of a, b "),
        (b"\x83\xa1a\xc0\xa1b\xc0\xa1c\xc0", "the record is not a struct of a, b "),
        (b"\x82\xa1a\xc0\xa1c\xc0", "a struct of a, b, each once and no others"),
        (b"\x82\xa1a\xc0\xa1a\xc0", "a struct of a, b, each once and no others"),
        (b"\x92\xc0\xc0", "the record is not a struct"),
        (b"\x82\xa1a\xc0\x07\xc0", "the name of a field of the record is not text"),
        (b"\x82\xa1a\xc0\xa1b\xc3", "b is not nil, which Burn stores for a constant"),
        (b"\x82\xa1a\xc0\xa1b", "truncated or damaged: expected b in bytes 6 to 7"),
        (b"\x82\xa1a\xc0\xa1b\xc0\xc0", "has 8 bytes, expected 7 by its record"),
    ],
)
def test_structs_that_do_not_match(path: Path, data: bytes, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        record(path, data, {"a": Kind.NIL, "b": Kind.NIL})


def test_a_record_is_read_in_windows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messagepack, "WINDOW_BYTES", 3)
    data = b"\xdc\0\x14" + b"".join(bytes([0xA0 + i]) + b"x" * i for i in range(20))
    found = record(path, data, [Kind.TEXT])
    assert found.texts == {f".{i}": "x" * i for i in range(20)}


# Tensors


def tensor(value: bytes, shape: bytes, *, swap: bool = False) -> bytes:
    """Encode `{id, param: {value, shape}}`; `swap` turns both orders around."""
    parts = [b"\xa5value" + value, b"\xa5shape" + shape]
    fields = [b"\xa2id\xa1x", b"\xa5param\x82" + b"".join(parts[::-1] if swap else parts)]
    return b"\x82" + b"".join(fields[::-1] if swap else fields)


FLOAT = b"\xca" + struct.pack(">f", 1.5)


@pytest.mark.parametrize("swap", [False, True])
def test_fields_of_a_tensor_in_any_order(path: Path, swap: bool) -> None:
    found = record(path, tensor(b"\x92" + FLOAT * 2, b"\x92\x02\x01", swap=swap), Kind.TENSOR)
    assert found.read(found.tensors[""]).tolist() == [[1.5], [1.5]]


@pytest.mark.parametrize(
    "size", [b"\x02", b"\xcc\x02", b"\xcd\0\x02", b"\xce\0\0\0\x02", b"\xcf\0\0\0\0\0\0\0\x02"]
)
def test_sizes_of_every_form(path: Path, size: bytes) -> None:
    found = record(path, tensor(b"\x92" + FLOAT * 2, b"\x91" + size), Kind.TENSOR)
    assert found.tensors[""].shape == (2,)


def test_a_size_below_128_is_its_own_marker(path: Path) -> None:
    data = tensor(struct.pack(">BH", 0xDC, 127) + FLOAT * 127, b"\x91\x7f")
    assert record(path, data, Kind.TENSOR).tensors[""].shape == (127,)


@pytest.mark.parametrize("size", [b"\x80", b"\xcb", b"\xd0\x02", b"\xa0"])
def test_other_markers_are_no_size(path: Path, size: bytes) -> None:
    data = tensor(b"\x92" + FLOAT * 2, b"\x91" + size + bytes(8))
    with pytest.raises(WeightsError, match="shape is not a list of sizes"):
        record(path, data, Kind.TENSOR)


def test_a_tensor_has_at_most_8_dimensions(path: Path) -> None:
    found = record(path, tensor(b"\x91" + FLOAT, b"\x98" + b"\x01" * 8), Kind.TENSOR)
    assert found.tensors[""].shape == (1,) * 8
    with pytest.raises(WeightsError, match="shape is not a list of at most 8 sizes"):
        record(path, tensor(b"\x91" + FLOAT, b"\x99" + b"\x01" * 9), Kind.TENSOR)


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        (b"\x90", b"\x91\x00", "is not a tensor with numbers in it"),
        (b"\x92" + FLOAT * 2, b"\x91\x03", r"a tensor of shape \[3\]: it has 2 numbers"),
        (b"\xdc\x00\x63" + FLOAT, b"\x91\x63", r"complete: the file is truncated \(near byte 22\)"),
        (b"\x92\x05\x80", b"\x91\x02", "is not a complete list of numbers"),
        (b"\x92\x05\xcd", b"\x91\x02", "is not a complete list of numbers|damaged"),
        (b"\xa1x", b"\x91\x01", r"value is not a list"),
    ],
)
def test_tensors_that_do_not_match(path: Path, value: bytes, shape: bytes, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        record(path, tensor(value, shape), Kind.TENSOR)


@pytest.mark.parametrize("numbers", [b"\x05", b"\xcc\x85", b"\xcd\x12\x34"])
@pytest.mark.parametrize(("n", "chunk"), [(1, 100), (15, 100), (100, 1000), (100, 40)])
def test_numbers_after_the_last_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, numbers: bytes, n: int, chunk: int
) -> None:
    monkeypatch.setattr(messagepack, "CHUNK_NUMBERS", chunk)
    value = list_forms(n)[0] + numbers * n
    data = tensor(value, bytes([0x91, n]), swap=True)
    data = data.replace(b"\xa2id\xa1x", b"").replace(b"\x82", b"\x82\xa2id\xa1x", 1)
    assert data.endswith(value)
    assert record(path, data, Kind.TENSOR).tensors[""].shape == (n,)
    with pytest.raises(WeightsError, match=f"expected {len(data)} by its record"):
        record(path, data + numbers * n, Kind.TENSOR)
