"""The prompt of `gptx generate`: from the argument, a file or standard input."""

from __future__ import annotations

import codecs
import sys

import click

from gptx.errors import NotFoundError, PromptError, StorageError

SOURCES = "give PROMPT, --prompt TEXT, --file FILE, or - for standard input"
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_prompt(argument: str | None, option: str | None, file: str | None) -> str | None:
    """Return the prompt from one of its sources; None if there is none.

    Raises
    ------
    click.UsageError
        There are several.
    PromptError, NotFoundError, StorageError
        The file or standard input does not exist, cannot be read, or is no text in UTF-8.
    """
    given = [source for source in (argument, option, file) if source is not None]
    if len(given) > 1:
        raise click.UsageError(f"duplicate prompt: {SOURCES}")
    if option is not None:
        return option
    if argument == "-" or file == "-":
        return decode(sys.stdin.buffer.read(), "standard input")
    return argument if file is None else decode(_content(file), file)


def decode(data: bytes, name: str) -> str:
    """Return the text of a file: UTF-8, with or without a byte-order mark.

    CRLF is read as LF, and one line end at the end of the text is dropped: editors and `echo` add
    it.

    Raises
    ------
    PromptError
        The bytes are no text in UTF-8.
    """
    for mark, encoding in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise PromptError(_not_utf8(f"{name} is in {encoding}", encoding))
    if b"\0" in data:
        raise PromptError(
            _not_utf8(f"{name} has a byte 0, as UTF-16 and binary files have", "UTF-16")
        )
    try:
        text = data.decode().removeprefix("\ufeff")  # the mark
    except UnicodeDecodeError as error:
        bad = f"{name} has byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise PromptError(_not_utf8(bad, "WINDOWS-1252")) from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def _not_utf8(given: str, encoding: str) -> str:
    return (
        f"{given}, expected text in UTF-8: convert it, for example with "
        f"iconv -f {encoding} -t UTF-8"
    )


def _content(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except FileNotFoundError:
        raise NotFoundError(
            f"{file or repr(file)} does not exist, expected a text file with the prompt"
        ) from None
    except OSError as error:
        raise StorageError(f"{file} cannot be read ({error.strerror or error})") from error
