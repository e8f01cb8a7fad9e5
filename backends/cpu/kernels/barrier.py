"""A barrier for the NumPy backend's kernels: threads wait for each other within a parallel region.

A region of its own for each stage takes 2 microseconds longer; and whoever waits here lets other
processes have the processor, as OpenMP's threads do not. But a barrier waits forever for a thread
that never comes, and whether there are as many as were asked for is up to Numba's threading layer
and its settings: so they count themselves first.
"""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.kernels.cpu_features import ARM, X86
from gptx.backends.cpu.kernels.simd import I32, call, compiled, int64, pointer

I64 = ir.IntType(64)
SPINS = 2000  # looks at the counter, before the processor is offered to others at each
PATIENCE = 20_000  # looks until a thread that has not begun is given up
NEVER = -(2**40)  # a counter that stays negative, whoever else comes


@intrinsic
def _add(context: Any, array: Any, i: Any, n: Any) -> Any:
    """array[i] + n, of int64, after array[i] was made that; all at once."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        n = int64(context, builder, args[2], sig.args[2])
        before = builder.atomic_rmw("add", pointer(context, builder, sig.args, args), n, "acq_rel")
        return builder.add(before, n)

    return types.int64(array, i, n), generate


@intrinsic
def _look(context: Any, array: Any, i: Any) -> Any:
    """array[i], of int64, as another thread has left it; and all that it did before."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(context, builder, sig.args, args), "acquire", 8)

    return types.int64(array, i), generate


@intrinsic
def _give_up(context: Any, array: Any, i: Any, here: Any) -> Any:
    """Let array[i] be NEVER if it is `here` still, and say whether it was; all at once."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        here = int64(context, builder, args[2], sig.args[2])
        place = pointer(context, builder, sig.args, args)
        both = builder.cmpxchg(place, here, I64(NEVER), "acq_rel", "acquire")
        return builder.extract_value(both, 1)

    return types.boolean(array, i, here), generate


@intrinsic
def _pause(context: Any) -> Any:
    """Let the processor know that this waits in a loop."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if X86:
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif ARM:
            call(builder, "llvm.aarch64.hint", ir.VoidType(), I32(1))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _yield(context: Any) -> Any:
    """Offer the processor to whoever else wants it."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if sys.platform != "win32":
            call(builder, "sched_yield", I32)
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def _wait(looks: int) -> None:
    if looks < SPINS:
        _pause()
    else:
        _yield()


@compiled
def all_begin(counter: Any, threads: int) -> bool:
    """Whether so many threads have called this, at about the same time, for a counter [1] of 0."""
    here, looks = _add(counter, 0, 1), 0
    while 0 < here < threads:
        _wait(looks)
        looks += 1
        if looks == PATIENCE and not _give_up(counter, 0, here):
            looks = 0  # another one came
        here = _look(counter, 0)
    return here >= threads


@compiled
def meet(counter: Any, goal: int) -> None:
    """Wait until the counter is `goal`: as many more as there are threads, each time."""
    here, looks = _add(counter, 0, 1), 0
    while here < goal:
        _wait(looks)
        looks += 1
        here = _look(counter, 0)
