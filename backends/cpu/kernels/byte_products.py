"""Products of bytes, added by fours to 32-bit integers: VNNI, or the dot products of NEON.

Weights are unsigned, the numbers that they multiply are signed. VNNI and `usdot` take them so.
`sdot`, on processors without I8MM, takes signed weights: 128 less.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.interface.cpu_features import HAS_I8MM, HAS_VNNI
from gptx.backends.cpu.interface.sizes import LANES
from gptx.backends.cpu.kernels.compilation import I8, I32, call, to_int64
from gptx.backends.cpu.kernels.simd import INTS, ints, join

HAS_UNSIGNED_WEIGHTS = HAS_VNNI or HAS_I8MM
QUARTER, QUARTER_BYTES = ir.VectorType(I32, LANES // 4), ir.VectorType(I8, LANES)


def _emit_vnni(builder: Any, sums: Any, weights: Any, x: Any) -> Any:
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, sums, weights, x)


def _emit_neon(builder: Any, sums: Any, weights: Any, x: Any) -> Any:
    """Emit an instruction for each quarter: a register of NEON has 4 ints or 16 bytes."""

    name = f"llvm.aarch64.neon.{'usdot' if HAS_I8MM else 'sdot'}.v4i32.v16i8"
    quarters = []
    for n in range(0, LANES, 4):
        lanes = ir.Constant(QUARTER, list(range(n, n + 4)))
        parts = [builder.shuffle_vector(vector, vector, lanes) for vector in (sums, weights, x)]
        factors = (builder.bitcast(part, QUARTER_BYTES) for part in parts[1:])
        quarters.append(call(builder, name, QUARTER, parts[0], *factors))
    return join(builder, join(builder, *quarters[:2]), join(builder, *quarters[2:]))


_emit_products = _emit_vnni if HAS_VNNI else _emit_neon


@intrinsic
def add_byte_products(context: Any, vectors: Any, i: Any, weights: Any, x: Any) -> Any:
    """Add to the ints in vector i of `stack_vectors`, in each lane, four weights times four x."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.gep(args[0], [to_int64(context, builder, args[1], sig.args[1])])
        pointer = builder.bitcast(pointer, INTS.as_pointer())
        sums = builder.load(pointer)
        builder.store(_emit_products(builder, sums, args[2], args[3]), pointer)
        return context.get_dummy_value()

    return types.void(vectors, i, weights, x), generate


@intrinsic
def subtract_128(context: Any, words: Any) -> Any:
    """Subtract 128 from each unsigned byte of the words, which makes them signed."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.xor(args[0], ir.Constant(INTS, [0x80808080] * LANES))

    return ints(words), generate
