"""Products of quantized weights with one row on the byte instructions of AVX-512, VNNI.

One instruction multiplies 64 bytes by 64 others and adds the products by fours to 16 sums. Codes
are bytes, or become bytes by a mask, and the row is cut into three (`fixed_point.py`): a third of
the instructions that it takes to make floats of the codes first, so that there is hardly anything
but memory to wait for. Without VNNI, `numpy_products.times_codes` does the same in floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from gptx.backends.cpu.kernels.cpu_features import has
from gptx.backends.cpu.kernels.fixed_point import PARTS, digits, measure
from gptx.backends.cpu.kernels.group_scales import fetch_group, scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    AHEAD,
    INTS,
    LANES,
    call,
    compiled,
    get,
    int64,
    ints,
    load,
    nearest,
    prefetch_once,
    put,
    splat,
    spread,
    store,
    to_bytes,
    to_floats,
    vectors,
)

COMPILED = has("avx512vnni")


@intrinsic
def _add_dots(context: Any, room: Any, i: Any, codes: Any, x: Any) -> Any:
    """To the ints in vector i of `vectors`, lane by lane: four codes times four bytes of x."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = builder.gep(args[0], [int64(context, builder, args[1], sig.args[1])])
        place = builder.bitcast(place, INTS.as_pointer())
        sums = builder.load(place)
        name = "llvm.x86.avx512.vpdpbusd.512"
        builder.store(call(builder, name, INTS, sums, args[2], args[3]), place)
        return context.get_dummy_value()

    return types.void(room, i, codes, x), generate


@intrinsic
def _as_ints(context: Any, x: Any) -> Any:
    """The bits of floats as ints."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], INTS)

    return ints(x), generate


@compiled
def cut_row(x: Any, n_in: int, group: int, bits: int) -> None:
    """Put behind a row x [I] the sums of its groups, its factor and its bytes [3, I]."""
    groups = n_in // group
    factor, inverse = measure(x, n_in, group, x[n_in:], 1)
    x[n_in + groups] = factor
    where = x[n_in + groups + 1 :].view(np.int8)
    for k in range(0, n_in, LANES):
        digits(where, k, n_in, nearest(load(x, k) * splat(inverse)), bits)


def times_codes(bits: int) -> Callable[..., None]:
    """Make 16 outputs of y = W·x for codes of so many bits; x is what `cut_row` has made."""
    per_word = 32 // bits

    @compiled
    def times(
        w: Any, scales: Any, steps: int, x: Any, tile: int, n_in: int, group: int, y: Any
    ) -> None:
        groups, part, bytes_of_x = n_in // group, n_in // 4, x.view(np.uint32)
        factor, low = spread(x, n_in + groups), n_in + groups + 1
        result = splat(0.0)
        for g in range(groups):
            acc = vectors(PARTS)
            for p in range(PARTS):
                put(acc, p, splat(0.0))  # whose bits are those of the whole number
            for k in range(g * group, (g + 1) * group, per_word):
                at, i = low + k // 4, (tile * n_in + k) // per_word * LANES
                prefetch_once(w, i + AHEAD // 4)
                words = load(w, i)
                if bits == 8:
                    for p in range(PARTS):
                        _add_dots(acc, p, words, spread(bytes_of_x, at + p * part))
                else:
                    even, odd = to_bytes(words, 0), to_bytes(words, 1)
                    for p in range(PARTS):
                        _add_dots(acc, p, even, spread(bytes_of_x, at + p * part))
                        _add_dots(acc, p, odd, spread(bytes_of_x, at + p * part + 1))
            fetch_group(scales, tile * groups + g, steps)
            whole = to_floats(_as_ints(get(acc, 0)))
            whole += to_floats(_as_ints(get(acc, 1))) * splat(2.0**8)
            whole += to_floats(_as_ints(get(acc, 2))) * splat(2.0**16)
            scale, offset = scale_and_offset(scales, tile * groups + g, steps)
            result += scale * (whole * factor) + offset * spread(x, n_in + g)
        store(y, tile * LANES, result)

    return times


times_int8, times_int4 = times_codes(8), times_codes(4)
