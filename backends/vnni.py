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

from gptx.backends.fixed_point import PARTS, digits, measure
from gptx.backends.numpy_groups import fetch_group, scale_and_offset
from gptx.backends.processor import has
from gptx.backends.simd import (
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


def times_codes(bits: int, streams: int) -> Callable[..., None]:
    """Make outputs of y = W·x for codes of so many bits; x is what `cut_row` has made.

    So many tiles of 16 outputs, from `first` on, are read at once.
    """
    per_word, sums = 32 // bits, PARTS * streams

    @compiled
    def times(
        w: Any, scales: Any, wide: bool, x: Any, first: int, n_in: int, group: int, y: Any
    ) -> None:
        groups, part, bytes_of_x = n_in // group, n_in // 4, x.view(np.uint32)
        factor, low = spread(x, n_in + groups), n_in + groups + 1
        result = vectors(streams)
        for c in range(streams):
            put(result, c, splat(0.0))
        for g in range(groups):
            acc = vectors(sums)
            for n in range(sums):
                put(acc, n, splat(0.0))  # whose bits are those of the whole number
            for k in range(g * group, (g + 1) * group, per_word):
                at = low + k // 4
                for c in range(streams):
                    i = ((first + c) * n_in + k) // per_word * LANES
                    prefetch_once(w, i + AHEAD // 4)
                    words = load(w, i)
                    if bits == 8:
                        for p in range(PARTS):
                            _add_dots(acc, PARTS * c + p, words, spread(bytes_of_x, at + p * part))
                    else:
                        even, odd = to_bytes(words, 0), to_bytes(words, 1)
                        for p in range(PARTS):
                            j = at + p * part
                            _add_dots(acc, PARTS * c + p, even, spread(bytes_of_x, j))
                            _add_dots(acc, PARTS * c + p, odd, spread(bytes_of_x, j + 1))
            for c in range(streams):
                n = (first + c) * groups + g
                fetch_group(scales, n, wide)
                whole = to_floats(_as_ints(get(acc, PARTS * c)))
                whole += to_floats(_as_ints(get(acc, PARTS * c + 1))) * splat(2.0**8)
                whole += to_floats(_as_ints(get(acc, PARTS * c + 2))) * splat(2.0**16)
                scale, offset = scale_and_offset(scales, n, wide)
                scaled = scale * (whole * factor) + offset * spread(x, n_in + g)
                put(result, c, get(result, c) + scaled)
        for c in range(streams):
            store(y, (first + c) * LANES, get(result, c))

    return times


times_int8, times_int4 = times_codes(8, 4), times_codes(4, 1)
