"""Text files in chunks: encodings, line ends, ranges, sections."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptx.errors import DataError, NotFoundError, StorageError
from gptx.training.data import texts
from gptx.training.data.texts import BEGIN, Begin, TextFile, read_range, scan, split_sections
from tests.support.cli import raises_error


def file(tmp_path: Path, data: bytes, name: str = "a.txt") -> TextFile:
    (tmp_path / name).write_bytes(data)
    return TextFile(tmp_path / name, name)


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\r\nb\rc\r\r\nd\r", "a\nb\rc\r\nd\r"),
        ("\ufeffä€𝄞\ufeff".encode(), "ä€𝄞\ufeff"),
        (b"a\n", "a\n"),
    ],
    ids=["line ends", "characters of several bytes", "plain"],
)
def test_the_text_does_not_depend_on_the_chunks(
    data: bytes, text: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "CHUNK_BYTES", chunk_bytes)
    assert "".join(file(tmp_path, data).chunks()) == text


# A wrong file is trained: llm.c #77. Binary data is no text, and the message says where.
@pytest.mark.parametrize("chunk_bytes", [4, 1000])
@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"abcdefghij\0", ("a.txt has a byte 0 at position 10",)),
        (b"\0abc", ("a.txt has a byte 0 at position 0",)),
        (b"abcdefgh\xff", ("a.txt has byte 0xff at position 8", "iconv -f WINDOWS-1252")),
        (b"abc\xe2\x82", ("a.txt has byte 0xe2 at position 3",)),
        ("ab".encode("utf-16"), ("a.txt is in UTF-16", "iconv -f UTF-16")),
        ("ab".encode("utf-32"), ("a.txt is in UTF-32",)),
    ],
    ids=["byte 0", "first byte", "invalid", "truncated", "UTF-16", "UTF-32"],
)
def test_data_that_are_no_text(
    data: bytes,
    parts: tuple[str, ...],
    chunk_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(texts, "CHUNK_BYTES", chunk_bytes)
    with raises_error(DataError, *parts):
        list(file(tmp_path, data).chunks())


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with raises_error(NotFoundError, "a.txt does not exist"):
        list(TextFile(tmp_path / "a.txt", "a.txt").chunks())
    with raises_error(StorageError, "folder cannot be read"):
        list(TextFile(tmp_path, "folder").chunks())


@pytest.mark.parametrize("chunk_bytes", [1, 4, 1000])
def test_a_limit_leaves_out_an_incomplete_character(
    chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "CHUNK_BYTES", chunk_bytes)
    path = file(tmp_path, "ab€cd".encode()).path
    assert ["".join(TextFile(path, "", n).chunks()) for n in (2, 4, 5, 7, 99)] == [
        "ab",
        "ab",
        "ab€",
        "ab€cd",
        "ab€cd",
    ]


def test_scan_counts_the_characters_of_all_files(tmp_path: Path) -> None:
    found = scan([file(tmp_path, b"bab", "1"), file(tmp_path, "𝄞b".encode(), "2")])
    assert found.n_characters == 5
    assert list(found.counts.items()) == [("a", 1), ("b", 3), ("𝄞", 1)]


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"], ids=["no byte", "mark"])
def test_an_empty_text(data: bytes, tmp_path: Path) -> None:
    with raises_error(DataError, "a.txt: the text is empty"):
        scan([file(tmp_path, data)])


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 4))
def test_a_range_of_characters(
    tmp_path_factory: pytest.TempPathFactory, first: int, last: int, chunk_bytes: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    files = [file(folder, b"abcd", "1"), file(folder, b"efg", "2")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "CHUNK_BYTES", chunk_bytes)
        items = list(read_range(files, first, last))
    assert "".join(x for x in items if isinstance(x, str)) == "abcdefg"[first:last]
    begins = [position for position in (0, 4) if first <= position < last]
    assert items.count(BEGIN) == len(begins)


@given(st.text("a\n", max_size=12), st.lists(st.integers(0, 12), max_size=4))
def test_sections_are_those_of_the_whole_text(text: str, cuts: list[int]) -> None:
    """llm.c splits the whole text at empty lines, and puts each empty line back."""
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    parts = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    sections: list[str] = []
    for item in split_sections(iter([BEGIN, *parts])):
        if isinstance(item, Begin):
            sections.append("")
        else:
            sections[-1] += item
    expected = text.split("\n\n")
    assert sections == [f"{section}\n\n" for section in expected[:-1]] + expected[-1:]
