"""Signals at each stage of a command: exit codes, no traceback, no file that is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import gptx
from gptx.cli import signals
from tests.support.cli import GENERATE, error_lines, posix, run, start

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
RUN = "\ngptx.cli.main()\n"


def run_signaled(name: str, point: str, *args: str) -> tuple[int, bytes, list[bytes]]:
    with start(*args, program=f"{PREPARE}{point}{RUN}", SENT=name) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, error_lines(err)


@each_signal
@pytest.mark.parametrize("runs", [False, True])
def test_a_signal_ends_the_process_or_raises_an_exception(
    monkeypatch: pytest.MonkeyPatch, name: str, code: int, runs: bool
) -> None:
    """In the process of the tests, whose handlers stay."""
    monkeypatch.setattr(signals, "_raises", False)
    monkeypatch.setattr(signals, "_last", {})
    exits, written = mock.Mock(side_effect=SystemExit), mock.Mock()
    monkeypatch.setattr(signals, "os", SimpleNamespace(_exit=exits, write=written))
    if runs:
        signals.raise_exceptions()
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        signals._handle(getattr(signal, name), None)
    if runs:
        exits.assert_not_called()
        kind = KeyboardInterrupt if name == "SIGINT" else SystemExit
        assert type(caught.value) is kind
        assert getattr(caught.value, "code", 130) == code
    else:
        exits.assert_called_once_with(code)
    assert written.called == (name == "SIGINT" and not runs)


def test_a_repeated_signal_is_ignored_for_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_raises", True)
    monkeypatch.setattr(signals, "_last", {})
    seconds = iter((10.0, 10.9, 11.1, 11.2, 11.3))
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=seconds.__next__))

    def handle() -> bool:
        try:
            signals._handle(signal.SIGINT, None)
        except KeyboardInterrupt:
            return True
        return False

    assert [handle() for _ in range(4)] == [True, False, True, False]
    signals.rearm()
    assert handle()


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    """As with nohup."""
    numbers = [getattr(signal, name) for name, _ in SIGNALS]
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        signal.signal(numbers[0], signal.default_int_handler)
        signals.install()
        assert [signal.getsignal(n) for n in numbers] == [
            signals._handle,
            signal.SIG_IGN,
            signal.SIG_IGN,
        ]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_while_a_command_is_imported_the_process_ends_at_once() -> None:
    point = "app.load_command = sending(app.load_command)"
    assert run_signaled("SIGINT", point, "backends") == (130, b"", [b"Interrupted"])


def test_at_the_exit_of_the_process() -> None:
    point = "import atexit; atexit.register(send)"
    ended, out, err = run_signaled("SIGINT", point, "download", "shakespeare")
    assert (ended, err) == (130, [b"Interrupted"])
    assert out.endswith(b"shakespeare\n")


def test_a_conversion_leaves_nothing(tmp_path: Path) -> None:
    """The signal arrives when the temporary folder is complete."""
    args = ("convert", "shakespeare", str(tmp_path / "folder"))
    assert run_signaled("SIGTERM", "os.fsync = sending(os.fsync)", *args) == (143, b"", [])
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_signal_does_not_stop_the_cleaning_up(tmp_path: Path) -> None:
    point = (
        "import gptx.files; gptx.files._remove = sending(gptx.files._remove)\n"
        "os.fsync = sending(os.fsync)"
    )
    args = ("convert", "shakespeare", str(tmp_path / "out.gguf"))
    assert run_signaled("SIGINT", point, *args) == (130, b"", [b"Interrupted"])
    assert list(tmp_path.iterdir()) == []


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


def test_a_library_installs_no_handler() -> None:
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    assert run(*GENERATE, "-n", "2", "O").code == 0
    assert [signal.getsignal(number) for number in sorted(signal.valid_signals())] == handlers
    assert signals._handle not in handlers


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
