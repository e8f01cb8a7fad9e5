"""The thread pool: any number of threads and callers gives the same results."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

from gptx.backends.cpu import program as program_module
from gptx.backends.cpu import thread_pool
from gptx.backends.cpu.interface.instructions import INT8
from gptx.backends.cpu.interface.run_words import EMPTY, FIRST_SLOT, PARKED, SLOT_WORDS
from gptx.backends.cpu.interface.variant import variant_name
from gptx.backends.cpu.machine_code import load
from gptx.backends.cpu.program import Program, Shape
from gptx.backends.cpu.quantized import QuantizedWeight
from gptx.backends.cpu.thread_pool import ThreadPool
from gptx.backends.fusion import FusedOp
from gptx.quantization import quantize

N_IN, N_OUT, ROWS = 768, 576, 40


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> ThreadPool:
    """A new pool, in the place of the pool of the process, on a machine of 9 cores."""
    made = ThreadPool()
    monkeypatch.setattr(program_module, "POOL", made)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "9")
    return made


class Product:
    """A program of one product, its input, and its results on one thread."""

    def __init__(self, random: np.random.Generator, bits: int | None, n_out: int = N_OUT) -> None:
        w = random.standard_normal((n_out, N_IN)).astype(np.float32)
        weight = QuantizedWeight(quantize(w, bits, 64)) if bits else np.ascontiguousarray(w.T)
        self.program = Program([FusedOp("linear", 0, 1, weight=weight)], inputs=[N_IN])
        self.x = np.zeros((48, N_IN), np.float32)
        self.x[:ROWS] = random.standard_normal((ROWS, N_IN))

    def run(self, threads: int, rows: int = ROWS) -> np.ndarray:
        y = np.zeros((48, self.program.widths[1]), np.float32)
        self.program.run({0: self.x, 1: y}, Shape(rows), threads)
        return y[:rows]


@pytest.fixture
def product(random: np.random.Generator) -> Product:
    """A product whose bits do not depend on the number of threads."""
    return Product(random, bits=8)


def state_of(pool: ThreadPool, worker: int) -> int:
    return int(pool._mailbox[FIRST_SLOT + worker * SLOT_WORDS])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("rows", [1, 4, ROWS])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_pool_grows_to_any_number_of_threads(
    pool: ThreadPool, random: np.random.Generator, bits: int | None, rows: int
) -> None:
    product = Product(random, bits)
    expected = product.run(1, rows)
    assert pool._workers == 0
    for threads, workers in ((2, 1), (3, 2), (2, 2), (7, 6), (100, 8)):  # 9 is the limit
        found = product.run(threads, rows)
        assert pool._workers == workers
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_a_small_program_starts_no_thread(pool: ThreadPool, random: np.random.Generator) -> None:
    """3 threads have 16,384 multiplications each, 4 threads have fewer."""
    product = Product(random, 8, n_out=64)
    expected = product.run(1, rows=1)
    for threads, workers in ((4, 0), (3, 2)):
        np.testing.assert_array_equal(product.run(threads, rows=1), expected)
        assert pool._workers == workers


def test_memory_that_is_kept_for_the_next_run(
    product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    product.run(1)
    kept = product.program._kept
    assert kept is not None
    product.run(1)
    assert product.program._kept is kept
    n_bytes = sum(x.nbytes for x in kept.arrays)
    for limit, is_kept in ((n_bytes, True), (n_bytes - 1, False)):
        monkeypatch.setattr(program_module, "MAX_KEPT_BYTES", limit)
        product.program._kept = None
        product.run(1)
        assert (product.program._kept is not None) == is_kept


@pytest.mark.parametrize("rows", [1, 4, ROWS])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_one_thread_that_computes_all_shares_gives_the_same_bits(
    pool: ThreadPool,
    random: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    bits: int | None,
    rows: int,
) -> None:
    """The system refuses to start a thread, or the thread does not begin; later it does."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    product = Product(random, bits)
    results = []
    for start in (refuse, lambda *_: None):
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", start)
            patch.setattr(thread_pool, "START_SECONDS", 0.01)
            results.append(product.run(3, rows))
        assert pool._workers == 0
    expected = product.run(3, rows)
    for found in results:
        np.testing.assert_array_equal(found, expected)


