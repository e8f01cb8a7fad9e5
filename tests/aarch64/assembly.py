"""Print the assembly of a kernel for aarch64: python -m tests.aarch64.assembly KERNEL.

Numba compiles the kernel on any machine, for the processor that the environment names:
NUMBA_CPU_NAME=neoverse-n1 NUMBA_CPU_FEATURES=+neon,+dotprod. The code is not executed.
"""
# ruff: noqa: E402

from __future__ import annotations

import platform
import sys

import llvmlite.binding as llvm

# Numba and `cpu_features` read these when they are imported.
platform.machine = lambda: "aarch64"
llvm.get_process_triple = lambda: "aarch64-unknown-linux-gnu"
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()

from numba import boolean, float32, int64, types, uint32, void

from gptx.backends.cpu.kernels import gemm, gemv_bytes
from gptx.backends.cpu.kernels.arguments import Matrix, QuantizedMatrix

FLOATS, WORDS = types.Array(float32, 1, "C"), types.Array(uint32, 1, "C")
MATRIX = types.NamedTuple([FLOATS, int64, int64, int64], Matrix)
QUANTIZED = types.NamedTuple([WORDS, WORDS, int64, int64, int64, int64], QuantizedMatrix)
PRODUCT = void(MATRIX, MATRIX, int64, MATRIX, boolean)
GEMV = void(QUANTIZED, int64, int64, FLOATS, FLOATS)
KERNELS = {
    "tall": (gemm._multiply_tall, PRODUCT),
    "short": (gemm._multiply_short, PRODUCT),
    "int8": (gemv_bytes.multiply_int8, GEMV),
    "int4": (gemv_bytes.multiply_int4, GEMV),
}


def assembly(name: str) -> str:
    """Return the assembly of a kernel."""
    kernel, signature = KERNELS[name]
    kernel.compile(signature)
    return str(kernel.inspect_asm(signature.args))


if __name__ == "__main__":
    print(assembly(sys.argv[1]))
