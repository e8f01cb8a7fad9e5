"""Text files in UTF-8, read in chunks: memory does not grow with the text."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.errors import DataError, NotFoundError, StorageError

CHUNK_BYTES = 2**18  # of a file, read at a time
# UTF-32 first: its little-endian mark begins with that of UTF-16.
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

# The progress of a pass over files: called with the number of bytes that were read since.
Progress = Callable[[int], None]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def as_list(paths: Paths) -> list[str | os.PathLike[str]]:
    """Return one path or several as a list."""
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


@dataclass(frozen=True)
class TextFile:
    """One text file.

    Attributes
    ----------
    path
        Path of the file.
    name
        Its name in error messages.
    max_bytes
        Number of bytes to read, without an incomplete character at their end; None for all.
    """

    path: Path
    name: str
    max_bytes: int | None = None

    @property
    def size(self) -> int:
        """Number of bytes that are read; 0 for a file that does not exist."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        return size if self.max_bytes is None else min(size, self.max_bytes)

    def chunks(self, progress: Progress | None = None) -> Iterator[str]:
        """Yield the text in chunks of about `CHUNK_BYTES`.

        A byte-order mark is left out, and CRLF is read as LF.

        Raises
        ------
        DataError
            The file is no text in UTF-8; the message has the position of the byte.
        NotFoundError, StorageError
            The file does not exist, or cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                position, rest, carriage_return = 0, b"", ""
                left = sys.maxsize if self.max_bytes is None else self.max_bytes
                while True:
                    data = file.read(min(CHUNK_BYTES, left))
                    left -= len(data)
                    if progress is not None:
                        progress(len(data))
                    # At the limit, an incomplete character is left out.
                    text, n_bytes = self._decode(rest + data, position, final=not data and left > 0)
                    rest = (rest + data)[n_bytes:]
                    text = text.removeprefix("\ufeff") if position == 0 else text
                    position += n_bytes
                    text = carriage_return + text
                    # A carriage return at the end waits for the line feed of the next chunk.
                    carriage_return = "\r" if data and text.endswith("\r") else ""
                    text = text.removesuffix(carriage_return).replace("\r\n", "\n")
                    if text:
                        yield text
                    if not data:
                        return
        except FileNotFoundError:
            raise NotFoundError(f"{self.name} does not exist, expected a text file") from None
        except OSError as error:
            raise StorageError(f"{self.name} cannot be read ({error.strerror or error})") from error

    def _decode(self, data: bytes, position: int, *, final: bool) -> tuple[str, int]:
        """Decode the bytes from a position of the file; return the text and its bytes."""
        if position == 0:
            for mark, encoding in OTHER_MARKS.items():
                if data.startswith(mark):
                    raise DataError(_not_utf8(f"{self.name} is in {encoding}", encoding))
        if (zero := data.find(b"\0")) >= 0:
            raise DataError(
                f"{self.name} has a byte 0 at position {position + zero}, as binary files have, "
                "expected a text in UTF-8: give another file"
            )
        try:
            return codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as error:
            bad = f"byte 0x{data[error.start]:02x} at position {position + error.start}"
            raise DataError(_not_utf8(f"{self.name} has {bad}", "WINDOWS-1252")) from None


def _not_utf8(given: str, encoding: str) -> str:
    return (
        f"{given}, expected a text in UTF-8: convert it, for example with "
        f"`iconv -f {encoding} -t UTF-8`"
    )


@dataclass(frozen=True)
class Scan:
    """The result of the first pass over a text.

    Attributes
    ----------
    n_characters
        Number of characters.
    counts
        Character -> number of its occurrences, in the order of code points.
    """

    n_characters: int
    counts: dict[str, int]


def scan(files: Sequence[TextFile], progress: Progress | None = None) -> Scan:
    """Check the encoding of files, and count their characters.

    Raises
    ------
    DataError
        The text is empty, or is no text in UTF-8.
    """
    counts = np.zeros(0x110000, np.int64)
    for file in files:
        for chunk in file.chunks(progress):
            codes = code_points(chunk)
            largest = int(codes.max()) + 1
            counts[:largest] += np.bincount(codes, minlength=largest)
    n_characters = int(counts.sum())
    if n_characters == 0:
        names = " and ".join(file.name for file in files)
        raise DataError(f"{names}: the text is empty, expected some text to train on")
    return Scan(n_characters, {chr(code): int(counts[code]) for code in np.flatnonzero(counts)})


def code_points(text: str) -> np.ndarray:
    """Return the code points of a text: [characters], uint32."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


class Begin:
    """The mark of the start of a document, in a sequence of texts."""


BEGIN = Begin()


def read_range(
    files: Sequence[TextFile],
    first: int = 0,
    last: int | None = None,
    progress: Progress | None = None,
) -> Iterator[str | Begin]:
    """Yield the characters [first, last) of the joined files, with `BEGIN` before each file."""
    position = 0
    for file in files:
        if first <= position and (last is None or position < last):
            yield BEGIN
        for chunk in file.chunks(progress):
            begin, end = position, position + len(chunk)
            position = end
            if end <= first:
                continue
            if last is not None and begin >= last:
                return
            yield chunk[max(first - begin, 0) : None if last is None else last - begin]


def split_sections(items: Iterator[str | Begin]) -> Iterator[str | Begin]:
    r"""Add `BEGIN` after each "\n\n", which ends a section and stays in it.

    Sections are those of `text.split("\n\n")`: three line ends are the end of a section, and an
    empty line in the next one.
    """

    def split(text: str) -> tuple[list[str | Begin], str]:
        *sections, text = text.split("\n\n")
        parts: list[str | Begin] = [part for x in sections for part in (x + "\n\n", BEGIN)]
        text, held = (text[:-1], "\n") if text.endswith("\n") else (text, "")
        return parts + [text] * bool(text), held

    return split_pieces(items, split)


def split_pieces(
    items: Iterator[str | Begin], split: Callable[[str], tuple[list[str | Begin], str]]
) -> Iterator[str | Begin]:
    """Split texts that come in pieces; marks stay where they are.

    Parameters
    ----------
    items
        Texts and marks; a text can end at any character.
    split
        Function that returns the parts of a text, and its end, which waits for the next piece.
    """
    held = ""
    for item in items:
        if isinstance(item, Begin):
            if held:
                yield held
            held = ""
            yield item
        else:
            parts, held = split(held + item)
            yield from parts
    if held:
        yield held


def without_marks(items: Iterator[str | Begin]) -> Iterator[str]:
    """Leave out `BEGIN`: the files are one document."""
    return (item for item in items if not isinstance(item, Begin))