def test_threads_that_call_at_once(pool: ThreadPool, random: np.random.Generator) -> None:
    products = [Product(random, bits) for bits in (None, 8, 4)]
    expected = [product.run(2) for product in products]
    found: list[list[np.ndarray]] = [[] for _ in products]

    def call(n: int) -> None:
        for _ in range(20):
            found[n].append(products[n].run(2))

    callers = [threading.Thread(target=call, args=(n,)) for n in range(len(products))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for results, y in zip(found, expected, strict=True):
        assert len(results) == 20
        for result in results:
            np.testing.assert_array_equal(result, y)
    assert pool._workers == 1


def test_parked_workers_wake_up(pool: ThreadPool, product: Product) -> None:
    expected = product.run(3)
    for _ in range(5):
        wait_until(lambda: state_of(pool, 1) == state_of(pool, 2) == PARKED)
        np.testing.assert_array_equal(product.run(3), expected)


def test_a_run_is_withdrawn_from_workers_that_do_not_join(
    pool: ThreadPool, product: Product
) -> None:
    """On a busy machine a worker waits for a processor: here one of two has not begun."""
    expected = product.run(2)
    pool._workers = 2
    for _ in range(3):
        np.testing.assert_array_equal(product.run(3), expected)
        assert state_of(pool, 2) == EMPTY
    code = load(variant_name([INT8], float16_cache=False))
    late = threading.Thread(target=pool._work, args=[code], daemon=True)
    late.start()
    wait_until(lambda: state_of(pool, 2) == PARKED)
    for _ in range(100):
        np.testing.assert_array_equal(product.run(3), expected)


def test_an_interrupt_during_runs(pool: ThreadPool, product: Product) -> None:
    def run_forever() -> None:
        while True:
            product.run(3)

    expected = product.run(3)
    for seconds in (0.01, 0.02, 0.03):
        threading.Timer(seconds, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            run_forever()
        np.testing.assert_array_equal(product.run(3), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_an_interrupt_while_a_worker_starts(
    pool: ThreadPool,
    product: Product,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    """The worker exists, though the pool has not counted it; its number is not used again."""
    start = _thread.start_new_thread

    def start_and_interrupt(*args: Any) -> None:
        start(*args)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", start_and_interrupt)
        with pytest.raises(error):
            product.run(2)
    assert pool._workers == 0
    expected = product.run(1)
    for threads in (2, 3, 4):
        np.testing.assert_array_equal(product.run(threads), expected)


def test_a_signal_handler_that_forks_during_a_run(pool: ThreadPool, product: Product) -> None:
    """The handler runs before any line of a run; in the child the pool is another one after it."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code is not ThreadPool.run.__code__:
            return None
        lines += event == "line"
        if event == "line" and lines == renewed_before:
            pool.__init__()  # type: ignore[misc]  # as in a forked child
        return trace

    expected = product.run(3)
    lines = renewed_before = 0
    tracer = sys.gettrace()
    while lines >= renewed_before:  # the run had a line of that number
        lines, renewed_before = 0, renewed_before + 1
        sys.settrace(trace)
        try:
            found = product.run(3)
        finally:
            sys.settrace(tracer)
        np.testing.assert_array_equal(found, expected)
    assert lines > 5


def exit_status(run: Callable[[], bool]) -> int:
    """Run a function in a forked child; return 0 if it returns True."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = not run()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_any_thread_of_a_forked_child_and_of_its_children(
    pool: ThreadPool, product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_pool, "POOL", pool)
    expected = product.run(3)

    def is_computed() -> bool:
        found: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: found.append(product.run(3)), daemon=True)
        thread.start()
        thread.join(timeout=20)
        return bool(found) and np.array_equal(found[0], expected)

    assert exit_status(lambda: is_computed() and exit_status(is_computed) == 0) == 0
    assert is_computed()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_waits_for_the_end_of_a_run(
    pool: ThreadPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_pool, "POOL", pool)
    held, ended = threading.Event(), threading.Event()

    def hold_the_lock() -> None:
        with pool.lock:
            held.set()
            time.sleep(0.05)
            ended.set()

    other = threading.Thread(target=hold_the_lock)
    other.start()
    held.wait()
    assert exit_status(ended.is_set) == 0
    other.join()
