"""Cores, locks after a fork, the environment of fresh processes (more in bench/test_worker.py)."""

from __future__ import annotations

import os
import threading

import pytest

from gptx.process import ForkSafeLock, count_cores


def test_cores() -> None:
    assert 1 <= count_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_finds_the_lock_free() -> None:
    """Another thread of the parent holds it."""
    lock, held, end = ForkSafeLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            end.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    pid = os.fork()
    if pid == 0:
        free = lock._lock.acquire(timeout=10)
        os._exit(0 if free else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    end.set()
    thread.join()
    with lock, lock:  # one thread may hold it twice
        pass
