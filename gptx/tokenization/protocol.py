"""The interfaces of a tokenizer: the small one of a caller, and that of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """A map between text and token ids.

    Any object with these three members is a tokenizer for `gptx.load` and for training. Training
    also uses, if they exist, `end_of_text_id`, the id of a token between two texts, and
    `save(folder)`, which stores the tokenizer beside the model.
    """

    def encode(self, text: str, /) -> Sequence[int]:
        """Return the token ids of a text."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the ids are below it."""


class TextDecoder(Protocol):
    """A decoder of a stream of tokens.

    The pieces of text join to the result of `Tokenizer.decode`.
    """

    def feed(self, id: int) -> str:
        """Return the text that a token completes and no later token changes, possibly empty."""

    def finish(self) -> str:
        """Return the rest of the text, at the end of the stream."""


class StreamingTokenizer(Tokenizer, Protocol):
    """A tokenizer that also decodes token by token; `plug` makes one of any `Tokenizer`."""

    def encode(self, text: str, /, *, allow_special: bool = False) -> list[int]:
        """Return the token ids of a text; special tokens in it are ordinary text unless allowed."""

    def decoder(self, prompt: Sequence[int] = (), /) -> TextDecoder:
        """Return a decoder of the tokens that follow a prompt.

        Its text begins with a space if the first token begins a word after those of the prompt.
        """
