"""Signals wait while the state of a run changes, so that it is always that of a whole step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let signals with a Python handler wait until the end of the context.

    Python runs handlers in the main thread; in another thread the context does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    handlers: dict[int, Any] = {}
    try:
        for number in (getattr(signal, name, None) for name in NAMES):
            if number is not None and callable(handler := signal.getsignal(number)):
                handlers[number] = handler
                signal.signal(number, catch)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in caught:
            signal.raise_signal(number)
