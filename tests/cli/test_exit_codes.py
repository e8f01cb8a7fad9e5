"""Exit codes after signals, closed pipes, full disks and errors."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from gptx.cli import app
from gptx.errors import DeviceOutOfMemory
from gptx.generation.text_model import Model
from tests.support.cli import (
    GENERATE,
    LONG_RUN,
    PROGRAM,
    STATISTICS,
    error_lines,
    posix,
    read,
    run,
    run_into,
    start,
)

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@posix
def test_ctrl_c_keeps_the_text_and_the_cache(shakespeare: Model, tmp_path: Path) -> None:
    """The text is printed during the generation, and is complete after the interrupt."""
    expected = str(shakespeare.generate("ROMEO:", max_tokens=30)).encode()[:20]
    with start(*LONG_RUN, "--prompt-cache", str(tmp_path / "cache")) as process:
        assert read(process, 20) == expected
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error_lines(err)[-1] == b"Interrupted"
    cache = shakespeare.load_cache(tmp_path / "cache")
    assert cache.tokens is not None
    assert len(cache.tokens[0]) >= 4


# The process gets the signal after four tokens, at any point of its code.
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
    complete = shakespeare.generate("ROMEO:", max_tokens=5)
    with start(*LONG_RUN, "--json", program=INTERRUPTED) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    data = json.loads(out)
    assert data["finish_reason"] == "interrupted"
    assert len(data["tokens"]) in (4, 5)
    assert data["tokens"] == complete.tokens[: len(data["tokens"])]
    assert data["text"]
    assert str(complete).startswith(data["text"])
    statistics, last = error_lines(err)
    assert STATISTICS.fullmatch(statistics.decode())
    assert last == b"Interrupted"


def test_ctrl_c_during_a_write_keeps_the_statistics(
    shakespeare: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt arrives outside of the generator, between two tokens."""
    pieces = [str(chunk) for chunk in shakespeare.stream("ROMEO:", max_tokens=3)]
    assert all(pieces)
    import gptx.cli.streaming as module

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
def test_a_pipe_that_closes_during_the_output() -> None:
    with start(*LONG_RUN) as process:
        read(process, 5)
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 141
    assert len(error_lines(err)) <= 1


OUTPUTS = [
    (*GENERATE, "-n", "3", "-q", "O"),
    (*GENERATE, "-n", "3", "-q", "--json", "O"),
    ("info", "shakespeare"),
    ("backends", "--json"),
    ("download", "shakespeare"),
    ("--version",),
    ("--help",),
    ("generate", "--help"),
]


def closed_pipe() -> int:
    """The end for writing of a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@posix
@pytest.mark.parametrize("args", OUTPUTS, ids=" ".join)
def test_closed_pipe(args: tuple[str, ...]) -> None:
    done = run_into(closed_pipe(), *args)
    assert done.code == 141
    assert done.err.count("\n") <= 1


@posix
def test_closed_pipe_of_a_process() -> None:
    writer = closed_pipe()
    with start("--help", stdout=writer) as process:
        os.close(writer)
        _, err = process.communicate(timeout=120)
    assert len(error_lines(err)) <= 1
    assert process.returncode == 141


DISK_FULL = "Error: standard output: No space left on device"


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@needs_dev_full
@pytest.mark.parametrize("args", OUTPUTS, ids=" ".join)
def test_full_disk(args: tuple[str, ...]) -> None:
    assert run_into(full_disk(), *args) == (74, "", f"{DISK_FULL}\n")


@needs_dev_full
def test_full_disk_of_a_process() -> None:
    with open("/dev/full", "wb") as full, start(*OUTPUTS[0], stdout=full.fileno()) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 74
    assert error_lines(err) == [DISK_FULL.encode()]


@needs_dev_full
def test_an_error_message_that_cannot_be_written() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", PROGRAM, "nonsense"]
        done = subprocess.run(command, stderr=full, stdout=full, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize(("name", "code"), [("stdin", 65), ("stdout", 0), ("stderr", 0)])
def test_closed_standard_stream(
    name: str, code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python sets a stream to None if the parent process has closed it."""
    monkeypatch.setattr(sys, name, None)
    ended = app.run([*GENERATE, "-n", "3", "-q", "-" if name == "stdin" else "O"])
    getattr(sys, name).close()
    assert ended == code
    out, err = capfd.readouterr()
    assert bool(out) == (name == "stderr")
    assert bool(err) == (name == "stdin")


@posix
def test_closed_standard_output_of_a_process() -> None:
    command = ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, "-c", PROGRAM]
    done = subprocess.run([*command, "download", "shakespeare"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"")
    assert error_lines(done.stderr) == []


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (("download",), "gptx download"),
        (("info",), "gptx info"),
        (("nonsense",), "gptx"),
        (("--no",), "gptx"),
        (("generate", "--no"), "gptx generate"),
        (("generate", "-p"), "gptx generate"),
        (("generate", "-q=1"), "gptx generate"),
    ],
)
def test_usage_errors(args: tuple[str, ...], command: str) -> None:
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    [line] = done.err.splitlines()
    assert line.startswith("Error: ")
    assert line.endswith(f" (see {command} --help)")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DeviceOutOfMemory("out of memory"), "Error: out of memory\n"),
        (MemoryError("3 GB"), "Error: out of memory (3 GB): use a smaller model\n"),
        (
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            "Error: out of memory ([Errno 12] Cannot allocate memory): use a smaller model\n",
        ),
    ],
    ids=["device", "host", "system call"],
)
def test_out_of_memory(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptx.cli.generate.load_once", mock.Mock(side_effect=error))
    assert run(*GENERATE, "O") == (71, "", message)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EACCES, "Permission denied", "file"), "Error: file: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left"), "Error: standard output: No space left\n"),
        (OSError(errno.EMFILE, "Too many open files"), "Error: Too many open files\n"),
        (OSError("another"), "Error: another\n"),
    ],
)
def test_other_errors_of_the_system(
    error: OSError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard output is named only for an error of a write."""
    monkeypatch.setattr("gptx.cli.generate.load_once", mock.Mock(side_effect=error))
    assert run(*GENERATE, "O") == (74, "", message)
