"""Signals that end the command line: SIGINT (Ctrl-C), SIGTERM, SIGHUP (a closed terminal).

While modules are imported and at the exit of the process, nothing has to be undone: a signal ends
the process at once. While a command runs, a signal raises an exception, so that the command
removes its temporary files. The exit code is 128 + the signal's number.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
# A repeated signal within this time does not interrupt the cleaning-up after the first one.
REPEAT_SECONDS = 1.0

_raises = False
_last: dict[int, float] = {}  # signal number -> time at which it raised an exception


def install() -> None:
    """Handle the signals; one that the parent process ignores (nohup, `&`) stays ignored."""
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def raise_exceptions() -> None:
    """Raise KeyboardInterrupt or SystemExit at a signal: from now on a command runs."""
    global _raises
    _raises = True


def rearm() -> None:
    """Count the next signal as a first one: the command has handled the last one."""
    _last.clear()


def exit_at_once() -> None:
    """End the process at a signal: the command has ended."""
    global _raises
    _raises = False


def _handle(number: int, frame: FrameType | None) -> None:
    if not _raises:
        if number == signal.SIGINT:
            with suppress(OSError):  # standard error is closed
                os.write(2, b"Interrupted\n")
        os._exit(128 + number)
    now = time.monotonic()
    repeated = number in _last and now - _last[number] < REPEAT_SECONDS
    if not repeated:
        _last[number] = now
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
