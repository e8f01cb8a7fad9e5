"""Tokenizers of single bytes, with a few further tokens."""

from __future__ import annotations

import json

from gptx.tokenization.byte_level import byte_of_letter
from gptx.tokenization.pipeline import PipelineTokenizer

LETTERS = {letter: id for id, letter in enumerate(byte_of_letter())}


def byte_tokenizer(
    special: dict[str, int] | None = None, merges: dict[str, int] | None = None
) -> PipelineTokenizer:
    """Make a tokenizer of the letters of all bytes, 0 to 255, and of further tokens.

    Parameters
    ----------
    special
        Special token -> id.
    merges
        Merge ("t h") -> id of its token.
    """
    special, merges = special or {}, merges or {}
    merged = {merge.replace(" ", ""): id for merge, id in merges.items()}
    pairs = [(left, right) for left, right in (merge.split() for merge in merges)]
    return PipelineTokenizer.of_vocabulary(LETTERS | merged | special, pairs, special)


def small_tokenizer() -> PipelineTokenizer:
    """Make a tokenizer with one merge, the end of a text, and an ordinary added token."""
    tokenizer = byte_tokenizer({"<|endoftext|>": 256, "<br>": 258}, {"t h": 257})
    definition = tokenizer.definition()
    definition["added_tokens"][1]["special"] = False
    return PipelineTokenizer({}, definition=json.dumps(definition))
