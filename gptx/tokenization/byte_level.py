"""GPT-2's alphabet of bytes, and its special token."""

from __future__ import annotations

from functools import lru_cache

END_OF_TEXT = "<|endoftext|>"


@lru_cache(maxsize=1)
def byte_of_letter() -> dict[str, int]:
    """Return the byte of each letter in the tokens of GPT-2's files.

    The files write each byte as a printable letter: a byte that is printable in Latin-1 as itself,
    the others in order as U+0100 and up (https://github.com/openai/gpt-2, encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}
