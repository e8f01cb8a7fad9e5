"""CRC-32C (Castagnoli), the checksum of TensorFlow's files, nearly as fast as memory is read.

A message is a polynomial over GF(2), its first bit the highest power, and its CRC is the remainder
by a polynomial P of degree 32. NumPy has no such division, and a loop over bytes is slow. But P
divides

    Q(x) = x^6777 + x^484 + x^100 + 1,

and every Q(x^(2^k)), too, for squaring a polynomial over GF(2) squares each of its terms. So a long
message is first replaced by its remainder by Q(x^64), for which whole words of 8 bytes are combined
by XOR, 6293 at a time: each word is added to those that come 6777 - 484, 6777 - 100 and 6777 words
later, and is gone. What is left is replaced by its remainder by Q(x^8) in the same way, byte by
byte. Of the bits that are left then, each adds the remainder of its power of x, which a table has.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray

P = 0x82F63B78  # without x^32, and with the highest power in the lowest bit, as in the bytes
Q = (6777, 484, 100, 0)  # exponents; of such multiples of P the one that takes the longest steps
STEP = Q[0] - Q[1]
PIECE = 8 * STEP  # how much of a message is copied at a time: it stays in the processor's cache

# A CRC begins with a register of ones; one that began with zeros and read this is as far.
BEGINNING = bytes.fromhex("54641f64")


def crc32c(data: Any) -> int:
    """CRC-32C of bytes or of an array in C order (RFC 3720, section 12.1)."""
    message = np.frombuffer(data, np.uint8)
    odd = message.size % 8
    start = np.frombuffer(BEGINNING + message[:odd].tobytes(), np.uint8)
    if message.size > 8 * Q[0]:
        words = np.zeros(Q[0], np.uint64)
        words.view(np.uint8)[-start.size :] = start
        rest = _remainder(words, message[odd:].view(np.uint64)).view(np.uint8)
    else:
        rest = np.concatenate([start, message[odd:]])
    if rest.size > Q[0]:
        rest = _remainder(np.zeros(Q[0], np.uint8), rest)
    bits = np.unpackbits(rest, bitorder="little")
    return int(np.bitwise_xor.reduce(_powers()[-bits.size :] * bits)) ^ 0xFFFFFFFF


def _remainder(before: Array, message: Array) -> Array:
    """The remainder by Q of a message that goes on after `before`, which is one already."""
    degree = before.size
    buffer = np.empty(degree + min(message.size, PIECE), message.dtype)
    buffer[:degree] = before
    for first in range(0, message.size, PIECE):
        piece = message[first : first + PIECE]
        buffer[degree : degree + piece.size] = piece
        for at in range(0, piece.size, STEP):
            high = buffer[at : min(at + STEP, piece.size)]
            for exponent in Q[1:]:
                low = at + degree - exponent
                buffer[low : low + high.size] ^= high
        buffer[:degree] = buffer[piece.size : piece.size + degree].copy()
    return buffer[:degree]


@cache
def _powers() -> Array:
    """What each bit of a remainder adds to a CRC: x^(32 + i) modulo P, the highest i first."""
    powers = np.empty(8 * Q[0], np.uint32)
    power = P  # x^32
    for i in range(1, powers.size + 1):
        powers[-i] = power
        power = power >> 1 ^ (P if power & 1 else 0)
    return powers
