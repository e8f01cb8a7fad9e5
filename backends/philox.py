"""Philox 4x64-10, a counter-based generator of random bits, in the array API only.

A block of four words is a function of a key and a counter; there is no state. Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3", 2011. `numpy.random.Philox` is the definition: its
first block has the counter after the given one. The words are signed integers that wrap, since
PyTorch cannot add or shift unsigned ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any

ROUNDS = 10
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
KEY_INCREMENTS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def random_bits(
    ops: Any, key: tuple[int, int], counter: tuple[Any, Any], first_row: Any, rows: int, n: int
) -> Array:
    """Return random bits, 16 to an element.

    Row r has the numbers of `np.random.Philox(key=key, counter=[0, *counter, first_row + r])`, each
    word as four elements, its low bits first.

    Parameters
    ----------
    ops
        A backend.
    key
        Two numbers from 0 to 2**64 - 1.
    counter, first_row
        Numbers from 0 to 2**64 - 1, or scalars of int64 on the device.
    rows
        Number of rows.
    n
        Elements of a row.

    Returns
    -------
    Array
        int64 [rows, n], each from 0 to 65535.
    """
    xp = ops.xp
    blocks = -(-n // 16)
    block = _words(ops, np.tile(np.arange(1, blocks + 1), rows))
    row = _words(ops, np.repeat(np.arange(rows), blocks)) + _words(ops, first_row)
    step, site = (xp.broadcast_to(_words(ops, x), block.shape) for x in counter)
    even, odd = xp.stack([block, site]), xp.stack([step, row])  # words 0 and 2, words 1 and 3
    multiply = _multiplication(ops)
    for number in range(ROUNDS):
        keys = [[(k + number * w) % 2**64] for k, w in zip(key, KEY_INCREMENTS, strict=True)]
        high, low = multiply(even)
        even = xp.flip(high, axis=0) ^ odd ^ _words(ops, keys)
        odd = xp.flip(low, axis=0)
    words = xp.reshape(xp.stack([even, odd], axis=1), (4, rows, blocks, 1))
    words = xp.permute_dims(words, (1, 2, 0, 3))
    bits = (words >> _words(ops, [0, 16, 32, 48])) & _words(ops, 0xFFFF)
    return xp.reshape(bits, (rows, 16 * blocks))[:, :n]


def _multiplication(ops: Any) -> Callable[[Array], tuple[Array, Array]]:
    """Return a function of words [2, n]: the high and the low words of `MULTIPLIERS` times them."""
    mask, half = _words(ops, 2**32 - 1), _words(ops, 32)
    a = _words(ops, [[a] for a in MULTIPLIERS])
    a_low, a_high = a & mask, (a >> half) & mask

    def multiply(b: Array) -> tuple[Array, Array]:
        b_low, b_high = b & mask, (b >> half) & mask
        middle = a_high * b_low + ((a_low * b_low >> half) & mask)
        rest = a_low * b_high + (middle & mask)
        high = a_high * b_high + ((middle >> half) & mask) + ((rest >> half) & mask)
        return high, a * b

    return multiply


def _words(ops: Any, numbers: Any) -> Array:
    """Copy numbers from 0 to 2**64 - 1 to the device as words, if they are not there."""
    if isinstance(numbers, int | list | np.ndarray):
        words = np.asarray(numbers, np.uint64).view(np.int64)
        return ops.xp.asarray(words, dtype=ops.xp.int64, **ops.on_device)
    return numbers
