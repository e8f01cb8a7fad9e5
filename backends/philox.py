"""Philox 4x64-10, a counter-based generator of random bits, in the array API only.

A block of four words is a function of a key and a counter; there is no state. Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3", 2011. `numpy.random.Philox` is the definition: its
first block has the counter after the given one. The words are signed integers that wrap, since
PyTorch cannot add or shift unsigned ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

ROUNDS = 10
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
KEY_INCREMENTS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
LOW = 2**32 - 1  # mask of the low half of a word


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
    block = _words(ops, np.tile(np.arange(1, blocks + 1, dtype=np.uint64), rows))
    row = _words(ops, np.repeat(np.arange(rows, dtype=np.uint64), blocks)) + _words(ops, first_row)
    step, site = (xp.broadcast_to(_words(ops, x), block.shape) for x in counter)
    words = [block, step, site, row]
    keys = list(key)
    for _ in range(ROUNDS):
        words = _round(ops, words, keys)
        keys = [(k + w) % 2**64 for k, w in zip(keys, KEY_INCREMENTS, strict=True)]
    words = [xp.reshape(word, (rows, blocks, 1, 1)) for word in words]
    shifts = xp.reshape(_words(ops, np.arange(0, 64, 16, dtype=np.uint64)), (1, 1, 1, 4))
    bits = (xp.concat(words, axis=2) >> shifts) & _words(ops, 0xFFFF)
    return xp.reshape(bits, (rows, 16 * blocks))[:, :n]


def _round(ops: Any, words: list[Array], keys: list[int]) -> list[Array]:
    """Return the four words after one round."""
    key_0, key_1 = (_words(ops, key) for key in keys)
    high_0, low_0 = _multiply(ops, MULTIPLIERS[0], words[0])
    high_1, low_1 = _multiply(ops, MULTIPLIERS[1], words[2])
    return [high_1 ^ words[1] ^ key_0, low_1, high_0 ^ words[3] ^ key_1, low_0]


def _multiply(ops: Any, a: int, b: Array) -> tuple[Array, Array]:
    """Return the high and the low word of the product of a number and the words b."""
    mask, half = _words(ops, LOW), _words(ops, 32)

    def high(x: Array) -> Array:
        return (x >> half) & mask

    a_low, a_high = (_words(ops, x) for x in (a & LOW, a >> 32))
    b_low, b_high = b & mask, high(b)
    middle = a_high * b_low + high(a_low * b_low)
    rest = a_low * b_high + (middle & mask)
    return a_high * b_high + high(middle) + high(rest), _words(ops, a) * b


def _words(ops: Any, numbers: Any) -> Array:
    """Copy numbers from 0 to 2**64 - 1 to the device as words, if they are not there."""
    if isinstance(numbers, int | np.ndarray):
        words = np.asarray(numbers, np.uint64).view(np.int64)
        return ops.xp.asarray(words, dtype=ops.xp.int64, **ops.on_device)
    return numbers
