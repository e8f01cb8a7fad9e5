"""Signals at each stage of a command: exit codes, no traceback, no file that is left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gptx
from tests.support.cli import GENERATE, LONG_RUN, error_lines, posix, read, start

pytestmark = posix
ROOT = str(Path(gptx.__file__).parents[1])
SIGNALS = [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)]
each_signal = pytest.mark.parametrize(("name", "code"), SIGNALS)

# The process sends itself the signal SENT, at the point that a line after this one selects.
PREPARE = """
import os, signal
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
def send(): os.kill(os.getpid(), getattr(signal, os.environ["SENT"]))
def sending(function):
    def call(*args):
        send()
        return function(*args)
    return call
import gptx.cli
from gptx.cli import app, signals
"""
BEFORE = [
    pytest.param("signals.raise_exceptions = send", id="before the command runs"),
    pytest.param("app.load_command = sending(app.load_command)", id="while it is imported"),
    pytest.param("app.select_kernels = send", id="at the start"),
]
RUN = "\ngptx.cli.main()\n"


def run_signaled(name: str, point: str, *args: str) -> tuple[int, bytes, list[bytes]]:
    with start(*args, program=f"{PREPARE}{point}{RUN}", SENT=name) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, error_lines(err)


def interrupted(name: str) -> list[bytes]:
    return [b"Interrupted"] if name == "SIGINT" else []


@pytest.mark.parametrize("point", BEFORE)
def test_before_the_command_the_process_ends_at_once(point: str) -> None:
    assert run_signaled("SIGINT", point, "backends") == (130, b"", [b"Interrupted"])


@each_signal
def test_at_the_exit_of_the_process(name: str, code: int) -> None:
    point = "import atexit; atexit.register(send)"
    ended, out, err = run_signaled(name, point, "download", "shakespeare")
    assert (ended, err) == (code, interrupted(name))
    assert out.endswith(b"shakespeare\n")


@pytest.mark.parametrize(
    ("name", "code", "destination"),
    [(*row, name) for row, name in zip(SIGNALS, ("folder", "out.gguf", "folder"), strict=True)],
)
def test_a_conversion_leaves_nothing(
    tmp_path: Path, name: str, code: int, destination: str
) -> None:
    """The signal arrives when the temporary file is complete."""
    args = ("convert", "shakespeare", str(tmp_path / destination))
    ended, out, err = run_signaled(name, "os.fsync = sending(os.fsync)", *args)
    assert (ended, out, err) == (code, b"", interrupted(name))
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_signal_does_not_stop_the_cleaning_up(tmp_path: Path) -> None:
    point = (
        "import gptx.files; gptx.files._remove = sending(gptx.files._remove)\n"
        "os.fsync = sending(os.fsync)"
    )
    args = ("convert", "shakespeare", str(tmp_path / "out.gguf"))
    assert run_signaled("SIGINT", point, *args) == (130, b"", [b"Interrupted"])
    assert list(tmp_path.iterdir()) == []


def test_a_generation_ends() -> None:
    with start(*LONG_RUN, program=PREPARE + RUN, SENT="") as process:
        assert read(process, 5)
        process.terminate()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert error_lines(err) == []


def test_a_worker_of_a_benchmark_ends_with_it(folder: Callable[..., Path]) -> None:
    """The worker holds standard error open, whose end is waited for."""
    tests = ("-p", "3", "-n", "0", "--batch", "1,2,3", "--generic")
    args = ("bench", "-m", str(folder()), *tests, "-o", "jsonl")
    with start(*args) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.terminate()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert error_lines(err) == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_that_the_parent_ignores_stays_ignored(name: str) -> None:
    """As with nohup."""
    point = (
        "signal.signal(getattr(signal, os.environ['SENT']), signal.SIG_IGN)\n"
        "signals.raise_exceptions = send"
    )
    ended, out, err = run_signaled(name, point, "download", "shakespeare")
    assert (ended, err) == (0, [])
    assert out


def test_a_library_installs_no_handler() -> None:
    program = (
        "import signal\n"
        "def handlers(): return [signal.getsignal(n) for n in sorted(signal.valid_signals())]\n"
        "before = handlers()\n"
        "import gptx.cli.app, gptx.cli.generate, gptx.cli.signals\n"
        f"gptx.cli.app.run({[*GENERATE, '-n', '2', 'O']!r})\n"
        "assert handlers() == before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_the_entry_point_imports_little() -> None:
    """A signal before `main` ends in a traceback."""
    program = (
        f"import sys; sys.path.insert(0, {ROOT!r}); import gptx.cli, gptx.cli.signals\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-I", "-S", "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    modules = set(done.stdout.split())
    assert {"gptx", "gptx.cli", "gptx.cli.signals"} <= modules
    assert not modules & {"typing", "re", "pathlib", "click", "numpy", "gptx.errors"}
