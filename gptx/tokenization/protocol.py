"""The interface of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """A map between text and token ids."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the token ids of a text; special tokens in it are ordinary text unless allowed."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token; none for an id that is not in the vocabulary."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
