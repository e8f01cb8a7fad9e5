"""Instructions of Intel's matrix unit, AMX.

The unit has eight tile registers, numbered 0 to 7, for each thread: 16 rows of 64 bytes. One
instruction multiplies two of them, of bytes or of bfloat16, and adds the product to a third.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.interface.cpu_features import HAS_AMX
from gptx.backends.cpu.interface.sizes import TILE_ROW_BYTES, TILE_ROWS
from gptx.backends.cpu.kernels.compilation import I8, call, compiled, element_pointer


def emit(builder: Any, name: str, *operands: Any) -> None:
    """Emit an AMX instruction; a Python integer operand is the number of a tile register.

    Emits nothing without AMX: LLVM would reject the instruction, and no caller reaches it.
    """
    values = [I8(x) if isinstance(x, int) else x for x in operands]
    if HAS_AMX:
        call(builder, f"llvm.x86.{name}", ir.VoidType(), *values)


def byte_pointer(context: Any, builder: Any, kinds: Any, args: Any) -> Any:
    """Emit the address of element args[1] of the array args[0], as a pointer to bytes."""
    return builder.bitcast(element_pointer(context, builder, kinds, args), I8.as_pointer())


@intrinsic
def _load_configuration(context: Any, array: Any, i: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit(builder, "ldtilecfg", byte_pointer(context, builder, sig.args, args))
        return context.get_dummy_value()

    return types.void(array, i), generate


@compiled
def configure_tiles(workspace: Any, row_bytes: int = TILE_ROW_BYTES) -> None:
    """Configure the tile registers, with full rows unless `row_bytes` is less.

    With less, registers 3 to 5 have rows of `row_bytes` bytes, and register 6 has row_bytes / 4
    rows. The configuration is written to workspace[:16].
    """
    configuration = workspace[:16].view(np.uint8)
    configuration[:] = 0
    configuration[0] = 1  # the palette; bytes to a row and rows of each register follow
    for n in range(8):
        configuration[16 + 2 * n] = row_bytes if 3 <= n < 6 else TILE_ROW_BYTES
        configuration[48 + n] = row_bytes // 4 if n == 6 else TILE_ROWS
    _load_configuration(workspace, 0)


@intrinsic
def release_tiles(context: Any) -> Any:
    """Release the tile registers, so that Linux does not save them for this thread."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def zero_tiles(context: Any, count: Any) -> Any:
    """Set tile registers 0 to count - 1 to zero; `count` is a constant."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for tile in range(count.literal_value):
            emit(builder, "tilezero", tile)
        return context.get_dummy_value()

    return (types.void(count), generate) if isinstance(count, types.IntegerLiteral) else None
