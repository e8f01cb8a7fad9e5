"""gptx.conversions.containers.zip_archive: archives of single records, valid and damaged.

The tests of formats that use archives have files of PyTorch.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptx.conversions.containers.binary import BinaryFile
from gptx.conversions.containers.zip_archive import (
    END,
    END_64,
    ENTRY,
    HEADER,
    LOCATOR_64,
    ZipEntry,
    zip_entries,
)
from gptx.errors import WeightsError

Read = Callable[[bytes], dict[str, ZipEntry]]
NAME, DATA = b"a/data.pkl", b"text"
BEYOND = 2**32 - 1


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return a function that reads the directory of an archive."""

    def entries(data: bytes) -> dict[str, ZipEntry]:
        path = tmp_path / "a.zip"
        path.write_bytes(data)
        return zip_entries(BinaryFile(path))

    return entries


def header(*, mark: bytes = b"PK\3\4", name: bytes = NAME, extra: bytes = b"") -> bytes:
    """Return a file after its header."""
    sizes = (len(DATA), len(DATA), len(name), len(extra))
    return HEADER.pack(mark, 20, 0, 0, 0, 0, 7, *sizes) + name + extra + DATA


def entry(
    *,
    mark: bytes = b"PK\1\2",
    name: bytes = NAME,
    extra: bytes = b"",
    comment: bytes = b"",
    flags: int = 0,
    method: int = 0,
    crc: int = 7,
    packed: int = len(DATA),
    size: int = len(DATA),
    disk: int = 0,
    at: int = 0,
) -> bytes:
    """Return an entry of the directory."""
    lengths = (len(name), len(extra), len(comment))
    head = ENTRY.pack(
        mark, 20, 20, flags, method, 0, 0, crc, packed, size, *lengths, disk, 0, 0, at
    )
    return head + name + extra + comment


def archive(directory: bytes, count: int = 1, *, wide: bool = False, **changes: Any) -> bytes:
    """Return an archive of one file; `wide` has an end record of 64-bit numbers, too."""
    body = header()
    fields = {"mark": b"PK\5\6", "disk": 0, "first": 0, "here": count, "count": count}
    fields |= {"n_bytes": len(directory), "begin": len(body)}
    if not wide:
        return body + directory + END.pack(*(fields | changes).values(), changes.get("comment", 0))
    mark, *numbers = (fields | {"mark": b"PK\6\6"} | changes).values()
    end = END_64.pack(mark, 44, 45, 45, *numbers)
    locator = (b"PK\6\7", 0, len(body) + len(directory), 1)
    last = END.pack(b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, BEYOND, BEYOND, 0)
    return body + directory + end + LOCATOR_64.pack(*locator) + last


@pytest.mark.parametrize("wide", [False, True])
def test_an_archive_of_one_file(read: Read, wide: bool, tmp_path: Path) -> None:
    found = read(archive(entry(comment=b"a comment"), wide=wide))
    assert found == {"a/data.pkl": ZipEntry("a/data.pkl", 0, 4, 7)}
    file = BinaryFile(tmp_path / "a.zip")
    start = found["a/data.pkl"].start(file)
    assert file.read(start, 4, "the text") == DATA


def test_files_of_python_are_read(read: Read, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "python.zip", "w") as written:
        for i in range(3):
            written.writestr(f"{i}", b"x" * i)
    found = read((tmp_path / "python.zip").read_bytes())
    assert {name: item.n_bytes for name, item in found.items()} == {"0": 0, "1": 1, "2": 2}


