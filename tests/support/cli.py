"""Runs of the command line, in this process or in a child, and checks of its errors."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple, TextIO
from unittest import mock

import pytest

from gptx.cli import app
from gptx.errors import GptxError

GENERATE = ("generate", "-m", "shakespeare")
# Takes at least 5 s, and has too few tokens for the command to compile the model.
LONG_RUN = (*GENERATE, "ROMEO:", "-n", "4000", "--overflow", "slide", "--ignore-eos")
STATISTICS = re.compile(
    r"\[prompt: \d+ tokens, [\d,]+ tokens per second \| output: \d+ tokens, .* \| "
    r"peak memory: .* \| seed: \d+ \| finish: (\w+)\]"
)
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and pipes")


class Done(NamedTuple):
    """The exit code and the output of a command."""

    code: Any
    out: str
    err: str


def run(*args: str, stdin: bytes = b"", encoding: str = "utf-8") -> Done:
    """Run `gptx args` in this process; `encoding` is that of the standard streams."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, newline="") for _ in range(2))
    code = _exit_code(args, out, err, stdin)
    texts = []
    for stream in (out, err):
        stream.flush()
        stream.seek(0)
        texts.append(stream.read())
    return Done(code, *texts)


def run_into(file: int, *args: str) -> Done:
    """Run `gptx args` in this process with standard output to a file descriptor.

    The file is closed at the end, as at the exit of a process: output that is left in the buffer
    and cannot be written raises here.
    """
    err = io.StringIO()
    with open(file, "w", encoding="utf-8") as out:
        code = _exit_code(args, out, err)
    return Done(code, "", err.getvalue())


def _exit_code(args: Sequence[str], out: TextIO, err: TextIO, stdin: bytes = b"") -> Any:
    with (
        mock.patch.dict(os.environ),  # `run` sets OpenBLAS's variable
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8")),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            return app.run(args)
        except SystemExit as end:  # of click's completion
            return end.code


# A shell can start background jobs with SIGINT ignored, which children inherit.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from gptx.cli import main\n"
    "main()"
)


def start(
    *args: str | bytes, program: str = PROGRAM, stdout: int = subprocess.PIPE, **env: str
) -> subprocess.Popen[bytes]:
    """Start `gptx args` in a child process, with unbuffered pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | env,
    )


def read(process: subprocess.Popen[bytes], n: int) -> bytes:
    """Read the next `n` bytes of its standard output."""
    assert process.stdout is not None
    data = b""
    while len(data) < n:
        new = process.stdout.read(n - len(data))
        assert new, f"standard output ended after {data!r}"
        data += new
    return data


def error_lines(err: bytes) -> list[bytes]:
    """Split standard error into lines, of which none belongs to a traceback."""
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err
    return [line for line in err.splitlines() if line]


@contextmanager
def raises_error(kind: type[GptxError], *parts: str) -> Iterator[None]:
    """Expect an error of exactly this class, in one line that has each of `parts`."""
    with pytest.raises(GptxError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for part in parts:
        assert part in message


def assert_generate_fails(*args: str, code: int, message: str, stdin: bytes = b"") -> None:
    """Run `gptx generate -m shakespeare args`; expect one line of error, and no output."""
    done = run(*GENERATE, *args, stdin=stdin)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("Error: ")
    assert message in done.err
    assert done.err.count("\n") == 1


def short_id(value: object) -> str:
    """Return the id of a test's parameter, the same in all processes of a run."""
    if type(value).__repr__ is object.__repr__ or " at 0x" in repr(value):
        return type(value).__name__
    return repr(value)[:40].replace("\n", "")
