"""GEMV kernels for quantized weights on instructions that multiply bytes: VNNI, NEON's `sdot`.

VNNI multiplies 64 bytes by 64 others and adds the products by fours to 16 sums; NEON takes four
instructions (`byte_products.py`). Quantized values are bytes, or become bytes by a mask; the row is
split into three bytes to a number (`fixed_point.py`). That takes a third of the instructions of
`gemv.py`, which converts the quantized values to floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gptx.backends.cpu.interface.sizes import LANES, N_DIGITS
from gptx.backends.cpu.kernels.arguments import QuantizedMatrix
from gptx.backends.cpu.kernels.byte_products import (
    HAS_UNSIGNED_WEIGHTS,
    add_byte_products,
    subtract_128,
)
from gptx.backends.cpu.kernels.compilation import compiled, inlined
from gptx.backends.cpu.kernels.fixed_point import measure_row, store_digits
from gptx.backends.cpu.kernels.group_scales import prefetch_group, scale_and_offset
from gptx.backends.cpu.kernels.simd import (
    PREFETCH_BYTES,
    bits_as_ints,
    broadcast,
    get_vector,
    ints_to_floats,
    load,
    nibbles_as_bytes,
    prefetch_l2,
    put_vector,
    round_to_even,
    splat,
    stack_vectors,
    store,
)


@compiled
def prepare_row(x: Any, n_in: int, group_size: int, bits: int) -> None:
    """Append to a row x [I] the sum of each group, the row's factor and its digits [3, I]."""
    n_groups = n_in // group_size
    factor, inverse = measure_row(x, n_in, group_size, x[n_in:], 1)
    x[n_in + n_groups] = factor
    digits = x[n_in + n_groups + 1 :].view(np.int8)
    for k in range(0, n_in, LANES):
        store_digits(digits, k, n_in, round_to_even(load(x, k) * splat(inverse)), bits)


@inlined
def add_group(
    result: Any, sums: Any, first: int, scale: Any, offset: Any, factor: Any, sum_of_x: Any
) -> Any:
    """Add a group to 16 results, from the sums of the three digits in the vectors from `first`."""
    group_sum = ints_to_floats(bits_as_ints(get_vector(sums, first)))
    group_sum += ints_to_floats(bits_as_ints(get_vector(sums, first + 1))) * splat(2.0**8)
    group_sum += ints_to_floats(bits_as_ints(get_vector(sums, first + 2))) * splat(2.0**16)
    return result + (scale * (group_sum * factor) + offset * sum_of_x)


def _make_quantized_gemv(bits: int) -> Callable[..., None]:
    per_word = 32 // bits
    subtracts_128 = bits == 8 and not HAS_UNSIGNED_WEIGHTS

    @compiled
    def multiply(matrix: QuantizedMatrix, first: int, last: int, x: Any, y: Any) -> None:
        """Compute strips [first, last) of y = W·x; x is the result of `prepare_row`."""
        words, groups, offset_bits = matrix.words, matrix.groups, matrix.offset_bits
        n_in, group_size = matrix.n_in, matrix.group_size
        n_groups, digit_stride, digits = n_in // group_size, n_in // 4, x.view(np.uint32)
        factor, digits_start = broadcast(x, n_in + n_groups), n_in + n_groups + 1
        for strip in range(first, last):
            result = splat(0.0)
            for g in range(n_groups):
                sums = stack_vectors(N_DIGITS)
                for d in range(N_DIGITS):
                    put_vector(sums, d, splat(0.0))  # the bits of the integer 0
                for k in range(g * group_size, (g + 1) * group_size, per_word):
                    at, i = digits_start + k // 4, (strip * n_in + k) // per_word * LANES
                    prefetch_l2(words, i + PREFETCH_BYTES // 4)
                    packed = load(words, i)
                    if subtracts_128:
                        packed = subtract_128(packed)
                    if bits == 8:
                        for d in range(N_DIGITS):
                            j = at + d * digit_stride
                            add_byte_products(sums, d, packed, broadcast(digits, j))
                    else:
                        even, odd = nibbles_as_bytes(packed, 0), nibbles_as_bytes(packed, 1)
                        for d in range(N_DIGITS):
                            j = at + d * digit_stride
                            add_byte_products(sums, d, even, broadcast(digits, j))
                            add_byte_products(sums, d, odd, broadcast(digits, j + 1))
                entry = strip * n_groups + g
                prefetch_group(groups, entry, offset_bits)
                scale, offset = scale_and_offset(groups, entry, offset_bits)
                if subtracts_128:
                    offset += scale * splat(128.0)
                sum_of_x = broadcast(x, n_in + g)
                result = add_group(result, sums, 0, scale, offset, factor, sum_of_x)
            store(y, strip * LANES, result)

    return multiply


multiply_int8, multiply_int4 = _make_quantized_gemv(8), _make_quantized_gemv(4)