def test_an_empty_archive(read: Read) -> None:
    assert read(END.pack(b"PK\5\6", *[0] * 7)) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mark": b"PK\1\3"}, "its directory is invalid"),
        ({"disk": 1}, "its directory is invalid"),
        ({"name": "ä".encode()}, "its directory is invalid"),
        ({"name": b"a\n"}, "its directory is invalid"),
        ({"name": b"n" * 501}, "its directory is invalid"),
        ({"packed": 3}, "a duplicate or invalid entry a/data.pkl"),
        ({"size": 3}, "a duplicate or invalid entry a/data.pkl"),
    ],
    ids=str,
)
def test_invalid_entries_are_refused(read: Read, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read(archive(entry(**changes)))


@pytest.mark.parametrize("changes", [{"flags": 1}, {"flags": 9}, {"method": 8, "packed": 3}])
def test_a_compressed_or_encrypted_file_cannot_be_read(
    read: Read, changes: dict[str, Any], tmp_path: Path
) -> None:
    found = read(archive(entry(**changes)))["a/data.pkl"]
    with pytest.raises(WeightsError, match=r"a/data\.pkl is compressed or encrypted"):
        found.start(BinaryFile(tmp_path / "a.zip"))


def test_other_values_of_an_entry_are_valid(read: Read) -> None:
    assert len(read(archive(entry(flags=2**11 + 8)))) == 1  # UTF-8; sizes after the data
    name = "n" * 500
    assert list(read(archive(entry(name=name.encode())))) == [name]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mark": b"PK\5\7"}, "its end record is invalid"),
        ({"disk": 1}, "its directory is not at the position"),
        ({"first": 1}, "its directory is not at the position"),
        ({"here": 2}, "its directory is not at the position"),
        ({"n_bytes": 10}, "its directory is not at the position"),
        ({"begin": 1}, "its directory is not at the position"),
        ({"count": 2, "here": 2}, "its directory has 1 files, expected 2"),
        ({"count": 0, "here": 0}, "its directory has 1 files, expected 0"),
    ],
    ids=str,
)
def test_invalid_end_records_are_refused(
    read: Read, wide: bool, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        read(archive(entry(), wide=wide, **changes))


def test_an_end_record_with_a_comment_is_refused(read: Read) -> None:
    data = archive(entry())
    with pytest.raises(WeightsError, match="its end record is invalid"):
        read(data[:-2] + b"\1\0")


@pytest.mark.parametrize("position", [0, 10**6, 2**63])
def test_a_wide_end_record_at_another_position_is_refused(read: Read, position: int) -> None:
    data = bytearray(archive(entry(), wide=True))
    struct.pack_into("<Q", data, len(data) - END.size - LOCATOR_64.size + 8, position)
    with pytest.raises(WeightsError, match=r"end record is invalid|the end of the archive"):
        read(bytes(data))
    valid = archive(entry(), wide=True)
    at = len(header()) + len(entry())
    with pytest.raises(WeightsError, match="its end record is invalid"):
        read(valid[: at + END_64.size] + b"\0" + valid[at + END_64.size :])


def test_a_truncated_or_duplicate_entry_is_refused(read: Read) -> None:
    part = entry()[: ENTRY.size - 1]
    with pytest.raises(WeightsError, match="its directory is truncated"):
        read(archive(entry() + part, count=2))
    with pytest.raises(WeightsError, match="its directory is invalid"):
        read(archive(entry()[:-1]))
    with pytest.raises(WeightsError, match=r"a duplicate or invalid entry a/data\.pkl"):
        read(archive(entry() * 2, count=2))


def test_a_directory_that_is_too_long_is_refused_before_it_is_read(read: Read) -> None:
    with pytest.raises(WeightsError, match="its directory is invalid"):
        read(archive(bytes(2**22)))
    with pytest.raises(WeightsError, match="has 4194305 bytes, expected at most 4194304"):
        read(archive(bytes(2**22 + 1)))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (struct.pack("<2H3Q", 1, 24, 4, 4, 0), (4, 0)),
        (struct.pack("<2HB2H3Q", 9, 1, 0, 1, 24, 4, 4, 0), (4, 0)),  # after another field
        (struct.pack("<2H3Q", 1, 24, 2**40, 2**40, 2**41), (2**40, 2**41)),
        (struct.pack("<2H2Q", 1, 16, 4, 4), (4, BEYOND)),
        (struct.pack("<2H2Q", 1, 255, 4, 4), (4, BEYOND)),  # longer than the field
        (struct.pack("<2H2QB", 1, 17, 4, 4, 0), (4, BEYOND)),
        (struct.pack("<2H3Q", 2, 24, 4, 4, 0), (BEYOND, BEYOND)),
        (b"\1\0\0", (BEYOND, BEYOND)),
        (b"", (BEYOND, BEYOND)),
    ],
)
def test_numbers_of_64_bits(read: Read, extra: bytes, expected: tuple[int, int]) -> None:
    found = read(archive(entry(packed=BEYOND, size=BEYOND, at=BEYOND, extra=extra)))
    item = found["a/data.pkl"]
    assert (item.n_bytes, item.header) == expected


def test_only_numbers_without_a_value_are_in_the_extra_field(read: Read) -> None:
    extra = struct.pack("<2HQ", 1, 8, 5)
    item = read(archive(entry(at=BEYOND, extra=extra)))["a/data.pkl"]
    assert (item.n_bytes, item.header) == (4, 5)
    with pytest.raises(WeightsError, match="duplicate or invalid entry"):
        read(archive(entry(size=BEYOND, extra=extra)))


@pytest.mark.parametrize(
    ("body", "n_bytes", "is_valid"),
    [
        (header(), 4, True),
        (header(extra=b"12345"), 4, True),
        (header(), 5, False),
        (header(mark=b"PK\3\5"), 4, False),
        (header(name=b"b/data.pkl"), 4, False),
        (header(name=b"a/data.pk"), 4, False),
        (header()[:20], 0, False),
    ],
)
def test_the_header_of_a_file(tmp_path: Path, body: bytes, n_bytes: int, is_valid: bool) -> None:
    """Two entries cannot have one header, so that a file is not read under two names."""
    path = tmp_path / "a.zip"
    path.write_bytes(body)
    found = ZipEntry("a/data.pkl", 0, n_bytes, 7)
    if is_valid:
        assert found.start(BinaryFile(path)) == len(body) - 4
    else:
        with pytest.raises(WeightsError, match=r"not at the position|is truncated or damaged"):
            found.start(BinaryFile(path))
