"""Positions where a text can be split, so that the ids of its chunks are those of the whole text.

GPT-2's byte-level BPE splits a text into words before it merges bytes. No word contains white space
after another character, so a chunk can end between the two. The same holds for vowel pieces, which
end before white space. A chunk of a tokenizer of characters can end anywhere. Any other tokenizer
can give other ids at the end of a chunk, every `CHUNK_BYTES` or so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from gptx.tokenization.vowels import PATTERN as VOWEL_PATTERN
from gptx.training.data.texts import Begin, split_pieces

MAX_HELD_CHARACTERS = 2**24  # without white space; then a chunk ends anywhere

_PLACE = re.compile(r"(?<=\S)(?=[ \n])")

# Returns the last position where a text can be split; 0 if there is none.
FindSplit = Callable[[str], int]


def end_of(text: str) -> int:
    """Return the end of a text."""
    return len(text)


def last_space(text: str) -> int:
    """Return the last position of a space or a line end that follows another character."""
    at = len(text)
    while at > 0:
        space = max(text.rfind(" ", 0, at), text.rfind("\n", 0, at))
        at = len(text[: space + 1].rstrip())  # the start of this white space
        if text[at : at + 1] in (" ", "\n"):  # one that Python and Rust take for white space
            return at
    return 0


def words_of(text: str) -> list[str]:
    """Split a text at each position of `last_space`."""
    return _PLACE.split(text)


def is_exact(definition: dict[str, Any]) -> bool:
    """Test for a tokenizer whose ids stay the same if a text is split at a `last_space`.

    Parameters
    ----------
    definition
        Contents of its tokenizer.json.
    """
    return (
        _ends_before_space(definition["pre_tokenizer"] or {}, definition["model"])
        and definition["normalizer"] is None
        and not any(_spans_spaces(token) for token in definition["added_tokens"])
    )


def _ends_before_space(split: dict[str, Any], model: dict[str, Any]) -> bool:
    """Test for words, pieces or characters that end before white space."""
    if not split:
        return model["type"] == "BPE" and not model["merges"]
    if split["type"] == "ByteLevel":  # with a prefix space, each chunk would get one
        return bool(split["use_regex"]) and not split["add_prefix_space"]
    return split["type"] == "Split" and split["pattern"] == {"Regex": VOWEL_PATTERN}


def _spans_spaces(token: dict[str, Any]) -> bool:
    """Test for an added token that takes white space after another character."""
    content = token["content"]
    return token["rstrip"] or any(
        right.isspace() and not left.isspace() for left, right in pairwise(content)
    )


def split_into_chunks(items: Iterator[str | Begin], find_split: FindSplit) -> Iterator[str | Begin]:
    """Join and split texts, so that each ends where the text can be split.

    Parameters
    ----------
    items
        Texts and marks; a text can end at any character.
    find_split
        Function that returns the last position where a text can be split.
    """

    def split(text: str) -> tuple[list[str | Begin], str]:
        at = find_split(text) or (len(text) if len(text) > MAX_HELD_CHARACTERS else 0)
        return [text[:at]] * bool(at), text[at:]

    return split_pieces(items, split)
