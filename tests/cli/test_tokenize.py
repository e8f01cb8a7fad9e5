"""`gptx tokenize`: the pieces and the token ids of a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptx.embedded import EMBEDDED
from gptx.generation.text_model import Model
from gptx.tokenization.characters import character_tokenizer
from tests.support.cli import Done, run

SHAKESPEARE = ("--tokenizer", "shakespeare")


def tokenize(*args: str, stdin: bytes = b"") -> Done:
    done = run("tokenize", *args, stdin=stdin)
    assert (done.code, done.err) == (0, "")
    return done


def test_ids_and_pieces(shakespeare: Model) -> None:
    ids = shakespeare.encode("ROMEO:\nBut, soft!")
    cells = [f"{id} {json.dumps(shakespeare.decode([id]))}" for id in ids]
    out = tokenize("ROMEO:\nBut, soft!", *SHAKESPEARE).out
    assert out.split() == " ".join(cells).split()


def test_lines_have_at_most_80_columns(shakespeare: Model) -> None:
    out = tokenize("Shall I compare thee to a summer's day? " * 20, *SHAKESPEARE).out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert min(map(len, lines[:-1])) > 60
    assert len(lines) > 10


def test_pieces_of_characters_and_letters_that_are_not_printable() -> None:
    out = tokenize("é \x1b", *SHAKESPEARE).out
    assert r"b'\xc3'" in out
    assert r"b'\xa9'" in out
    assert r'"\u001b"' in out
    assert "\x1b" not in out


def test_columns_of_wide_characters(tmp_path: Path) -> None:
    character_tokenizer("ab日\u0301").save(tmp_path)
    out = tokenize("日\u0301ab" * 3, "--tokenizer", str(tmp_path)).out
    first = ('3 "日"  2 "\u0301"    0 "a"   1 "b"   ' * 3)[:-16].rstrip()
    assert out == f'{first}\n0 "a"   1 "b"\n'


def test_json() -> None:
    data = json.loads(tokenize("ROMEO é", *SHAKESPEARE, "--json").out)
    assert data["count"] == len(data["ids"]) == len(data["pieces"])
    assert "".join(data["pieces"]) == "ROMEO \\xc3\\xa9"
    assert json.loads(tokenize("ROMEO é", *SHAKESPEARE, "--json", "--count").out) == {
        "count": data["count"]
    }


def test_count() -> None:
    n = len(json.loads(tokenize("To be or not to be", *SHAKESPEARE, "--json").out)["ids"])
    assert tokenize("To be or not to be", *SHAKESPEARE, "--count").out == f"{n}\n"
    assert tokenize("", *SHAKESPEARE, "--count").out == "0\n"
    assert tokenize("", *SHAKESPEARE).out == ""


def test_sources_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfTo be\r\nor not\n")
    expected = tokenize("To be\nor not", *SHAKESPEARE).out
    assert tokenize("--file", str(tmp_path / "text"), *SHAKESPEARE).out == expected
    for args in (("-",), ("-f", "-")):
        assert tokenize(*args, *SHAKESPEARE, stdin=b"To be\nor not\n").out == expected


def test_special_tokens_are_text_unless_allowed() -> None:
    text = "a<|endoftext|>"
    assert tokenize(text, *SHAKESPEARE, "--allow-special", "--count").out == "2\n"
    assert int(tokenize(text, *SHAKESPEARE, "--count").out) > 5


def test_sources_of_the_tokenizer(tmp_path: Path) -> None:
    folder = EMBEDDED["shakespeare"]
    expected = tokenize("To be", *SHAKESPEARE).out
    for source in (folder, folder / "tokenizer.json"):
        assert tokenize("To be", "--tokenizer", str(source)).out == expected


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "missing text: give TEXT, --file FILE, or - for standard input"),
        (("a", "--file", "b"), 2, "duplicate text"),
        (("--file", "absent"), 66, "absent does not exist"),
        (("a", "--tokenizer", "./absent"), 66, "./absent"),
        (("a", "--tokenizer", ""), 2, "--tokenizer is ''"),
        (("a", "--tokenizer", "vowels"), 2, "--tokenizer vowels makes a vocabulary of a text"),
    ],
    ids=["no text", "two texts", "no file", "no tokenizer", "no name", "a rule"],
)
def test_errors(args: tuple[str, ...], code: int, message: str) -> None:
    done = run("tokenize", *SHAKESPEARE, *args)
    assert (done.code, done.out) == (code, "")
    assert message in done.err


def test_a_character_without_a_token(tmp_path: Path) -> None:
    character_tokenizer("ab").save(tmp_path)
    done = run("tokenize", "abc", "--tokenizer", str(tmp_path))
    assert (done.code, done.out) == (65, "")
    assert "the text has 'c' at character 2" in done.err
