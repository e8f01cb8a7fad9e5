"""The threads that compute the shares of a run, one pool for all models of a process.

The thread that calls `run` computes share 0. Workers compute the others: daemon threads that
stay in `join_runs`, without the global interpreter lock. `kernels/mailbox.py` describes how a
run reaches them.
"""

from __future__ import annotations

import _thread
import os
import queue
import threading

import numpy as np

from gptx.backends.cpu.interface.run_words import (
    MAILBOX_WORDS,
    MAX_THREADS,
    N_WORDS,
    PROGRAM_CODE,
    RUN_WORDS,
    WORKERS,
)
from gptx.backends.cpu.machine_code import Code
from gptx.backends.cpu.memory import allocate_aligned

START_SECONDS = 10.0  # for a new thread to begin


class ThreadPool:
    """Workers, which start when a run first needs them, and their mailbox.

    Attributes
    ----------
    lock
        Held by the thread that uses the pool: there is one run at a time.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._mailbox = allocate_aligned((MAILBOX_WORDS,), np.int64, np.zeros)
        self._numbers = iter(range(1, MAX_THREADS))
        self._started: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._workers = 0

    def run(self, words: np.ndarray, code: Code) -> None:
        """Execute a run, given by its words (see `kernels/mailbox.py`); the caller holds the lock.

        If the system does not start enough threads, this thread computes all shares.
        """
        workers = int(words[WORKERS])
        if workers > self._workers:
            self._start(workers, code)
        mailbox = self._mailbox  # a signal handler that forks here replaces it in the child
        mailbox[RUN_WORDS : RUN_WORDS + N_WORDS] = words
        mailbox[RUN_WORDS + PROGRAM_CODE] = code.run_program
        if workers > self._workers:
            mailbox[RUN_WORDS + WORKERS] = 0
        code.join_runs(mailbox.ctypes.data, 0)

    def _start(self, workers: int, code: Code) -> None:
        """Start threads until there are `workers`, or one does not begin."""
        while self._workers < workers:
            try:
                # `threading.Thread.start` does not survive a signal handler that raises an error.
                _thread.start_new_thread(self._work, (code,))
                number = self._started.get(timeout=START_SECONDS)
            except (RuntimeError, queue.Empty):  # the system refuses, or is too busy
                return
            # After an interrupt the number may still be in the queue, for the next call.
            self._workers = max(self._workers, number)

    def _work(self, code: Code) -> None:
        number = next(self._numbers)
        self._started.put(number)
        mailbox = self._mailbox  # which lives as long as this thread
        code.join_runs(mailbox.ctypes.data, number)


POOL = ThreadPool()


def _acquire() -> None:
    POOL.lock.acquire()


def _release() -> None:
    POOL.lock.release()


def _renew() -> None:
    """Replace the pool in a forked child, which has none of its threads."""
    POOL.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    # A fork waits for the end of the current run, whose buffers would stay half written.
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_renew)
