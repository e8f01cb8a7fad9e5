"""Incremental decoding: tokens one by one -> text."""

from __future__ import annotations

import codecs

from gptx.tokenization.protocol import Tokenizer


class TextDecoder:
    """A decoder of a stream of tokens; it holds a character back until it has all its bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        """Return the text that a token completes, possibly empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """Return U+FFFD for an incomplete character at the end, else the empty string."""
        return self._utf8.decode(b"", final=True)
