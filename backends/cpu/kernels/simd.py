"""Vectors of 16 floats for Numba: what its loops leave to the compiler's luck, said outright.

A kernel that names its vectors keeps them in registers, whatever the compiler would have made of a
loop over single numbers. LLVM fits the 16 lanes to the processor: one AVX-512 register, two of
AVX2, four of NEON. Indices count elements of flat arrays and are not checked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import carray, float32, njit, types, uint16, uint32
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

I8, I32 = ir.IntType(8), ir.IntType(32)
F16, F32 = ir.HalfType(), ir.FloatType()
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
HALVES = ir.VectorType(F16, LANES)  # in memory only, and there uint16 for Numba

# Sums may be reordered and fused, but a NaN stays one: the sampler looks for it.
FAST = {"contract", "reassoc", "nsz", "arcp"}
compiled = njit(fastmath=FAST, error_model="numpy")
AHEAD = 8192  # bytes by which a stream of weights is fetched before it is needed


class Vector(types.Type):
    """The Numba type of a vector (or of a stack of them); `llvm` is what it is compiled to."""

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


def _operator(op: Any, instruction: str) -> None:
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
    _operator(_op, _name)


def int64(context: Any, builder: Any, value: Any, given: Any) -> Any:
    return context.cast(builder, value, given, types.int64)


def pointer(context: Any, builder: Any, given: Any, args: Any) -> Any:
    """Where element args[1] of the flat array args[0] lies."""
    array = context.make_array(given[0])(context, builder, args[0])
    return builder.gep(array.data, [int64(context, builder, args[1], given[1])])


def filled(builder: Any, value: Any, vector: Any) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(INTS, [0] * LANES))


def call(builder: Any, name: str, result: Any, *args: Any, flags: tuple[str, ...] = ()) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, args, fastmath=flags)


@intrinsic
def load(context: Any, array: Any, i: Any) -> Any:
    """array[i : i + 16]: float32, and float16 as uint16, as floats; 32-bit integers as ints."""
    result = floats if array.dtype in (types.float32, types.uint16) else ints

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = pointer(context, builder, sig.args, args)
        if array.dtype == types.uint16:
            halves = builder.load(builder.bitcast(place, HALVES.as_pointer()), align=2)
            return builder.fpext(halves, FLOATS)
        return builder.load(builder.bitcast(place, result.llvm.as_pointer()), align=4)

    return result(array, i), generate


@intrinsic
def store(context: Any, array: Any, i: Any, value: Any) -> Any:
    """array[i : i + 16] = value, of floats or ints as the array is; into uint16 as float16."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place, value, align = pointer(context, builder, sig.args, args), args[2], 4
        if array.dtype == types.uint16:
            value, align = builder.fptrunc(value, HALVES), 2
        builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=align)
        return context.get_dummy_value()

    return types.void(array, i, value), generate


@intrinsic
def number(context: Any, array: Any, i: Any) -> Any:
    """array[i] of float32, or of float16 as uint16."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = pointer(context, builder, sig.args, args)
        if array.dtype == types.uint16:
            return builder.fpext(builder.load(builder.bitcast(place, F16.as_pointer())), F32)
        return builder.load(place)

    return types.float32(array, i), generate


@intrinsic
def put_number(context: Any, array: Any, i: Any, value: Any) -> Any:
    """array[i] = value, a float32, into float32 or into float16 as uint16."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place, value = pointer(context, builder, sig.args, args), args[2]
        if array.dtype == types.uint16:
            place, value = builder.bitcast(place, F16.as_pointer()), builder.fptrunc(value, F16)
        builder.store(value, place)
        return context.get_dummy_value()

    return types.void(array, i, types.float32), generate


def _prefetch(cache: int) -> Callable[..., Any]:
    @intrinsic
    def prefetch(context: Any, array: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            place = builder.bitcast(pointer(context, builder, sig.args, args), I8.as_pointer())
            call(builder, "llvm.prefetch.p0", ir.VoidType(), place, I32(0), I32(4 - cache), I32(1))
            return context.get_dummy_value()

        return types.void(array, i), generate

    return prefetch


# Begin to bring array[i], which may lie past the end, to the first cache; or, what is read but
# once, to the second, which has more on its way at a time.
prefetch, prefetch_once = _prefetch(1), _prefetch(2)


@intrinsic
def splat(context: Any, x: Any) -> Any:
    """The number x in each lane."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return filled(builder, context.cast(builder, args[0], sig.args[0], types.float32), FLOATS)

    return floats(x), generate


@intrinsic
def spread(context: Any, array: Any, i: Any) -> Any:
    """array[i] in each lane: float32 as floats, uint32 as ints."""
    result = floats if array.dtype == types.float32 else ints

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(pointer(context, builder, sig.args, args))
        return filled(builder, value, result.llvm)

    return result(array, i), generate


@intrinsic
def code(context: Any, words: Any, n: Any, bits: Any) -> Any:
    """Code n of each of 16 words of 8 or 4 bits a code as floats, 2**(bits·n) times too large.

    Left in their place they need no shift; who multiplies them makes the other factor smaller. The
    last code is shifted, since it would touch the sign, and is as large as it is.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at, width = (
            builder.trunc(int64(context, builder, value, given), I32)
            for value, given in zip(args[1:], sig.args[1:], strict=True)
        )
        shift = builder.mul(at, width)
        mask = builder.shl(builder.sub(builder.shl(I32(1), width), I32(1)), shift)
        there = builder.and_(args[0], filled(builder, mask, INTS))
        last = builder.lshr(args[0], filled(builder, shift, INTS))
        is_last = builder.icmp_unsigned("==", builder.add(shift, width), I32(32))
        return builder.sitofp(builder.select(is_last, last, there), FLOATS)

    return floats(words, n, bits), generate


@intrinsic
def to_floats(context: Any, x: Any) -> Any:
    """Signed ints as floats."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], FLOATS)

    return floats(x), generate


@intrinsic
def to_bytes(context: Any, words: Any, odd: Any) -> Any:
    """The even codes of 4 bits of each word, or the odd ones, as its four bytes."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        shift = builder.shl(
            builder.trunc(int64(context, builder, args[1], sig.args[1]), I32), I32(2)
        )
        moved = builder.lshr(args[0], filled(builder, shift, INTS))
        return builder.and_(moved, ir.Constant(INTS, [0x0F0F0F0F] * LANES))

    return ints(words, odd), generate


