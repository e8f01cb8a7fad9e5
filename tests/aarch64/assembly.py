"""Print the assembly of kernels for aarch64: python -m tests.aarch64.assembly KERNEL ...

Numba compiles them on any machine, for the processor that `NUMBA_CPU_NAME` and
`NUMBA_CPU_FEATURES` name. The code is not executed.
"""
# ruff: noqa: E402

from __future__ import annotations

import platform
import sys

import llvmlite.binding as llvm

# Numba and the kernels read these when they are imported.
platform.machine = lambda: "aarch64"
llvm.get_process_triple = lambda: "aarch64-unknown-linux-gnu"
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()

from numba import boolean, float32, int64, types, uint32, void

from gptx.backends.cpu.interface.sizes import WORD_ROWS
from gptx.backends.cpu.kernels import gemm, gemv_bytes
from gptx.backends.cpu.kernels.arguments import Matrix, QuantizedMatrix
from gptx.backends.cpu.kernels.gemv_words import make_word_product

FLOATS, WORDS = types.Array(float32, 1, "C"), types.Array(uint32, 1, "C")
MATRIX = types.NamedTuple([FLOATS, int64, int64, int64], Matrix)
QUANTIZED = types.NamedTuple([WORDS, WORDS, int64, int64, int64, int64], QuantizedMatrix)
GEMV = void(QUANTIZED, int64, int64, FLOATS, FLOATS)
GEMM = void(
    FLOATS, *[int64] * 5, MATRIX, boolean, int64, MATRIX, boolean, FLOATS, MATRIX, int64
)  # fmt: skip
BLOCK = void(QUANTIZED, int64, int64, FLOATS, int64, MATRIX)
KERNELS = {
    "int8": (gemv_bytes.multiply_int8, GEMV),
    "int4": (gemv_bytes.multiply_int4, GEMV),
    "strips": (gemm.multiply_strip, GEMM),
    "words": (make_word_product(4, WORD_ROWS), BLOCK),
}


def assembly(name: str) -> str:
    """Return the assembly of a kernel, a key of `KERNELS`."""
    kernel, signature = KERNELS[name]
    kernel.compile(signature)
    return str(kernel.inspect_asm(signature.args))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(assembly(name))
