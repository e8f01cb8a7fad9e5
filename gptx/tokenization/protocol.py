"""The interface of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TextDecoder(Protocol):
    """A decoder of a stream of tokens.

    The pieces of text join to the result of `Tokenizer.decode`.
    """

    def feed(self, id: int) -> str:
        """Return the text that a token completes and no later token changes, possibly empty."""

    def finish(self) -> str:
        """Return the rest of the text, at the end of the stream."""


class Tokenizer(Protocol):
    """A map between text and token ids."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the token ids of a text; special tokens in it are ordinary text unless allowed."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""

    def decoder(self, prompt: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder of the tokens that follow a prompt.

        Its text begins with a space if the first token begins a word after those of the prompt.
        """

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token; none for an id that is not in the vocabulary.

        Raises
        ------
        TokenizerError
            The tokens of this tokenizer are not bytes: their text depends on those beside them.
        """

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
