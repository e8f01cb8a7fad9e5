"""Shares of the threads of one parallel region, and a barrier between its stages.

A separate parallel region for each stage takes 2 microseconds longer. A thread that waits here
yields the processor to other processes, as OpenMP's threads do not.

A barrier never returns if a thread is missing, and Numba's threading layer and its settings may
start fewer threads than requested. Therefore the threads count themselves first.
"""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.kernels.compilation import (
    I32,
    I64,
    call,
    compiled,
    element_pointer,
    to_int64,
)
from gptx.backends.cpu.kernels.cpu_features import ARM, X86

SPINS_BEFORE_YIELD = 2000  # reads of the counter
MAX_START_READS = 20_000  # reads of the counter until a thread that has not started is given up
ABANDONED = -(2**40)  # a counter that stays negative when late threads add to it


@compiled
def split_range(n: int, thread: int, threads: int) -> tuple[int, int]:
    """Return the begin and end of a thread's share of range(n)."""
    return n * thread // threads, n * (thread + 1) // threads


@intrinsic
def _add_and_fetch(context: Any, array: Any, i: Any, n: Any) -> Any:
    """Add n to array[i], int64, atomically, and return the sum."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        n = to_int64(context, builder, args[2], sig.args[2])
        pointer = element_pointer(context, builder, sig.args, args)
        before = builder.atomic_rmw("add", pointer, n, "acq_rel")
        return builder.add(before, n)

    return types.int64(array, i, n), generate


@intrinsic
def _load_acquire(context: Any, array: Any, i: Any) -> Any:
    """Return array[i], int64; earlier writes of the thread that set it are visible."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = element_pointer(context, builder, sig.args, args)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array, i), generate


@intrinsic
def _abandon(context: Any, array: Any, i: Any, expected: Any) -> Any:
    """Set array[i] to ABANDONED atomically if it is `expected`; return True if it was."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        expected = to_int64(context, builder, args[2], sig.args[2])
        pointer = element_pointer(context, builder, sig.args, args)
        both = builder.cmpxchg(pointer, expected, I64(ABANDONED), "acq_rel", "acquire")
        return builder.extract_value(both, 1)

    return types.boolean(array, i, expected), generate


@intrinsic
def _pause(context: Any) -> Any:
    """Hint to the processor that this is a spin loop."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if X86:
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif ARM:
            call(builder, "llvm.aarch64.hint", ir.VoidType(), I32(1))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _yield(context: Any) -> Any:
    """Yield the processor to another thread."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if sys.platform != "win32":
            call(builder, "sched_yield", I32)
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def _pause_or_yield(reads: int) -> None:
    if reads < SPINS_BEFORE_YIELD:
        _pause()
    else:
        _yield()


@compiled
def all_threads_start(counter: Any, threads: int) -> bool:
    """Return True if all threads call this at about the same time, with a counter [1] of 0."""
    count, reads = _add_and_fetch(counter, 0, 1), 0
    while 0 < count < threads:
        _pause_or_yield(reads)
        reads += 1
        if reads == MAX_START_READS and not _abandon(counter, 0, count):
            reads = 0  # one more thread has started
        count = _load_acquire(counter, 0)
    return count >= threads


@compiled
def wait_at_barrier(counter: Any, target: int) -> None:
    """Add 1 to the counter and wait until it is `target`; the next target is `threads` higher."""
    count, reads = _add_and_fetch(counter, 0, 1), 0
    while count < target:
        _pause_or_yield(reads)
        reads += 1
        count = _load_acquire(counter, 0)
