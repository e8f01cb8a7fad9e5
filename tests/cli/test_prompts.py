"""gptx.cli.prompts: the prompt from an argument, a file or standard input, and its encoding."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path

import pytest

from gptx.cli.prompts import decode, read_prompt
from gptx.errors import PromptError
from tests.support.cli import GENERATE, posix, run

TEXTS = [
    (b"one", "one"),
    (b"one\n", "one"),
    (b"one\n\n", "one\n"),
    (b"one\r\n", "one"),
    (b"one\r\ntwo\r\n", "one\ntwo"),
    (b"one\r\n\r\n", "one\n"),
    (b"one\rtwo\r", "one\rtwo\r"),  # a carriage return without a line feed is text
    (codecs.BOM_UTF8 + b"one\r\n", "one"),
    (codecs.BOM_UTF8 + codecs.BOM_UTF8 + b"one", "\ufeffone"),  # the second is a character
    (b"one" + codecs.BOM_UTF8, "one\ufeff"),
    ("naïve — 漢 🙂".encode(), "naïve — 漢 🙂"),
    (b"", ""),
    (codecs.BOM_UTF8, ""),
]


@pytest.mark.parametrize(("data", "text"), TEXTS)
def test_text_of_a_file(data: bytes, text: str) -> None:
    assert decode(data, "file") == text


@pytest.mark.parametrize(
    ("encoding", "fault"),
    [
        ("utf-16", "is in UTF-16, expected text in UTF-8: convert it, for example with iconv -f"),
        ("utf-32", "is in UTF-32, expected text in UTF-8: convert it, for example with iconv -f"),
        ("utf-16-le", "has a byte 0, as UTF-16 and binary files have"),
        ("utf-16-be", "has a byte 0, as UTF-16 and binary files have"),
        ("latin-1", "has byte 0xef at position 2, expected text in UTF-8"),
    ],
)
def test_other_encodings_are_named(encoding: str, fault: str) -> None:
    with pytest.raises(PromptError) as caught:
        decode("naïve".encode(encoding), "notes.txt")
    assert str(caught.value).startswith(f"notes.txt {fault}")


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE])
def test_big_endian_marks(mark: bytes) -> None:
    with pytest.raises(PromptError, match="is in UTF-"):
        decode(mark + b"\0a", "file")


def test_a_position_counts_from_the_start_of_the_file() -> None:
    with pytest.raises(PromptError, match="byte 0xff at position 4"):
        decode(codecs.BOM_UTF8 + b"a\xff", "file")


@pytest.mark.parametrize(
    ("argument", "option", "expected"),
    [("a", None, "a"), (None, "a", "a"), (None, "-", "-"), ("", None, ""), (None, None, None)],
)
def test_a_prompt_of_the_command_line(
    argument: str | None, option: str | None, expected: str | None
) -> None:
    assert read_prompt(argument, option, None) == expected


def prompt_of(*args: str, stdin: bytes = b"") -> str:
    done = run(*GENERATE, "-n", "1", "--json", *args, stdin=stdin)
    assert done.code == 0, done.err
    prompt: str = json.loads(done.out)["prompt"]
    return prompt


@pytest.mark.parametrize("data", [b"ROMEO:", b"ROMEO:\r\n", codecs.BOM_UTF8 + b"ROMEO:\n"])
def test_files_and_standard_input_are_read_alike(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    assert prompt_of("-f", str(path)) == "ROMEO:"
    assert prompt_of("--file", str(path)) == "ROMEO:"
    assert prompt_of("--file", "-", stdin=data) == "ROMEO:"
    assert prompt_of("-", stdin=data) == "ROMEO:"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = run(*GENERATE, "--file", str(tmp_path / "none"))
    assert (missing.code, missing.out) == (66, "")
    assert "none does not exist, expected a text file with the prompt" in missing.err
    empty = run(*GENERATE, "--file", "")
    assert (empty.code, empty.out) == (66, "")
    assert "'' does not exist, expected a text file" in empty.err
    folder = run(*GENERATE, "--file", str(tmp_path))
    assert (folder.code, folder.out) == (74, "")
    assert "cannot be read" in folder.err


@posix
def test_a_prompt_from_a_fifo(tmp_path: Path) -> None:
    """As from `--file <(command)` in a shell."""
    reader, writer = os.pipe()
    os.write(writer, b"ROMEO:\n")
    os.close(writer)
    assert prompt_of("--file", f"/dev/fd/{reader}") == "ROMEO:"
    os.close(reader)


@pytest.mark.parametrize("args", [("a", "-f", "b"), ("-p", "a", "-f", "b"), ("-", "-f", "-")])
def test_duplicate_prompts(args: tuple[str, ...]) -> None:
    done = run(*GENERATE, *args)
    assert (done.code, done.out) == (2, "")
    assert "duplicate prompt: give PROMPT, --prompt TEXT, --file FILE, or -" in done.err


def test_a_prompt_is_checked_before_the_model_is_loaded() -> None:
    done = run("generate", "-m", "./nowhere", "-", stdin=b"\xff")
    assert done.code == 65
    assert "standard input has byte 0xff at position 0" in done.err
