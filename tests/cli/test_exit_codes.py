"""How the command line ends: signals, closed pipes, full disks and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from gptx.errors import DeviceOutOfMemory
from gptx.generation.api import Model
from tests.support.cli import (
    ENDLESS,
    GENERATE,
    PROGRAM,
    STATISTICS,
    error_lines,
    posix,
    read,
    run,
    start,
)


@posix
def test_ctrl_c_keeps_the_text(shakespeare: Model) -> None:
    expected = str(shakespeare.generate("ROMEO:", max_tokens=30)).encode()[:20]
    with start(*ENDLESS) as process:
        text = read(process, 20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert (text + out).startswith(expected)
    assert error_lines(err)[-1] == b"Interrupted"


# The signal comes after four tokens, wherever the process is by then.
INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from gptx.generation.engine import TokenGenerator
steps = TokenGenerator.__iter__
def interrupted(self):
    for n, step in enumerate(steps(self)):
        if n == 4:
            os.kill(os.getpid(), signal.SIGINT)
        yield step
TokenGenerator.__iter__ = interrupted
from gptx.cli import main
main()
"""


@posix
def test_ctrl_c_keeps_the_json(shakespeare: Model) -> None:
    whole = shakespeare.generate("ROMEO:", max_tokens=5)
    with start(*ENDLESS, "--json", program=INTERRUPTED) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    data = json.loads(out)
    assert data["finish_reason"] == "interrupted"
    assert len(data["tokens"]) in (4, 5)
    assert data["tokens"] == whole.tokens[: len(data["tokens"])]
    assert data["text"]
    assert str(whole).startswith(data["text"])
    statistics, last = error_lines(err)
    assert STATISTICS.fullmatch(statistics.decode())
    assert last == b"Interrupted"


def test_ctrl_c_while_writing_still_gives_the_figures(
    shakespeare: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two tokens is where it hits whoever reacts to what was printed."""
    pieces = [str(chunk) for chunk in shakespeare.stream("ROMEO:", max_tokens=3)]
    assert all(pieces)
    module = sys.modules["gptx.cli.generate"]
    real = module.click.echo
    written: list[str] = []

    def echo(message: str = "", **options: Any) -> None:
        real(message, **options)
        written.append(message)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "click", SimpleNamespace(echo=echo))
    done = run(*GENERATE, "-n", "20", "ROMEO:")
    assert done.code == 130
    assert done.out == "".join(pieces) + "\n"
    assert "finish: interrupted" in done.err


@posix
def test_a_reader_that_leaves_ends_it_quietly() -> None:
    with start(*ENDLESS) as process:
        read(process, 5)
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 141
    assert len(error_lines(err)) <= 1


EVERY_OUTPUT = [
    (*GENERATE, "-n", "3", "-q", "O"),
    (*GENERATE, "-n", "3", "-q", "--json", "O"),
    ("info", "shakespeare"),
    ("backends", "--json"),
    ("download", "shakespeare"),
    ("--version",),
    ("--help",),
    ("generate", "--help"),
]


@posix
@pytest.mark.parametrize("args", EVERY_OUTPUT, ids=" ".join)
def test_nobody_reads(args: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with start(*args, stdout=writer) as process:
        os.close(writer)
        _, err = process.communicate(timeout=120)
    assert len(error_lines(err)) <= 1
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("args", EVERY_OUTPUT, ids=" ".join)
def test_full_disk(args: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full, start(*args, stdout=full.fileno()) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 74
    assert error_lines(err) == [b"Error: standard output: No space left on device"]


CLOSED = "import os; os.close({}); os.execv({!r}, [{!r}, '-c', {!r}, *__import__('sys').argv[1:]])"


@posix
@pytest.mark.parametrize(
    ("fd", "prompt", "codes"), [(0, "-", (65, 74)), (1, "O", (0, 74)), (2, "O", (0,))]
)
def test_a_closed_stream_is_no_traceback(fd: int, prompt: str, codes: tuple[int, ...]) -> None:
    program = CLOSED.format(fd, sys.executable, sys.executable, PROGRAM)
    with start(*GENERATE, "-n", "3", "-q", prompt, program=program) as process:
        out, err = process.communicate(timeout=120)
    assert len(error_lines(err)) <= 1
    assert process.returncode in codes
    assert bool(out) == (fd == 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_error_that_cannot_be_said_keeps_its_code() -> None:
    codes = []
    for args in (("generate",), (*GENERATE, "")):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, *args], stderr=full, stdout=full, check=False
            )
        codes.append(done.returncode)
    assert codes == [2, 65]


@pytest.mark.parametrize("args", [("download",), ("info",), ("nonsense",), ("generate", "--no")])
def test_usage_errors(args: tuple[str, ...]) -> None:
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    [line] = done.err.splitlines()
    assert line.startswith("Error: ")
    assert re.search(r"\(see gptx( \w+)? --help\)$", line)


def test_memory_running_out_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    error = DeviceOutOfMemory("memory ran out on the numpy backend")
    module = sys.modules["gptx.cli.generate"]  # the package's attribute is the command
    monkeypatch.setattr(module, "load_once", mock.Mock(side_effect=error))
    assert run("generate", "-m", "shakespeare", "O") == (71, "", f"Error: {error}\n")
