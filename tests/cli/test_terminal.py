"""The session on a terminal: a pseudo-terminal stands in for the user."""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest

from gptx.cli import terminal
from tests.support.cli import GENERATE, PROGRAM, run

if sys.platform == "win32":
    pytest.skip("needs pseudo-terminals", allow_module_level=True)

import pty
import readline

TIMEOUT = 60  # s


class User:
    """A user at the terminal of a session; all that was shown is in `screen`."""

    def __init__(self, pid: int, terminal: int) -> None:
        self.pid = pid
        self._terminal = terminal
        self.screen = ""
        self._seen = 0  # number of its characters that were waited for

    def wait_for(self, text: str) -> str:
        """Wait for a text after the one before; return everything up to it."""
        start = self._seen
        deadline = time.monotonic() + TIMEOUT
        while (at := self.screen.find(text, start)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.screen[start:]!r}"
            self._read()
        self._seen = at + len(text)
        return self.screen[start : self._seen]

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until a text appears: Python's input() can miss a signal before it waits."""
        start, begin, pressed = self._seen, time.monotonic(), 0
        while self.screen.find(text, start) < 0:
            seconds = time.monotonic() - begin
            assert seconds < TIMEOUT, f"no {text!r} in {self.screen[start:]!r}"
            if seconds >= 5 * pressed:  # the answer to one takes a moment
                self.type("\x03")
                pressed += 1
            self._read()
        self.wait_for(text)

    def ended(self, signal_number: int | None = None) -> int:
        """Wait for the end of the process, or end it by a signal; return its exit code.

        The signal is sent again while the process runs, for the reason in `interrupt`.
        """
        begin, sent = time.monotonic(), 0
        while True:
            seconds = time.monotonic() - begin
            assert seconds < TIMEOUT, f"no end after {self.screen[self._seen :]!r}"
            if signal_number is not None and seconds >= 5 * sent:
                os.kill(self.pid, signal_number)
                sent += 1
            try:
                self._read()
            except EOFError:
                return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> None:
        if not select.select([self._terminal], [], [], 1)[0]:
            return
        try:
            data = os.read(self._terminal, 4096)
        except OSError:  # Linux, at the end
            data = b""
        if not data:
            raise EOFError
        self.screen += data.decode(errors="replace").replace("\r\n", "\n")


@contextmanager
def session(state: Path, *args: str) -> Iterator[User]:
    env = os.environ | {"XDG_STATE_HOME": str(state), "TERM": "dumb"}
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
        command = [sys.executable, "-c", PROGRAM, *GENERATE, *args]
        os.execve(sys.executable, command, env)
    user = User(pid, terminal)
    try:
        yield user
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.close(terminal)


@pytest.mark.soak  # 6 seconds; the tests of signals below have a short session
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_session_at_a_terminal(tmp_path: Path) -> None:
    with session(tmp_path, "-n", "12") as user:
        assert "/help shows the commands" in user.wait_for("> ")
        user.type("ROMEO:\n")
        assert "I'll be a ban" in user.wait_for("finish: length]")
        user.type("/set max-tokens 100000\n")
        user.wait_for("> ")
        user.type(" and\\\n")
        user.wait_for(". ")
        user.type("so\n")
        user.wait_for("so\n")
        user.wait_for("\n")  # a line of the output
        user.type("\x03")  # Ctrl-C
        user.wait_for("finish: interrupted]")
        user.wait_for("> ")
        user.type("/text\n")
        assert " and\nso" in user.wait_for("> ")
        user.type("not entered")
        user.wait_for("not entered")
        user.interrupt("> ")
        user.type("/foo\n")
        user.wait_for("Error: unknown command /foo: see /help")
        user.wait_for("> ")  # before it, Ctrl-D is not readline's
        user.type("\x04")  # Ctrl-D
        assert user.ended() == 0
    assert "Traceback" not in user.screen
    history = tmp_path / "gptx" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    if "libedit" in (readline.__doc__ or ""):
        return  # it escapes characters
    assert history.read_text(encoding="utf-8").splitlines() == [
        "ROMEO:",
        "/set max-tokens 100000",
        " and\\",
        "so",
        "/text",
        "/foo",
    ]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_signal_ends_a_session_and_keeps_its_history(tmp_path: Path) -> None:
    (tmp_path / "gptx").mkdir()
    (tmp_path / "gptx" / "history").write_text("earlier\n", encoding="utf-8")
    with session(tmp_path, "-q") as user:
        user.wait_for("> ")
        user.type("/reset\n")
        user.wait_for("> ")
        assert user.ended(signal.SIGHUP) == 129
    assert "Traceback" not in user.screen
    lines = (tmp_path / "gptx" / "history").read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ["earlier", "/reset"]


def test_a_history_that_cannot_be_written_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "gptx").write_bytes(b"")  # a file in the place of the folder
    with terminal._line_editing([]):
        pass
    assert (tmp_path / "gptx").read_bytes() == b""


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is a number only."""
    no_home = mock.Mock(side_effect=RuntimeError("Could not determine home directory."))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with terminal._line_editing([]):
        pass
    assert no_home.called


def test_without_readline_lines_are_not_edited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on Windows."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "readline", None)
    with terminal._line_editing([]):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [("--json",), ("--logprobs",), ("--prompt-cache", "file")])
def test_options_that_need_a_prompt(monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    monkeypatch.setattr("gptx.cli.generate._on_a_terminal", lambda: True)
    done = run(*GENERATE, *args)
    assert (done.code, done.out) == (2, "")
    assert f"Error: {args[0]} needs a prompt: give PROMPT" in done.err


def test_options_are_checked_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptx.cli.generate._on_a_terminal", lambda: True)
    done = run("generate", "-m", "./nowhere", "--temperature", "-1")
    assert done.code == 2
    assert "--temperature is -1.0" in done.err


def test_the_place_of_the_history(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert terminal.history_file() == tmp_path / "gptx" / "history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert terminal.history_file() == tmp_path / ".local" / "state" / "gptx" / "history"
