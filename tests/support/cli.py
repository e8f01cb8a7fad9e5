"""Running the command line, in this process or in one of its own, and reading what it said."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple
from unittest import mock

import pytest

from gptx.cli import main

GENERATE = ("generate", "-m", "shakespeare")
ENDLESS = (*GENERATE, "ROMEO:", "-n", "100000", "--overflow", "slide", "--ignore-eos")
STATISTICS = re.compile(
    r"\[prompt: \d+ tokens, [\d,]+ tokens per second \| output: \d+ tokens, .* \| "
    r"peak memory: .* \| seed: \d+ \| finish: (\w+)\]"
)
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")


class Done(NamedTuple):
    """How a command ended."""

    code: Any
    out: str
    err: str


def run(*args: str, stdin: bytes = b"") -> Done:
    """Run `gptx args` in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with (
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8")),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main(args)
    texts = []
    for stream in (out, err):
        stream.flush()
        stream.seek(0)
        texts.append(stream.read())
    return Done(end.value.code, *texts)


# A shell may start its background jobs with SIGINT ignored, which children inherit.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from gptx.cli import main\n"
    "main()"
)


def start(
    *args: str | bytes, program: str = PROGRAM, stdout: int = subprocess.PIPE, **env: str
) -> subprocess.Popen[bytes]:
    """Start `gptx args` in a process of its own, with unbuffered pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | env,
    )


def read(process: subprocess.Popen[bytes], n: int) -> bytes:
    """`n` bytes of its standard output, as soon as they are there."""
    assert process.stdout is not None
    data = b""
    while len(data) < n:
        new = process.stdout.read(n - len(data))
        assert new, f"standard output ended after {data!r}"
        data += new
    return data


def error_lines(err: bytes) -> list[bytes]:
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err
    return [line for line in err.splitlines() if line]
