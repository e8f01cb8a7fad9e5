"""Atomic operations, hints to the scheduler, and locks: what threads need to wait for each other.

The locks are Python's own (`PyThread_*` of its C API). A thread takes and releases them without
the global interpreter lock, on every system that Python runs on.
"""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.interface.cpu_features import ARM, X86
from gptx.backends.cpu.kernels.compilation import (
    I8,
    I32,
    I64,
    call,
    compiled,
    element_pointer,
    to_int64,
)

SPINS_BEFORE_YIELD = 2000  # reads of a word, 40 to 100 µs on x86


@intrinsic
def add_and_fetch(context: Any, array: Any, i: Any, n: Any) -> Any:
    """Add n to array[i], int64, atomically, and return the sum."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        n = to_int64(context, builder, args[2], sig.args[2])
        pointer = element_pointer(context, builder, sig.args, args)
        before = builder.atomic_rmw("add", pointer, n, "acq_rel")
        return builder.add(before, n)

    return types.int64(array, i, n), generate


@intrinsic
def exchange(context: Any, array: Any, i: Any, value: Any) -> Any:
    """Set array[i], int64, atomically, and return its earlier value."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = to_int64(context, builder, args[2], sig.args[2])
        pointer = element_pointer(context, builder, sig.args, args)
        return builder.atomic_rmw("xchg", pointer, value, "acq_rel")

    return types.int64(array, i, value), generate


@intrinsic
def replace_if_equal(context: Any, array: Any, i: Any, expected: Any, value: Any) -> Any:
    """Set array[i], int64, atomically if it is `expected`; return True if it was."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        expected, value = (
            to_int64(context, builder, arg, kind)
            for arg, kind in zip(args[2:], sig.args[2:], strict=True)
        )
        pointer = element_pointer(context, builder, sig.args, args)
        both = builder.cmpxchg(pointer, expected, value, "acq_rel", "acquire")
        return builder.extract_value(both, 1)

    return types.boolean(array, i, expected, value), generate


@intrinsic
def load_acquire(context: Any, array: Any, i: Any) -> Any:
    """Return array[i], int64; earlier writes of the thread that set it are visible."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = element_pointer(context, builder, sig.args, args)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array, i), generate


@intrinsic
def _pause(context: Any) -> Any:
    """Hint to the processor that this is a spin loop."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if X86:
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif ARM:
            call(builder, "llvm.aarch64.isb", ir.VoidType(), I32(15))  # `yield` takes no time
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
def pause_or_yield(reads: int) -> None:
    """Wait between two reads of a word that another thread sets; `reads` counts them."""
    if reads < SPINS_BEFORE_YIELD:
        _pause()
    else:
        _yield()


@intrinsic
def allocate_lock(context: Any) -> Any:
    """Return the address of a new lock."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lock = call(builder, "PyThread_allocate_lock", I8.as_pointer())
        return builder.ptrtoint(lock, I64)

    return types.int64(), generate


@intrinsic
def acquire_lock(context: Any, lock: Any) -> Any:
    """Wait for the lock at an address, and acquire it."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I8.as_pointer())
        call(builder, "PyThread_acquire_lock", I32, pointer, I32(1))
        return context.get_dummy_value()

    return types.void(lock), generate


@intrinsic
def release_lock(context: Any, lock: Any) -> Any:
    """Release the lock at an address, which another thread may have acquired."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I8.as_pointer())
        call(builder, "PyThread_release_lock", ir.VoidType(), pointer)
        return context.get_dummy_value()

    return types.void(lock), generate
