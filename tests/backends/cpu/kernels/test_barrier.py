"""The barrier, and runs in which a thread is missing."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install 'gptx[fast]')")

import numba

from gptx.backends.cpu.kernels.barrier import ABANDONED, all_threads_start, wait_at_barrier
from gptx.backends.cpu.program import Program, Shape
from gptx.backends.cpu.quantized import QuantizedWeight
from gptx.backends.fusion import FusedOp
from gptx.quantization import dequantize, quantize
from tests.support.kernels import cached

STAGES = 500


@cached
def sum_after_barrier(counter: Any, numbers: Any, sums: Any, thread: int, threads: int) -> None:
    """In each stage, write a number, wait for the other threads, and sum all numbers."""
    if all_threads_start(counter, threads):
        target = threads
        for n in range(len(numbers)):
            numbers[n, thread] = n + thread
            target += threads
            wait_at_barrier(counter, target)
            for other in range(threads):
                sums[n, thread] += numbers[n, other]


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_writes_before_the_barrier_are_visible_after_it(threads: int) -> None:
    for _ in range(100):  # on a busy machine a thread may start too late
        counter, numbers, sums = np.zeros(1, np.int64), *np.zeros((2, STAGES, threads))
        arguments = [(counter, numbers, sums, thread, threads) for thread in range(threads)]
        started = [threading.Thread(target=sum_after_barrier, args=args) for args in arguments]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        if counter[0] > 0:
            break
        assert not numbers.any()
        assert not sums.any()
    assert counter[0] == threads * (STAGES + 1)
    all_numbers = np.arange(STAGES)[:, None] + np.arange(threads)
    np.testing.assert_array_equal(sums, all_numbers.sum(axis=1, keepdims=True) + 0 * sums)


def test_a_missing_thread_is_given_up() -> None:
    start = cached(all_threads_start)
    counter = np.zeros(1, np.int64)
    assert not start(counter, 2)
    assert counter[0] == ABANDONED
    assert not start(counter, 2)  # too late: returns at once
    assert counter[0] < 0
    assert start(np.ones(1, np.int64), 2)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_fewer_threads_than_requested_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, random: np.random.Generator, bits: int | None, rows: int
) -> None:
    """On a busy machine, or with another limit of threads, one thread computes all shares."""
    w = random.standard_normal((768, 576)).astype(np.float32)
    x = np.zeros((48, 768), np.float32)
    x[:rows] = random.standard_normal((rows, 768))
    q = quantize(np.ascontiguousarray(w.T), bits, 64) if bits else None
    weight = w if q is None else QuantizedWeight(q)
    program = Program([FusedOp("linear", 0, 1, weight=weight)], inputs=[768])
    found = []
    for most in (2, 1):
        numba.set_num_threads(min(most, numba.config.NUMBA_NUM_THREADS))
        monkeypatch.setattr(numba, "set_num_threads", lambda threads: None)
        y = np.zeros((48, program.widths[1]), np.float32)
        program.run({0: x, 1: y}, Shape(1, rows), 2)
        found.append(y[:rows])
        monkeypatch.undo()
    expected = x[:rows] @ (w if q is None else dequantize(q).T)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(found[1], found[0])