def _reduction(name: str, start: float | None) -> Callable[..., Any]:
    @intrinsic
    def reduction(context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first = () if start is None else (ir.Constant(F32, start),)
            return call(builder, name, F32, *first, args[0], flags=("reassoc",))

        return types.float32(x), generate

    return reduction


total = _reduction("llvm.vector.reduce.fadd.v16f32", 0.0)
largest = _reduction("llvm.vector.reduce.fmax.v16f32", None)


def _choice(predicate: str) -> Callable[..., Any]:
    @intrinsic
    def choice(context: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.select(builder.fcmp_ordered(predicate, *args), args[1], args[0])

        return floats(x, y), generate

    return choice


maximum = _choice("<")  # lane by lane; x where it is a NaN
minimum = _choice(">")


@intrinsic
def negative(context: Any, x: Any) -> Any:
    """1 where x is below 0, else 0."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        return builder.uitofp(builder.fcmp_ordered("<", args[0], zero), FLOATS)

    return floats(x), generate


@intrinsic
def nearest(context: Any, x: Any) -> Any:
    """The nearest whole numbers, as floats."""

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
    """e**x within 2 units in the last place, for x held between -87 and 88.

    The polynomial is that of Cephes' expf (S. Moshier), on the remainder after the powers of two.
    """
    x = minimum(maximum(x, splat(-87.0)), splat(88.0))
    n = nearest(x * splat(1.44269504))
    r = x - n * splat(0.693359375) - n * splat(-2.12194440e-4)
    p = splat(1.9875691500e-4) * r + splat(1.3981999507e-3)
    p = p * r + splat(8.3334519073e-3)
    p = p * r + splat(4.1665795894e-2)
    p = p * r + splat(1.6666665459e-1)
    p = p * r + splat(5.0000001201e-1)
    return (p * r * r + r + splat(1.0)) * _power_of_two(n)


@intrinsic
def vectors(context: Any, n: Any) -> Any:
    """Room for n vectors (a constant); in loops of constant length they become registers."""
    if not isinstance(n, types.IntegerLiteral):
        return None
    room = ir.ArrayType(FLOATS, n.literal_value)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            return builder.gep(builder.alloca(room), [I32(0), I32(0)])

    return stack(n), generate


@intrinsic
def get(context: Any, room: Any, i: Any) -> Any:
    """Vector i of `vectors`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.gep(args[0], [int64(context, builder, args[1], sig.args[1])]))

    return floats(room, i), generate


@intrinsic
def put(context: Any, room: Any, i: Any, value: Any) -> Any:
    """Set vector i of `vectors`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = builder.gep(args[0], [int64(context, builder, args[1], sig.args[1])])
        builder.store(args[2], place)
        return context.get_dummy_value()

    return types.void(room, i, value), generate


@intrinsic
def totals(context: Any, room: Any) -> Any:
    """Lane n is the total of vector n of 16; by halves, with a third of the work of 16 `total`s."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def pick(a: Any, b: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(INTS, lanes))

        rest = [builder.load(builder.gep(args[0], [I32(n)])) for n in range(LANES)]
        part = LANES  # lanes that hold parts of one total
        while part > 1:
            part //= 2
            # Of two vectors, what lies in the first halves of their parts plus the second halves.
            first = [i for i in range(LANES) if i % (2 * part) < part]
            first += [LANES + i for i in first]
            second = [i + part for i in first]
            rest = [
                builder.fadd(pick(a, b, first), pick(a, b, second), flags=("reassoc",))
                for a, b in zip(rest[::2], rest[1::2], strict=True)
            ]
        return rest[0]

    return floats(room), generate


@intrinsic
def _void_pointer(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit
def float_array(address: int, size: int) -> Any:
    """The float32 array [size] at an address."""
    return carray(_void_pointer(address), (size,), float32)


@njit
def half_array(address: int, size: int) -> Any:
    """The float16 array [size] at an address, as uint16."""
    return carray(_void_pointer(address), (size,), uint16)


@njit
def word_array(address: int, size: int) -> Any:
    """The uint32 array [size] at an address."""
    return carray(_void_pointer(address), (size,), uint32)
