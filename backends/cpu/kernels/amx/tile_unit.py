"""Intel's matrix unit, AMX: its instructions, and who may use it.

The unit has eight tiles of 16 rows of 64 bytes, which belong to the thread and are named by their
numbers, 0 to 7. It multiplies two of them at once, of bytes or of bfloat16, and adds to a third.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.kernels.cpu_features import X86, has
from gptx.backends.cpu.kernels.simd import I8, call, compiled, pointer

ROWS = 16  # of a tile
DEPTH = 64  # bytes to a row of a tile
I64 = ir.IntType(64)
SQUARE = ROWS * ROWS  # 32-bit words of a tile

# What the processor has; the code is there if so. Whether Linux lets a process use it, `allowed`
# finds out.
COMPILED = has("amx-int8") and has("amx-bf16")
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18


@cache
def allowed() -> bool:
    """Ask Linux for the tiles, whose state it has to keep for each thread; False if it refuses."""
    if not COMPILED or sys.platform != "linux" or not X86:
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0


def instruction(builder: Any, name: str, *operands: Any) -> None:
    """An instruction of the unit; numbers are those of tiles.

    None where there is no such unit: the compiler does not know it, and nobody calls what is made.
    """
    values = [I8(x) if isinstance(x, int) else x for x in operands]
    if COMPILED:
        call(builder, f"llvm.x86.{name}", ir.VoidType(), *values)


def place(context: Any, builder: Any, given: Any, args: Any) -> Any:
    """Where element args[1] of the array args[0] lies, as an address of bytes."""
    return builder.bitcast(pointer(context, builder, given, args), I8.as_pointer())


@intrinsic
def _configure(context: Any, array: Any, i: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        instruction(builder, "ldtilecfg", place(context, builder, sig.args, args))
        return context.get_dummy_value()

    return types.void(array, i), generate


@intrinsic
def release(context: Any) -> Any:
    """Give the tiles back, which else would be kept for this thread."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        instruction(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def zero(context: Any, count: Any) -> Any:
    """Let so many tiles (a constant) be zero, from the first on."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for tile in range(count.literal_value):
            instruction(builder, "tilezero", tile)
        return context.get_dummy_value()

    return (types.void(count), generate) if isinstance(count, types.IntegerLiteral) else None


@compiled
def set_up(room: Any, depth: int = DEPTH) -> None:
    """Let the tiles be whole; or, for products of fewer bytes, tiles 3 to 5 have rows of `depth`
    bytes, and tile 6 a quarter as many rows. The setting goes to room[:16]."""
    setting = room[:16].view(np.uint8)
    setting[:] = 0
    setting[0] = 1  # the only palette there is; then bytes to a row, and rows, of each tile
    for n in range(8):
        setting[16 + 2 * n] = depth if 3 <= n < 6 else DEPTH
        setting[48 + n] = depth // 4 if n == 6 else ROWS
    _configure(room, 0)
