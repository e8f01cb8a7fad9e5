"""Shares of the threads of a run, and a barrier between its stages.

A thread that waits here yields the processor to other threads and processes.
"""

from __future__ import annotations

from typing import Any

from gptx.backends.cpu.kernels.atomics import add_and_fetch, load_acquire, pause_or_yield
from gptx.backends.cpu.kernels.compilation import compiled


@compiled
def split_range(n: int, thread: int, threads: int) -> tuple[int, int]:
    """Return the begin and end of a thread's share of range(n)."""
    return n * thread // threads, n * (thread + 1) // threads


@compiled
def split_blocks(n: int, size: int, part: int, parts: int) -> tuple[int, int]:
    """Return the begin and end of a part of range(n), which has whole blocks of `size`."""
    begin, end = split_range((n + size - 1) // size, part, parts)
    return begin * size, min(end * size, n)


@compiled
def wait_at_barrier(counter: Any, target: int) -> None:
    """Add 1 to counter[0] and wait until it is `target`; the next target is `threads` higher.

    The counter never decreases: a slow thread may read it when the next run has begun.
    """
    count, reads = add_and_fetch(counter, 0, 1), 0
    while count < target:
        pause_or_yield(reads)
        reads += 1
        count = load_acquire(counter, 0)
