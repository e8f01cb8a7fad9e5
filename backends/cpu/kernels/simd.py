"""Vectors of 16 float32 or int32 as Numba types, with loads, stores and arithmetic.

A kernel that names its vectors keeps them in registers. Numba's loops over single numbers leave
that to LLVM's vectorizer. LLVM maps the 16 lanes to the processor: one AVX-512 register, two of
AVX2, four of NEON. Indices count elements of flat arrays and are not checked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from gptx.backends.cpu.interface.sizes import LANES
from gptx.backends.cpu.kernels.compilation import I8, I32, call, element_pointer, to_int64

PREFETCH_BYTES = 8192  # distance from a load of weights to the prefetch beside it

F16, F32 = ir.HalfType(), ir.FloatType()
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
BYTES = ir.VectorType(I8, 4 * LANES)
FLOAT16S = ir.VectorType(F16, LANES)  # in memory only, where Numba reads uint16


# Types


class Vector(types.Type):
    """The Numba type of a vector, or of several on the stack; `llvm` is the LLVM type."""

    def __init__(self, name: str, llvm: Any) -> None:
        self.llvm = llvm
        super().__init__(name=name)


class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Vector) -> None:
        super().__init__(manager, fe_type, fe_type.llvm)


register_model(Vector)(_Model)

floats = Vector("16 floats", FLOATS)
ints = Vector("16 ints", INTS)
stack = Vector("vectors on the stack", FLOATS.as_pointer())


# Memory


def fill_lanes(builder: Any, value: Any, vector: Any) -> Any:
    """Emit a vector of LLVM type `vector` with `value` in each lane."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, vector.count), None))


def join(builder: Any, a: Any, b: Any) -> Any:
    """Emit the vector with the lanes of a, then those of b."""
    lanes = list(range(2 * a.type.count))
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


@intrinsic
def load(context: Any, array: Any, i: Any) -> Any:
    """Return array[i : i + 16]: float32 and float16 (uint16) as floats, other integers as ints."""
    result = floats if array.dtype in (types.float32, types.uint16) else ints

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = element_pointer(context, builder, sig.args, args)
        if array.dtype == types.uint16:
            values = builder.load(builder.bitcast(pointer, FLOAT16S.as_pointer()), align=2)
            return builder.fpext(values, FLOATS)
        return builder.load(builder.bitcast(pointer, result.llvm.as_pointer()), align=4)

    return result(array, i), generate


@intrinsic
def load_bits_as_floats(context: Any, array: Any, i: Any) -> Any:
    """Return the floats whose bits are array[i : i + 16], uint32.

    A view of the array as float32 would update a reference count.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = element_pointer(context, builder, sig.args, args)
        return builder.load(builder.bitcast(pointer, FLOATS.as_pointer()), align=4)

    return floats(array, i), generate


@intrinsic
def store(context: Any, array: Any, i: Any, value: Any) -> Any:
    """Set array[i : i + 16] to floats or ints, by the array's type; uint16 takes float16."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer, value, align = element_pointer(context, builder, sig.args, args), args[2], 4
        if array.dtype == types.uint16:
            value, align = builder.fptrunc(value, FLOAT16S), 2
        builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)
        return context.get_dummy_value()

    return types.void(array, i, value), generate


@intrinsic
def load_scalar(context: Any, array: Any, i: Any) -> Any:
    """Return array[i] of float32, or of float16 (uint16) as float32."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = element_pointer(context, builder, sig.args, args)
        if array.dtype == types.uint16:
            return builder.fpext(builder.load(builder.bitcast(pointer, F16.as_pointer())), F32)
        return builder.load(pointer)

    return types.float32(array, i), generate


@intrinsic
def store_scalar(context: Any, array: Any, i: Any, value: Any) -> Any:
    """Set array[i] of float32, or of float16 (uint16), to a float32."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer, value = element_pointer(context, builder, sig.args, args), args[2]
        if array.dtype == types.uint16:
            pointer, value = builder.bitcast(pointer, F16.as_pointer()), builder.fptrunc(value, F16)
        builder.store(value, pointer)
        return context.get_dummy_value()

    return types.void(array, i, types.float32), generate


def _make_prefetch(cache_level: int) -> Callable[..., Any]:
    @intrinsic
    def prefetch(context: Any, array: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = element_pointer(context, builder, sig.args, args)
            pointer, locality = builder.bitcast(pointer, I8.as_pointer()), I32(4 - cache_level)
            call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), locality, I32(1))
            return context.get_dummy_value()

        return types.void(array, i), generate

    return prefetch


