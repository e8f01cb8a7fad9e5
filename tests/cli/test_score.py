"""`gptx score`: the table, the JSON, the colors on a terminal, errors."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from gptx.generation.results import Score
from gptx.generation.text_model import Model
from tests.support.cli import PROGRAM, posix, run

command: Any = importlib.import_module("gptx.cli.score")  # of which the command has the name
SCORE = ("score", "-m", "shakespeare")
TEXT = "To be, or not to be"


def test_a_line_for_each_token(shakespeare: Model) -> None:
    done = run(*SCORE, TEXT)
    expected = shakespeare.score(TEXT)
    assert done.code == 0
    head, *lines = done.out.splitlines()
    assert head.split() == ["logprob", "id", "token"]
    rows = [line.split(maxsplit=2) for line in lines]
    assert [row[1:] for row in rows] == [
        [str(id), repr(shakespeare.decode([id]))] for id in expected.tokens
    ]
    assert rows[0][0] == "-"
    assert [row[0] for row in rows[1:]] == [f"{x:.4f}" for x in expected.logprobs[1:]]
    assert done.err == (
        f"[{len(rows)} tokens, {len(rows) - 1} scored | {expected.loss:.4f} nats per token | "
        f"perplexity {expected.perplexity:,.4g}]\n"
    )


def test_json(shakespeare: Model) -> None:
    done = run(*SCORE, "--json", "--top-logprobs", "2", "-q", TEXT)
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)
    expected = shakespeare.score(TEXT, top_logprobs=2)
    assert [token["id"] for token in data["tokens"]] == expected.tokens
    assert [token["logprob"] for token in data["tokens"]] == expected.logprobs
    assert "".join(token["text"] for token in data["tokens"]) == TEXT
    assert expected.top_logprobs is not None
    for token, top in zip(data["tokens"], expected.top_logprobs, strict=True):
        assert token["top_logprobs"] == (
            top
            and [{"id": i, "text": shakespeare.decode([i]), "logprob": x} for i, x in top.items()]
        )
    numbers = [data[name] for name in ("scored", "total", "loss", "perplexity")]
    assert numbers == [expected.n_scored, expected.total, expected.loss, expected.perplexity]
    assert [data[name] for name in ("model", "backend", "dtype")] == [
        *("shakespeare", "numpy", "float32")
    ]


def test_sources_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(f"{TEXT}\n")
    expected = run(*SCORE, TEXT)
    for args, stdin in [
        (("-f", str(path)), b""),
        (("-",), TEXT.encode()),
        (("-f", "-"), TEXT.encode()),
    ]:
        assert run(*SCORE, *args, stdin=stdin) == expected


def test_options_of_the_score(shakespeare: Model) -> None:
    long = "to be or not " * 50
    done = run(*SCORE, "--stride", "100", "--json", long)
    expected = shakespeare.score(long, stride=100).loss
    assert json.loads(done.out)["loss"] == pytest.approx(expected, abs=1e-5)
    done = run(*SCORE, "--allow-special", "--json", "<|endoftext|>O")
    ids = [token["id"] for token in json.loads(done.out)["tokens"]]
    assert ids == [shakespeare.config.eos_token_id, *shakespeare.encode("O")]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "missing text: give TEXT, --file FILE, or - for standard input"),
        (("a", "-f", "b"), 2, "duplicate text: give TEXT, --file FILE, or -"),
        (("to", "be"), 2, "extra arguments (be): put a text of several words in quotes"),
        (("--stride", "0", TEXT), 2, "--stride is 0, expected 1 to 256 (the context)"),
        (("--stride", "x", TEXT), 2, "'x' is not a valid integer"),
        (("--top-logprobs", "-1", TEXT), 2, "--top-logprobs is -1, expected a whole number of"),
        (("--top-logprobs", "2000", TEXT), 2, "--top-logprobs is 2000, expected at most 1024"),
        (("--dtype", "float16", TEXT), 2, "--dtype is 'float16', the numpy backend computes in"),
        (("",), 65, "the prompt is empty"),
        (("O",), 65, "the text has 1 token, expected at least 2: give a longer text, or start it"),
        (("-f", "nowhere.txt"), 66, "nowhere.txt does not exist"),
    ],
)
def test_errors(args: tuple[str, ...], code: int, message: str) -> None:
    done = run(*SCORE, *args)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_an_unknown_model() -> None:
    assert run("score", "-m", "./nowhere", TEXT).code == 66


def test_a_model_without_a_tokenizer(folder: Callable[..., Path]) -> None:
    done = run("score", "-m", str(folder()), TEXT)
    assert (done.code, done.out) == (65, "")
    assert "has no tokenizer" in done.err


# Colors


def test_the_color_of_each_token(shakespeare: Model) -> None:
    ids = shakespeare.encode(TEXT)
    logprobs = [None, 0.0, -0.7, -1.7, -3.1, -5.0, -7.0][: len(ids)]
    text = command.colored(shakespeare, Score(ids, logprobs))
    assert click.unstyle(text) == TEXT
    found = re.findall(r"\x1b\[38;5;16m\x1b\[48;5;(\d+)m([^\x1b]*)\x1b\[0m", text)
    colors = [None, None, 229, 222, 215, 209, 203]
    assert found == [
        (str(color), shakespeare.decode([id]))
        for color, id in zip(colors, ids, strict=False)
        if color
    ]


def test_line_ends_and_control_characters(shakespeare: Model) -> None:
    ids = shakespeare.encode("a\n\nb\x1b[31m\tc")
    text = command.colored(shakespeare, Score(ids, [-9.0] * len(ids)))
    assert click.unstyle(text) == "a↵\n↵\nb\ufffd[31m\tc"
    assert not re.search(r"48;5;\d+m[^\x1b]*\n", text)  # no color across the end of a line


def test_characters_of_several_tokens(shakespeare: Model) -> None:
    ids = shakespeare.encode("naïve 漢")
    text = command.colored(shakespeare, Score(ids, [-9.0] * len(ids)))
    assert click.unstyle(text) == "naïve 漢"


@pytest.mark.parametrize(
    ("variables", "args", "has_colors"),
    [
        ({}, (), True),
        ({"NO_COLOR": "1"}, (), False),
        ({"NO_COLOR": ""}, (), True),
        ({"TERM": "dumb"}, (), False),
        ({}, ("--table",), False),
        ({}, ("--top-logprobs", "1"), False),
        ({}, ("--json",), False),
    ],
)
def test_colors_are_for_terminals(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    args: tuple[str, ...],
    has_colors: bool,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    shown: list[Any] = []
    monkeypatch.setattr(command, "colored", lambda *given: shown.append(given) or "")
    assert run(*SCORE, *args, TEXT).code == 0
    assert not shown  # standard output is no terminal
    monkeypatch.setattr(command, "_is_terminal", lambda: True)
    assert run(*SCORE, *args, TEXT).code == 0
    assert bool(shown) == has_colors


@posix
def test_on_a_terminal(shakespeare: Model) -> None:
    """The text in colors, and nothing else, on standard output."""
    import pty
    import subprocess

    master, slave = pty.openpty()
    environment = {k: x for k, x in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *SCORE, TEXT],
        stdout=slave,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            new = os.read(master, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not new:
            break
        shown += new
    assert process.stderr is not None
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0
    os.close(master)
    assert "\x1b[48;5;" in shown.decode()
    assert click.unstyle(shown.decode()).replace("\r\n", "\n") == f"{TEXT}\n"
    legend, summary = err.splitlines()
    assert legend == click.unstyle(command.legend())
    assert "nats per token" in summary
