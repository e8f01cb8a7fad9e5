"""CRC-32C (Castagnoli), the checksum of TensorFlow's files, at almost the speed of memory.

A message is a polynomial over GF(2) whose first bit has the highest power. Its CRC is the remainder
modulo a polynomial P of degree 32. NumPy has no such division, and a loop over bytes is slow. But P
divides

    Q(x) = x^6777 + x^484 + x^100 + 1,

and so it divides every Q(x^(2^k)): over GF(2), the square of a polynomial has the squares of its
terms. A long message is first reduced modulo Q(x^64). That needs only XORs of words of 8 bytes,
6293 at a time: each word is added to those that come 6777 - 484, 6777 - 100 and 6777 words later.
The remainder is reduced modulo Q(x^8) in the same way, byte by byte. Each remaining bit adds the
remainder of its power of x modulo P, from a table.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray

P = 0x82F63B78  # without x^32; the lowest bit has the highest power, as in the bytes
Q = (6777, 484, 100, 0)  # exponents of the four-term multiple of P with the longest steps
STEP = Q[0] - Q[1]  # words or bytes
CHUNK = 8 * STEP  # words or bytes that are copied at a time: they stay in the processor's cache

# A CRC starts with a register of ones. A register of zeros has that state after these bytes.
INITIAL_BYTES = bytes.fromhex("54641f64")


def crc32c(data: Any) -> int:
    """Compute the CRC-32C of bytes or of an array in C order (RFC 3720, section 12.1)."""
    message = np.frombuffer(data, np.uint8)
    odd = message.size % 8
    start = np.frombuffer(INITIAL_BYTES + message[:odd].tobytes(), np.uint8)
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
    """Reduce `before` followed by `message` modulo Q; `before` is already a remainder."""
    degree = before.size
    buffer = np.empty(degree + min(message.size, CHUNK), message.dtype)
    buffer[:degree] = before
    for first in range(0, message.size, CHUNK):
        chunk = message[first : first + CHUNK]
        buffer[degree : degree + chunk.size] = chunk
        for at in range(0, chunk.size, STEP):
            high = buffer[at : min(at + STEP, chunk.size)]
            for exponent in Q[1:]:
                low = at + degree - exponent
                buffer[low : low + high.size] ^= high
        buffer[:degree] = buffer[chunk.size : chunk.size + degree].copy()
    return buffer[:degree]


@cache
def _powers() -> Array:
    """Compute x^(32 + i) modulo P, what bit i of a remainder adds to a CRC; highest i first."""
    powers = np.empty(8 * Q[0], np.uint32)
    power = P  # x^32
    for i in range(1, powers.size + 1):
        powers[-i] = power
        power = power >> 1 ^ (P if power & 1 else 0)
    return powers