# Prefetch array[i], which may be past the end. The second-level cache allows more outstanding
# requests: it suits weights, which a pass reads once.
prefetch_l1, prefetch_l2 = _make_prefetch(1), _make_prefetch(2)


@intrinsic
def splat(context: Any, x: Any) -> Any:
    """Return the number x in each lane, as floats."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = context.cast(builder, args[0], sig.args[0], types.float32)
        return fill_lanes(builder, value, FLOATS)

    return floats(x), generate


@intrinsic
def broadcast(context: Any, array: Any, i: Any) -> Any:
    """Return array[i] in each lane: float32 as floats, uint32 as ints."""
    result = floats if array.dtype == types.float32 else ints

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(element_pointer(context, builder, sig.args, args))
        return fill_lanes(builder, value, result.llvm)

    return result(array, i), generate


@intrinsic
def extract_lane(context: Any, x: Any, n: Any) -> Any:
    """Return lane n of floats."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], args[1])

    return types.float32(x, n), generate


# Vectors on the stack


@intrinsic
def stack_vectors(context: Any, n: Any) -> Any:
    """Allocate n vectors (a constant); LLVM keeps them in registers in loops of constant length."""
    if not isinstance(n, types.IntegerLiteral):
        return None
    vectors = ir.ArrayType(FLOATS, n.literal_value)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            return builder.gep(builder.alloca(vectors), [I32(0), I32(0)])

    return stack(n), generate


@intrinsic
def get_vector(context: Any, vectors: Any, i: Any) -> Any:
    """Return vector i of `stack_vectors`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(
            builder.gep(args[0], [to_int64(context, builder, args[1], sig.args[1])])
        )

    return floats(vectors, i), generate


@intrinsic
def put_vector(context: Any, vectors: Any, i: Any, value: Any) -> Any:
    """Set vector i of `stack_vectors`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.gep(args[0], [to_int64(context, builder, args[1], sig.args[1])])
        builder.store(args[2], pointer)
        return context.get_dummy_value()

    return types.void(vectors, i, value), generate


@intrinsic
def transpose_vectors(context: Any, vectors: Any) -> Any:
    """Swap lane i of vector j with lane j of vector i, in `stack_vectors(16)`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointers = [builder.gep(args[0], [I32(n)]) for n in range(LANES)]
        rows = [builder.load(pointer) for pointer in pointers]
        for size in (1, 2, 4, 8):  # of the blocks swapped across the diagonal of twice their size
            upper = [i if not i & size else LANES + i - size for i in range(LANES)]
            lower = [i + size if not i & size else LANES + i for i in range(LANES)]
            old = rows.copy()
            for n in range(LANES):
                pair = old[n & ~size], old[n | size]
                lanes = ir.Constant(INTS, lower if n & size else upper)
                rows[n] = builder.shuffle_vector(*pair, lanes)
        for pointer, row in zip(pointers, rows, strict=True):
            builder.store(row, pointer)
        return context.get_dummy_value()

    return types.void(vectors), generate


# Arithmetic


def _define_operator(op: Any, instruction: str) -> None:
    @infer_global(op)
    class Template(ConcreteTemplate):
        cases = [signature(floats, floats, floats)]  # noqa: RUF012

    @lower_builtin(op, floats, floats)
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # No reassociation here: `exp` subtracts a constant in two parts.
        return getattr(builder, instruction)(*args, flags=("contract", "nsz", "arcp"))


for _op, _name in (
    (operator.add, "fadd"),
    (operator.iadd, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_op, _name)


def _make_choice(predicate: str) -> Callable[..., Any]:
    @intrinsic
    def choice(context: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.select(builder.fcmp_ordered(predicate, *args), args[1], args[0])

        return floats(x, y), generate

    return choice


# Lane by lane; the result is x where x or y is NaN.
maximum, minimum = _make_choice("<"), _make_choice(">")


@intrinsic
def is_negative(context: Any, x: Any) -> Any:
    """Return 1 where x is below 0, else 0, as floats."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        return builder.uitofp(builder.fcmp_ordered("<", args[0], zero), FLOATS)

    return floats(x), generate


