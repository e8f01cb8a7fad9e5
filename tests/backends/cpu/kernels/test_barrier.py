"""Threads that wait for each other, and those that wait in vain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install 'gptx[fast]')")

import numba

from gptx.backends.cpu import compiled as numpy_step
from gptx.backends.cpu.kernels.barrier import NEVER, all_begin, meet
from gptx.backends.fusion import FusedOp
from gptx.quantization import dequantize, quantize


@numba.njit(parallel=True)
def sums_of_others(counter: Any, numbers: Any, sums: Any, threads: int) -> None:
    """In each stage n, a number by each thread; in the next, the sum of what all have written."""
    for t in numba.prange(threads):
        if all_begin(counter, threads):
            goal = threads
            for n in range(len(numbers)):
                numbers[n, t] = n + t
                goal += threads
                meet(counter, goal)
                sums[n, t] = numbers[n].sum()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_what_was_written_before_is_seen_after(threads: int) -> None:
    threads = min(threads, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    for _ in range(100):  # on a busy machine not all threads may come
        counter, numbers, sums = np.zeros(1, np.int64), *np.zeros((2, 2000, threads))
        sums_of_others(counter, numbers, sums, threads)
        if counter[0] > 0:
            break
        assert not numbers.any()
        assert not sums.any()
    assert counter[0] == threads * 2001
    all_numbers = np.arange(2000)[:, None] + np.arange(threads)
    np.testing.assert_array_equal(sums, all_numbers.sum(axis=1, keepdims=True) + 0 * sums)


def test_a_thread_that_never_comes_is_given_up() -> None:
    counter = np.zeros(1, np.int64)
    assert not all_begin(counter, 2)
    assert counter[0] == NEVER
    assert not all_begin(counter, 2)  # it comes too late, and does not wait
    assert counter[0] < 0
    assert all_begin(np.ones(1, np.int64), 2)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_with_fewer_threads_than_asked_for(
    monkeypatch: pytest.MonkeyPatch, random: np.random.Generator, bits: int | None, rows: int
) -> None:
    """As on a busy machine, or with a limit that Numba does not know: one does what several should
    have, and the numbers are the same to the last bit."""
    w = random.standard_normal((768, 2304)).astype(np.float32)
    x = np.zeros((48, 768), np.float32)
    x[:rows] = random.standard_normal((rows, 768))
    q = quantize(np.ascontiguousarray(w.T), bits, 64) if bits else None
    weight = w if q is None else numpy_step.QuantizedWeight(q)
    program = numpy_step.Program([FusedOp("linear", 0, 1, weight=weight)], inputs=[768])
    found = []
    for most in (2, 1):
        numba.set_num_threads(min(most, numba.config.NUMBA_NUM_THREADS))
        monkeypatch.setattr(numba, "set_num_threads", lambda threads: None)
        y = np.zeros((48, program.widths[1]), np.float32)
        program.run({0: x, 1: y}, (1, rows, 0, 0, 0), 2)
        found.append(y[:rows])
        monkeypatch.undo()
    wanted = x[:rows] @ (w if q is None else dequantize(q).T)
    np.testing.assert_allclose(found[0], wanted, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(found[1], found[0])
