"""gptx.training.deferral: signals wait while the state of a run changes."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from gptx.training.deferral import deferred_signals


def test_ctrl_c_waits_for_the_end_of_the_context() -> None:
    done = []

    def change() -> None:
        with deferred_signals():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("first")
            done.append("second")
        done.append("after")

    with pytest.raises(KeyboardInterrupt):
        change()
    assert done == ["first", "second"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_context_is_raised() -> None:
    with pytest.raises(ValueError, match="wrong"), deferred_signals():
        raise ValueError("wrong")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_handles_no_signals() -> None:
    found = []

    def work() -> None:
        with deferred_signals():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
