"""The barrier between the stages of a run."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

from gptx.backends.cpu.kernels.barrier import wait_at_barrier
from tests.support.kernels import cached

STAGES = 500


@cached
def sum_after_barrier(counter: Any, numbers: Any, sums: Any, thread: int, threads: int) -> None:
    """In each stage, write a number, wait for the other threads, and sum all numbers."""
    target = 0
    for n in range(len(numbers)):
        numbers[n, thread] = n + thread
        target += threads
        wait_at_barrier(counter, target)
        for other in range(threads):
            sums[n, thread] += numbers[n, other]


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_writes_before_the_barrier_are_visible_after_it(threads: int) -> None:
    counter, numbers, sums = np.zeros(1, np.int64), *np.zeros((2, STAGES, threads))
    arguments = [(counter, numbers, sums, thread, threads) for thread in range(threads)]
    started = [threading.Thread(target=sum_after_barrier, args=args) for args in arguments]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert counter[0] == threads * STAGES
    all_numbers = np.arange(STAGES)[:, None] + np.arange(threads)
    np.testing.assert_array_equal(sums, all_numbers.sum(axis=1, keepdims=True) + 0 * sums)
