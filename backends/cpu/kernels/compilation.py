"""Numba decorators, emitters of LLVM code and arrays at addresses, for all kernels."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, float32, int64, njit, types, uint16, uint32
from numba.core import cgutils, config
from numba.extending import intrinsic

from gptx.backends.cpu.interface import cpu_features

# Numba itself reads neither `GPTX_ISA` nor all features of ARM.
config.CPU_NAME, config.CPU_FEATURES = cpu_features.NAME, cpu_features.FEATURES

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)

# Sums may be reordered and fused. NaN must propagate: the sampler checks for it.
FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}
# Only other kernels call these functions: without entries for Python and C they compile in less
# time. A call from Python would end the process; tests compile them separately.
compiled = njit(
    fastmath=FAST_MATH, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)

# Inlined by Numba. A compiled function would make LLVM optimize all its callees again.
inlined = njit(inline="always")


def to_int64(context: Any, builder: Any, value: Any, kind: Any) -> Any:
    """Emit a cast of an integer of Numba type `kind` to int64."""
    return context.cast(builder, value, kind, types.int64)


def element_pointer(context: Any, builder: Any, kinds: Any, args: Any) -> Any:
    """Emit the address of element args[1] of the flat array args[0]; `kinds` are Numba types."""
    array = context.make_array(kinds[0])(context, builder, args[0])
    return builder.gep(array.data, [to_int64(context, builder, args[1], kinds[1])])


def call(builder: Any, name: str, result: Any, *args: Any, flags: tuple[str, ...] = ()) -> Any:
    """Emit a call of an external function or LLVM intrinsic."""
    kind = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, args, fastmath=flags)


@intrinsic
def _void_pointer(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit
def float_array(address: int, size: int) -> Any:
    """Return the float32 array [size] at an address."""
    return carray(_void_pointer(address), (size,), float32)


@njit
def float16_array(address: int, size: int) -> Any:
    """Return the float16 array [size] at an address, as uint16: Numba has no float16 on the CPU."""
    return carray(_void_pointer(address), (size,), uint16)


@njit
def word_array(address: int, size: int) -> Any:
    """Return the uint32 array [size] at an address."""
    return carray(_void_pointer(address), (size,), uint32)


@njit
def int_array(address: int, size: int) -> Any:
    """Return the int64 array [size] at an address."""
    return carray(_void_pointer(address), (size,), int64)


@njit
def int_matrix(address: int, rows: int, columns: int) -> Any:
    """Return the int64 array [rows, columns] at an address."""
    return carray(_void_pointer(address), (rows, columns), int64)


@njit
def float_matrix(address: int, rows: int, columns: int) -> Any:
    """Return the float32 array [rows, columns] at an address."""
    return carray(_void_pointer(address), (rows, columns), float32)
