"""The threads that compute the shares of a run, one pool for all models of a process.

The thread that calls `run` computes share 0. Workers compute the others: daemon threads that
stay in `join_runs`, without the global interpreter lock. `kernels/mailbox.py` describes how a
run reaches them.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import queue
import threading

import numpy as np

from gptx.backends.cpu.kernels.run_words import (
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

# `join_runs` in Numba's calling convention: two pointers for a result and an error, which it does
# not set. A call releases the global interpreter lock.
_JOIN_RUNS = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
)


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
        self._pointers = np.zeros(2, np.int64)
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
        self._join_runs(code, mailbox, 0)

    def _join_runs(self, code: Code, mailbox: np.ndarray, thread: int) -> None:
        """Execute the run in the mailbox as thread 0, or every run, as a worker."""
        pointer = self._pointers.ctypes.data
        _JOIN_RUNS(code.join_runs)(pointer, pointer + 8, mailbox.ctypes.data, thread)

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
        self._join_runs(code, self._mailbox, number)


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