@intrinsic
def round_to_even(context: Any, x: Any) -> Any:
    """Return the nearest integers, as floats; the even one of two at the same distance."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, "llvm.nearbyint.v16f32", FLOATS, args[0])

    return floats(x), generate


@intrinsic
def _power_of_two(context: Any, n: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        exponent = builder.add(builder.fptosi(args[0], INTS), ir.Constant(INTS, [127] * LANES))
        return builder.bitcast(builder.shl(exponent, ir.Constant(INTS, [23] * LANES)), FLOATS)

    return floats(n), generate


@njit
def exp(x: Any) -> Any:
    """Return e**x within 2 units in the last place, with x clipped to [-87, 88].

    The polynomial is that of Cephes' expf (S. Moshier), on the remainder after the powers of two.
    """
    x = minimum(maximum(x, splat(-87.0)), splat(88.0))
    n = round_to_even(x * splat(1.44269504))
    r = x - n * splat(0.693359375) - n * splat(-2.12194440e-4)
    p = splat(1.9875691500e-4) * r + splat(1.3981999507e-3)
    p = p * r + splat(8.3334519073e-3)
    p = p * r + splat(4.1665795894e-2)
    p = p * r + splat(1.6666665459e-1)
    p = p * r + splat(5.0000001201e-1)
    return (p * r * r + r + splat(1.0)) * _power_of_two(n)


# Reductions


def _make_reduction(name: str, start: float | None) -> Callable[..., Any]:
    @intrinsic
    def reduction(context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first = () if start is None else (ir.Constant(F32, start),)
            return call(builder, name, F32, *first, args[0], flags=("reassoc",))

        return types.float32(x), generate

    return reduction


sum_lanes = _make_reduction("llvm.vector.reduce.fadd.v16f32", 0.0)
max_lanes = _make_reduction("llvm.vector.reduce.fmax.v16f32", None)


@intrinsic
def sum_lanes_of_16(context: Any, vectors: Any) -> Any:
    """Return the sum of the lanes of vector n of `stack_vectors(16)` in lane n.

    Halving all vectors together takes a third of the instructions of 16 calls of `sum_lanes`.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def pick(a: Any, b: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(INTS, lanes))

        rest = [builder.load(builder.gep(args[0], [I32(n)])) for n in range(LANES)]
        part = LANES  # lanes that hold partial sums of one result
        while part > 1:
            part //= 2
            # From two vectors: the first halves of their parts, plus the second halves.
            first = [i for i in range(LANES) if i % (2 * part) < part]
            first += [LANES + i for i in first]
            second = [i + part for i in first]
            rest = [
                builder.fadd(pick(a, b, first), pick(a, b, second), flags=("reassoc",))
                for a, b in zip(rest[::2], rest[1::2], strict=True)
            ]
        return rest[0]

    return floats(vectors), generate


# Integers


@intrinsic
def bits_as_ints(context: Any, x: Any) -> Any:
    """Reinterpret the bits of floats as ints."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], INTS)

    return ints(x), generate


@intrinsic
def ints_to_floats(context: Any, x: Any) -> Any:
    """Convert signed ints to floats."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], FLOATS)

    return floats(x), generate


def emit_bit_field(builder: Any, words: Any, n: Any, bits: Any) -> Any:
    """Emit bit field n, of `bits` bits (of LLVM type i32), of each of 16 words, as floats.

    A field keeps its place in the word, which saves a shift: it is its value times 2**(bits * n),
    and the caller scales the other factor. The last field would set the sign bit; it is shifted, so
    its factor is 1.
    """
    shift = builder.mul(n, bits)
    mask = builder.shl(builder.sub(builder.shl(I32(1), bits), I32(1)), shift)
    unshifted = builder.and_(words, fill_lanes(builder, mask, INTS))
    shifted = builder.lshr(words, fill_lanes(builder, shift, INTS))
    is_last = builder.icmp_unsigned("==", builder.add(shift, bits), I32(32))
    return builder.sitofp(builder.select(is_last, shifted, unshifted), FLOATS)


@intrinsic
def bit_field_as_floats(context: Any, words: Any, n: Any, bits: Any) -> Any:
    """Return `emit_bit_field` of 16 words."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        numbers = (
            builder.trunc(to_int64(context, builder, value, kind), I32)
            for value, kind in zip(args[1:], sig.args[1:], strict=True)
        )
        return emit_bit_field(builder, args[0], *numbers)

    return floats(words, n, bits), generate


@intrinsic
def nibbles_as_bytes(context: Any, words: Any, odd: Any) -> Any:
    """Return the even (odd=0) or odd (odd=1) fields of 4 bits of each word as its four bytes."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        odd = builder.trunc(to_int64(context, builder, args[1], sig.args[1]), I8)
        shift = fill_lanes(builder, builder.shl(odd, I8(2)), BYTES)
        moved = builder.lshr(builder.bitcast(args[0], BYTES), shift)
        nibbles = builder.and_(moved, ir.Constant(BYTES, [0x0F] * BYTES.count))
        return builder.bitcast(nibbles, INTS)

    return ints(words, odd), generate
