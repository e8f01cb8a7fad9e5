"""Decoders of a stream of tokens: tokens one by one -> text that no later token changes.

Only some decoders of a tokenizer.json allow that: `is_local` tests for them.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Step = Mapping[str, Any]

_EACH_TOKEN = ("WordPiece", "Metaspace", "Replace", "Strip", "ByteFallback")


class Utf8Decoder:
    """A decoder of tokens that are bytes; it holds a character back until it has all its bytes.

    Parameters
    ----------
    token_bytes
        Function from a token id to bytes.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        return self._utf8.decode(self._token_bytes(id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """A decoder of tokens whose text depends on the start of the text and on tokens beside them.

    It decodes new tokens after the tokens before them, and returns the text that they add. An
    example is WordPiece: a word is its tokens after a space, except at the start.

    Parameters
    ----------
    decode
        Function from token ids to text.
    is_open
        Function that tests for tokens whose last text may depend on the next one.
    prompt
        Token ids before the stream.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_open: Callable[[Sequence[int]], bool],
        prompt: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._is_open = is_open
        self._pending: list[int] = []
        end = len(prompt)
        while end and is_open(prompt[:end]):
            end -= 1
        start = end
        while start and not decode(prompt[start:end]):
            start -= 1
        # Tokens with text: those after them are not at the start of a text.
        self._context = list(prompt[start:end])

    def feed(self, id: int) -> str:
        self._pending.append(id)
        return "" if self._is_open(self._pending) else self.finish()

    def finish(self) -> str:
        pending, self._pending = self._pending, []
        before = self._decode(self._context)
        text = self._decode(self._context + pending)[len(before) :]
        self._context = pending if self._decode(pending) else self._context + pending
        return text


def steps_of(decoder: Step) -> list[Step]:
    """Return the steps of a decoder, in their order; none for an empty definition."""
    if decoder.get("type") != "Sequence":
        return [decoder] if decoder else []
    return [step for part in decoder["decoders"] for step in steps_of(part)]


def is_local(steps: Sequence[Step]) -> bool:
    """Test for a decoder whose text grows only at its end when tokens are added.

    The text of a token may depend on the start of the text, and that of bytes of ByteFallback on
    the bytes beside them. Each step is one of https://docs.rs/tokenizers, `tokenizers::decoders`.
    """
    if [step["type"] for step in steps] == ["BPEDecoder"]:
        return True
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif kind not in _EACH_TOKEN or (fused and not _is_local_in_text(step)):
            return False
    return True


def _is_local_in_text(step: Step) -> bool:
    """Test for a step that is local on the text of all tokens too."""
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] == "Strip" and step["stop"] == 0
