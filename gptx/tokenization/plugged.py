"""Any object of the protocol `Tokenizer`, with the rest that the engine needs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import cast

from gptx.errors import ParameterError, TokenizerError, argument
from gptx.tokenization.decoder import WindowDecoder
from gptx.tokenization.protocol import StreamingTokenizer, TextDecoder, Tokenizer


def plug(tokenizer: Tokenizer) -> StreamingTokenizer:
    """Return a tokenizer as it is if it decodes token by token, else a `PluggedTokenizer`."""
    if callable(getattr(tokenizer, "decoder", None)):
        return cast("StreamingTokenizer", tokenizer)
    return PluggedTokenizer(tokenizer)


class PluggedTokenizer:
    """A tokenizer of encode, decode and vocab_size, which also decodes token by token.

    The text of a stream grows with each token whose text ends with a complete character. It equals
    the result of `decode` if more tokens only add text, apart from U+FFFD at its end.

    Parameters
    ----------
    tokenizer
        The object that is plugged in.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.vocab_size)

    def encode(self, text: str, /, *, allow_special: bool = False) -> list[int]:
        """Return the token ids of a text.

        Raises
        ------
        ParameterError
            Special tokens are allowed, and the tokenizer has no such option.
        TokenizerError
            The tokenizer returns something else than token ids.
        """
        options = {}
        if allow_special:
            if "allow_special" not in inspect.signature(self.tokenizer.encode).parameters:
                raise ParameterError(
                    f"{argument('allow_special')} is True, but encode() of "
                    f"{type(self.tokenizer).__name__} does not take it: leave it out"
                )
            options["allow_special"] = True
        ids = self.tokenizer.encode(text, **options)
        try:
            return [int(id) for id in ids]
        except (TypeError, ValueError):
            raise TokenizerError(
                f"encode() of {type(self.tokenizer).__name__} returns {repr(ids)[:60]}, expected "
                "a list of token ids"
            ) from None

    def decode(self, ids: Sequence[int], /) -> str:
        size = self.vocab_size  # the vocabulary of a model may be padded
        return self.tokenizer.decode([int(id) for id in ids if 0 <= id < size])

    def decoder(self, prompt: Sequence[int] = (), /) -> TextDecoder:
        return WindowDecoder(self.decode, self._is_open, prompt)

    def _is_open(self, ids: Sequence[int]) -> bool:
        """Test for an incomplete character at the end, of at most 4 bytes and so 4 tokens."""
        return self.decode(ids[-4:]).endswith("\ufffd")
