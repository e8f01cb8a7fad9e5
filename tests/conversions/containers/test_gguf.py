"""gptx.conversions.containers.gguf, against bytes written after the specification."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.conversions.containers import gguf
from gptx.conversions.containers.gguf import (
    GgufFile,
    TensorInfo,
    describe_value,
    encode_header,
    padding,
)
from gptx.conversions.containers.gguf_types import BLOCK_TYPES, FLOAT_TYPES, TensorType
from gptx.errors import StorageError, WeightsError
from gptx.safetensors_file import BFLOAT16

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, sizes: Sequence[int], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def write(
    path: Path,
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    entries: Sequence[bytes] = (),
    *,
    alignment: int = 32,
    **counts: int,
) -> Path:
    """Write a file of encoded parts; `counts` are `version`, `n_tensors` and `n_entries`."""
    n_tensors, n_entries = len(infos), len(entries)
    numbers = {"version": 3, "n_tensors": n_tensors, "n_entries": n_entries} | counts
    header = b"GGUF" + struct.pack("<IQQ", *numbers.values()) + b"".join([*entries, *infos])
    path.write_bytes(header + bytes(-len(header) % alignment) + data)
    return path


def floats(n: int, alignment: int = 32) -> bytes:
    """Return n float32, 0 to n - 1, and their padding."""
    raw = np.arange(n, dtype="<f4").tobytes()
    return raw + bytes(-len(raw) % alignment)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.gguf"


# Metadata


@pytest.mark.parametrize(
    ("kind", "code", "value"),
    [
        (0, "B", 255),
        (1, "b", -128),
        (2, "H", 65535),
        (3, "h", -32768),
        (4, "I", 2**32 - 1),
        (5, "i", -(2**31)),
        (7, "?", True),
        (10, "Q", 2**64 - 1),
        (11, "q", -(2**63)),
        (12, "d", 1e-300),
    ],
)
def test_numbers_and_arrays_of_them(path: Path, kind: int, code: str, value: Any) -> None:
    number = struct.pack(f"<{code}", value)
    array = struct.pack("<IQ", kind, 3) + number * 3
    entries = [entry("one", kind, number), entry("three", 9, array), entry("end", 8, text("é"))]
    metadata = GgufFile(write(path, entries=entries)).metadata
    assert metadata["one"] == value
    assert metadata["three"].tolist() == [value] * 3
    assert metadata["end"] == "é"


@pytest.mark.parametrize("value", [1e-5, 0.1, 3.4e38, 16777216.0])
def test_a_float32_is_its_shortest_decimal(path: Path, value: float) -> None:
    entries = [entry("x", 6, struct.pack("<f", value))]
    assert repr(GgufFile(write(path, entries=entries)).metadata["x"]) == repr(value)


def test_lists_of_strings(path: Path) -> None:
    strings = ["", "a", "日本"]
    array = struct.pack("<IQ", 8, 3) + b"".join(map(text, strings))
    entries = [entry("x", 9, array), entry("none", 9, struct.pack("<IQ", 8, 0))]
    assert GgufFile(write(path, entries=entries)).metadata == {"x": strings, "none": []}


@pytest.mark.parametrize("window", [1, 7, 64])
def test_the_header_is_read_in_windows(
    path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    entries = [entry(f"key{i}", 8, text("x" * i)) for i in range(50)]
    infos = [info("a", [8], F32, 0), info("b", [4, 2], F32, 32)]
    write(path, infos, floats(8) + floats(8), entries)
    monkeypatch.setattr(gguf, "WINDOW_BYTES", window)
    file = GgufFile(path)
    assert file.metadata == {f"key{i}": "x" * i for i in range(50)}
    assert file.read(file.tensors["b"]).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_windows_are_few(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [entry(f"key{i}", 8, text("x" * 90)) for i in range(50)]
    write(path, entries=entries)
    reads = []
    read = gguf.BinaryFile.read
    monkeypatch.setattr(
        gguf.BinaryFile, "read", lambda file, *place: reads.append(place) or read(file, *place)
    )
    monkeypatch.setattr(gguf, "WINDOW_BYTES", 2**10)
    GgufFile(path)
    assert len(reads) == path.stat().st_size // 2**10 + 1


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (entry("a", 13, bytes(8)), "the metadata 'a' has unknown type 13"),
        (entry("a", 9, struct.pack("<IQ", 13, 0)), "'a' is an array of unknown type 13"),
        (entry("a", 9, struct.pack("<IQ", 9, 0)), "'a' is an array of unknown type 9"),
        (entry("a", 9, struct.pack("<IQ", 8, 3)), "'a' has the length 3, longer than the file"),
        (entry("a", 9, struct.pack("<IQ", 4, 9)), "expected the metadata 'a' in bytes"),
        (entry("a", 8, text(b"\xff")), "the metadata 'a' is not UTF-8"),
        (text(b"\xff"), "a key of the metadata is not UTF-8"),
        (entry("k" * 99, 13, bytes(8)), f"the metadata '{'k' * 64}' has"),
        (entry("a", 0, b"\1") + text("a"), "duplicate key of the metadata 'a'"),
    ],
)
def test_invalid_metadata(path: Path, part: bytes, message: str) -> None:
    write(path, entries=[part], n_entries=2 if "duplicate" in message else 1)
    with pytest.raises(WeightsError, match=message):
        GgufFile(path)


def test_a_list_may_fill_the_file(path: Path) -> None:
    array = struct.pack("<IQ", 8, 5) + text("") * 5
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("a", 9, array))
    assert GgufFile(path).metadata["a"] == [""] * 5


def test_scalars(path: Path) -> None:
    array = struct.pack("<IQ", 4, 2) + bytes(8)
    strings = struct.pack("<IQ", 8, 1) + text("x")
    entries = [entry("n", 4, bytes(4)), entry("array", 9, array), entry("list", 9, strings)]
    file = GgufFile(write(path, entries=entries))
    assert (file.scalar("n", 7), file.scalar("missing", 7), file.scalar("missing")) == (0, 7, None)
    for key, n in (("array", 2), ("list", 1)):
        with pytest.raises(WeightsError, match=f"{key} is a list of {n}, expected one number"):
            file.scalar(key)


def test_values_in_messages_are_short() -> None:
    assert describe_value("x" * 65) == repr("x" * 64)
    assert describe_value(7) == "7"
    assert describe_value(np.zeros(3)) == describe_value([1, 2, 3]) == "a list of 3"


# Start of the file


@pytest.mark.parametrize("version", [2, 3])
def test_versions(path: Path, version: int) -> None:
    assert GgufFile(write(path, version=version)).metadata == {}


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (1, "has GGUF version 1, expected 2 or 3"),
        (4, "has GGUF version 4, expected 2 or 3"),
        (0x10003, "has GGUF version 65539"),
        (3 << 24, "of a big-endian machine"),
    ],
)
def test_other_versions(path: Path, version: int, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        GgufFile(write(path, version=version))


@pytest.mark.parametrize("magic", [b"lmgg", b"fmgg", b"tjgg", b"algg"])
def test_files_from_before_gguf(path: Path, magic: bytes) -> None:
    path.write_bytes(magic + bytes(100))
    with pytest.raises(WeightsError, match="is a ggml file from before GGUF"):
        GgufFile(path)


def test_another_magic(path: Path) -> None:
    path.write_bytes(b"GGUFX"[1:] + bytes(20))
    with pytest.raises(WeightsError, match="is not a GGUF: it starts with b'GUFX'"):
        GgufFile(path)


def test_a_file_that_does_not_exist(path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        GgufFile(path)


@pytest.mark.parametrize(("count", "most"), [("n_tensors", 130_000), ("n_entries", 65_536)])
def test_a_header_fits_the_memory(path: Path, count: str, most: int) -> None:
    with pytest.raises(WeightsError, match=f"is {most + 1}, expected at most {most}"):
        GgufFile(write(path, **{count: most + 1}))


@pytest.mark.parametrize(
    ("limit", "count", "items"),
    [("MAX_TENSORS", "n_tensors", "tensors"), ("MAX_KEYS", "n_entries", "metadata")],
)
def test_counts_are_limited(
    path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, count: str, items: str
) -> None:
    monkeypatch.setattr(gguf, limit, 2)
    infos = [info(f"t{i}", [8], F32, 32 * i) for i in range(2)]
    entries = [entry(f"k{i}", 4, bytes(4)) for i in range(2)]
    write(path, infos, bytes(64), entries)
    assert len(GgufFile(path).tensors) == len(GgufFile(path).metadata) == 2
    write(path, infos, bytes(64), entries, **{count: 3})
    with pytest.raises(WeightsError, match=f"the number of {items} is 3, expected at most 2"):
        GgufFile(path)


# Tensors


def test_tensors_of_each_number_of_dimensions(path: Path) -> None:
    sizes = [[8], [4, 2], [2, 2, 2], [1, 2, 2, 2]]
    infos = [info(f"t{len(size)}", size, F32, 32 * i) for i, size in enumerate(sizes)]
    file = GgufFile(write(path, infos, floats(8) * 4))
    assert [t.shape for t in file.tensors.values()] == [(8,), (2, 4), (2, 2, 2), (2, 2, 2, 1)]
    for tensor in file.tensors.values():
        assert file.read(tensor).ravel().tolist() == list(range(8))
        assert file.read_raw(tensor).tobytes() == floats(8)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(F32, "<f4"), (F16, "<f2"), (30, BFLOAT16), (28, "<f8"), (24, "i1")]
)
def test_plain_numbers_are_mapped(path: Path, kind: int, dtype: Any) -> None:
    size = np.dtype(dtype).itemsize
    data = bytes(range(32))
    file = GgufFile(write(path, [info("t", [32 // size], kind, 0)], data))
    found = file.read(file.tensors["t"])
    assert (found.dtype, found.tobytes()) == (dtype, data)
    assert not found.flags.owndata
    assert not found.flags.writeable


@pytest.mark.parametrize("alignment", [1, 2, 32, 64, 4096])
def test_alignments(path: Path, alignment: int) -> None:
    infos = [info("a", [3], F32, 0), info("b", [5], F32, 12 + -12 % alignment)]
    entries = [entry("general.alignment", 4, struct.pack("<I", alignment))]
    data = floats(3, alignment) + floats(5, alignment)
    file = GgufFile(write(path, infos, data, entries, alignment=alignment))
    assert file.read(file.tensors["a"]).tolist() == [0, 1, 2]
    assert file.read(file.tensors["b"]).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        (4, struct.pack("<I", 0), "0"),
        (4, struct.pack("<I", 48), "48"),
        (5, struct.pack("<i", -32), "-32"),
        (6, struct.pack("<f", 32), "32.0"),
        (8, text("32"), "'32'"),
        (9, struct.pack("<IQI", 4, 1, 32), "a list of 1"),
    ],
)
def test_invalid_alignments(path: Path, kind: int, value: bytes, shown: str) -> None:
    write(path, [info("a", [8], F32, 0)], floats(8), [entry("general.alignment", kind, value)])
    with pytest.raises(WeightsError, match=f"general.alignment is {shown}, expected a power of tw"):
        _ = GgufFile(path).tensors


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([], "tensor a has 0 dimensions, expected 1 to 4"), ([1] * 5, "tensor a has 5 dimensions")],
)
def test_numbers_of_dimensions_are_limited(path: Path, sizes: list[int], message: str) -> None:
    write(path, [info("a", sizes, F32, 0)], bytes(32))
    with pytest.raises(WeightsError, match=message):
        _ = GgufFile(path).tensors


@pytest.mark.parametrize("name", ["n" * 64, "ü" * 64])
def test_names_have_up_to_64_characters(path: Path, name: str) -> None:
    assert list(GgufFile(write(path, [info(name, [8], F32, 0)], floats(8))).tensors) == [name]


@pytest.mark.parametrize("name", ["n" * 65, "a\nb"])
def test_other_names_are_refused(path: Path, name: str) -> None:
    write(path, [info(name, [8], F32, 0)], floats(8))
    with pytest.raises(WeightsError, match=r"a tensor's name is '(n{64}|a\\nb)', expected a short"):
        _ = GgufFile(path).tensors


def test_duplicate_tensors(path: Path) -> None:
    write(path, [info("a", [8], F32, 0), info("a", [8], F32, 32)], floats(8) * 2)
    with pytest.raises(WeightsError, match="duplicate tensor a"):
        _ = GgufFile(path).tensors


@pytest.mark.parametrize("offset", [0, 31, 33, 64])
def test_tensors_follow_each_other(path: Path, offset: int) -> None:
    write(path, [info("a", [8], F32, 0), info("b", [8], F32, offset)], floats(8) * 3)
    with pytest.raises(WeightsError, match=f"tensor b is at offset {offset}, expected 32, the end"):
        _ = GgufFile(path).tensors


@pytest.mark.parametrize("n", [63, 65, 96])
def test_the_data_fill_the_file(path: Path, n: int) -> None:
    write(path, [info("a", [9], F32, 0)], bytes(n))
    size = path.stat().st_size
    with pytest.raises(
        WeightsError, match=f"truncated or damaged: it has {size} bytes, expected {size - n + 64} b"
    ):
        _ = GgufFile(path).tensors


@pytest.mark.parametrize("rest", [b"", b"\0", bytes(32)])
def test_a_file_without_tensors_may_end_anywhere(path: Path, rest: bytes) -> None:
    write(path, entries=[entry("a", 8, text("x"))], alignment=1)
    path.write_bytes(path.read_bytes() + rest)
    assert GgufFile(path).tensors == {}


def test_types_without_a_reader_are_named(path: Path) -> None:
    for kind, name in ((16, "IQ2_XXS"), (99, "99")):
        write(path, [info("a", [256], kind, 0)], bytes(96))
        with pytest.raises(
            WeightsError, match=f"tensor a is of type {name}, expected one of F32, F16, BF16, Q4_0"
        ):
            _ = GgufFile(path).tensors


# Blocks


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_are_decoded_in_chunks(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, rows: int
) -> None:
    decode, chunks = TensorType.decode, []
    monkeypatch.setattr(gguf, "CHUNK_NUMBERS", 2 * kind.block_numbers)
    monkeypatch.setattr(
        TensorType, "decode", lambda kind, raw: chunks.append(len(raw)) or decode(kind, raw)
    )
    raw = np.random.default_rng(rows).integers(0, 60, (rows * 3, kind.block_bytes), dtype=np.uint8)
    data = raw.tobytes() + bytes(-raw.size % 32)
    write(path, [info("a", [3 * kind.block_numbers, rows], kind.id, 0)], data)
    file = GgufFile(path)
    found = file.read(file.tensors["a"])
    assert found.shape == (rows, 3 * kind.block_numbers)
    assert found.tobytes() == decode(kind, raw).tobytes()
    assert chunks == {1: [2, 1], 3: [2, 2, 2, 2, 1]}[rows]


@pytest.mark.parametrize(("n", "fits"), [(32, True), (48, False), (31, False), (64, True)])
def test_rows_have_whole_blocks(path: Path, n: int, fits: bool) -> None:
    write(path, [info("a", [n, 2], Q8_0, 0)], bytes(n // 32 * 68 + -(n // 32 * 68) % 32))
    if fits:
        assert GgufFile(path).tensors["a"].shape == (2, n)
        return
    with pytest.raises(WeightsError, match=rf"shape \[2, {n}\], expected .* a multiple of 32"):
        _ = GgufFile(path).tensors


# Writing


def test_an_encoded_header_is_that_of_the_specification() -> None:
    metadata = {"s": "é", "f": 0.5, "i": np.int32(-3), "u": 2**32 - 1}
    metadata |= {"words": ["a", ""], "ids": [1, -2], "id": [7], "none": []}
    tensors = [
        TensorInfo("a", (2, 3), FLOAT_TYPES["float16"]),
        TensorInfo("b", (8,), FLOAT_TYPES["float32"]),
        TensorInfo("c", (1,), FLOAT_TYPES["float32"]),
    ]
    expected = b"GGUF" + struct.pack("<IQQ", 3, 3, 8)
    expected += entry("s", 8, text("é")) + entry("f", 6, struct.pack("<f", 0.5))
    expected += entry("i", 5, struct.pack("<i", -3)) + entry("u", 4, b"\xff" * 4)
    expected += entry("words", 9, struct.pack("<IQ", 8, 2) + text("a") + text(""))
    expected += entry("ids", 9, struct.pack("<IQii", 5, 2, 1, -2))
    expected += entry("id", 9, struct.pack("<IQi", 5, 1, 7))
    expected += entry("none", 9, struct.pack("<IQ", 8, 0))
    expected += info("a", [3, 2], F16, 0) + info("b", [8], F32, 32) + info("c", [1], F32, 64)
    assert encode_header(metadata, tensors) == expected + bytes(-len(expected) % 32)


def test_a_tensor_in_a_file_and_one_to_be_written(path: Path) -> None:
    write(path, [info("a", [8], F32, 0), info("b", [4, 2], F16, 32)], floats(8) + bytes(32))
    size = path.stat().st_size
    assert GgufFile(path).tensors == {
        "a": TensorInfo("a", (8,), FLOAT_TYPES["float32"], size - 64),
        "b": TensorInfo("b", (2, 4), FLOAT_TYPES["float16"], size - 32),
    }
    assert TensorInfo("a", (8,), FLOAT_TYPES["float32"]).offset == 0


def test_padding() -> None:
    assert [len(padding(n)) for n in (0, 1, 31, 32, 33)] == [0, 31, 1, 0, 31]
    assert set(padding(1)) == {0}
