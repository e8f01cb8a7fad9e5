"""The threads of an op: each part once, errors after the last part, forks."""

from __future__ import annotations

import os
import threading
import time

import pytest

from gptx.backends.cpu import workers
from gptx.backends.cpu.workers import Workers


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("parts", [1, 2, 17])
def test_each_part_is_computed_once(parts: int, threads: int) -> None:
    computed: list[int] = []
    Workers().run(computed.append, parts, threads)
    assert sorted(computed) == list(range(parts))


def test_parts_are_computed_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=20)
    Workers().run(lambda part: meeting.wait() and None, 3, 3)
    assert not meeting.broken


def test_no_more_threads_than_wanted() -> None:
    """The pool has more workers, of another backend."""
    pool, names = Workers(), set()
    pool.run(lambda part: time.sleep(0.001), 8, 4)

    def note_thread(part: int) -> None:
        names.add(threading.get_ident())
        time.sleep(0.001)

    pool.run(note_thread, 16, 2)
    assert len(names) <= 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_is_raised_after_all_parts(error: type[BaseException]) -> None:
    computed: list[int] = []

    def compute(part: int) -> None:
        if part == 1:
            raise error("part 1")
        time.sleep(0.001)
        computed.append(part)

    with pytest.raises(error, match="part 1"):
        Workers().run(compute, 6, 3)
    assert sorted(computed) == [0, 2, 3, 4, 5]


def test_a_system_that_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    computed: list[int] = []
    Workers().run(computed.append, 4, 2)
    assert computed == [0, 1, 2, 3]


def test_a_waiting_worker_keeps_no_reference() -> None:
    """It would keep the arrays of the latest op in memory."""
    pool, gone = Workers(), threading.Event()

    class Array:
        def __del__(self) -> None:
            gone.set()

    def run() -> None:
        array = Array()
        pool.run(lambda part: time.sleep(0.001) if array else None, 4, 2)

    run()
    assert gone.wait(timeout=20)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_starts_its_own_workers() -> None:
    def parts_meet() -> bool:
        meeting = threading.Barrier(2, timeout=20)
        workers.WORKERS.run(lambda part: meeting.wait() and None, 2, 2)
        return True

    assert parts_meet()
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = not parts_meet()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert parts_meet()
