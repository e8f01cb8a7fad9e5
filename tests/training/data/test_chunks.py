"""Chunks of a text have the ids of the whole text."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptx.tokenization.characters import character_tokenizer
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.vowels import count_vowel_pieces, vowel_tokenizer
from gptx.training.data import chunks
from gptx.training.data.chunks import is_exact, last_space, split_into_chunks, words_of
from gptx.training.data.encoding import Encoder
from gptx.training.data.texts import BEGIN
from tests.support.byte_tokenizers import byte_tokenizer, small_tokenizer
from tests.support.embedded_tokenizer import load_tokenizer

# What a pre-tokenizer treats differently: letters, digits, signs, contractions, kinds of spaces.
ALPHABET = "ae'st1ö漢😀́!<|> \n\t\r\x0b\x1c\x1f\x85\xa0\u2009\u200b\u3000"
TEXTS = st.text(ALPHABET, max_size=40) | st.lists(
    st.sampled_from(["'s", " the", "  ", "\n\n", "<|endoftext|>", "1,000", " \n"]), max_size=9
).map("".join)


@lru_cache
def tokenizer(kind: str) -> PipelineTokenizer:
    characters = f"{ALPHABET} the 1,000 <|endoftext|>"
    if kind == "characters":
        return character_tokenizer(characters, end_of_text=True)
    if kind == "vowels":
        pieces = count_vowel_pieces(" the east at <|endoftext|> 1,000 setae")
        return vowel_tokenizer(pieces, characters, 70, end_of_text=True)
    return load_tokenizer()


@pytest.mark.parametrize("allow_special", [False, True], ids=["plain", "special"])
@pytest.mark.parametrize("kind", ["characters", "vowels", "bpe"])
@given(TEXTS, st.lists(st.integers(0, 40), max_size=6))
def test_ids_of_chunks_are_those_of_the_text(
    kind: str, allow_special: bool, text: str, cuts: list[int]
) -> None:
    """Tokens that straddle the border of two chunks do not change."""
    encoder = Encoder(tokenizer(kind), allow_special=allow_special)
    assert encoder.is_exact
    ends = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    parts = iter([text[a:b] for a, b in pairwise(ends)])
    ids = np.concatenate([np.empty(0, np.int32), *encoder.ids(parts)]).tolist()
    assert ids == tokenizer(kind).encode(text, allow_special=allow_special)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("", 0),
        ("abc", 0),
        ("ab cd", 2),
        ("ab  cd", 2),
        ("ab cd\n", 5),
        (" ab", 0),
        ("a b\t c", 1),
        ("a\x1c b", 0),
        ("a " + " " * 10**6, 1),
    ],
    ids=range(9),
)
def test_the_last_place_before_white_space(text: str, at: int) -> None:
    assert last_space(text) == at


@given(TEXTS)
def test_words_are_split_at_these_places(text: str) -> None:
    words = words_of(text)
    assert "".join(words) == text
    ends = [len("".join(words[: i + 1])) for i in range(len(words) - 1)]
    assert ends == [at for at in range(len(text)) if at and last_space(text[: at + 1]) == at]


def test_the_mark_of_a_document_ends_a_chunk() -> None:
    items = iter(["ab", BEGIN, "c d", "e", BEGIN])
    assert list(split_into_chunks(items, last_space)) == ["ab", BEGIN, "c", " de", BEGIN]


def test_memory_is_bounded_without_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MAX_HELD_CHARACTERS", 10)
    found = list(split_into_chunks(iter(["abcd"] * 9), last_space))
    assert "".join(map(str, found)) == "abcd" * 9
    assert max(len(str(x)) for x in found) == 12


def changed(**values: Any) -> dict[str, Any]:
    """The definition of a byte-level BPE with other parts."""
    definition: dict[str, Any] = json.loads(json.dumps(small_tokenizer().definition()))
    for path, value in values.items():
        part: Any = definition
        *parents, last = path.split("__")
        for name in parents:
            part = part[int(name) if isinstance(part, list) else name]
        part[last] = value
    return definition


@pytest.mark.parametrize(
    ("values", "exact"),
    [
        ({}, True),
        ({"pre_tokenizer__use_regex": False}, False),
        ({"pre_tokenizer__add_prefix_space": True}, False),
        ({"pre_tokenizer": {"type": "Whitespace"}}, False),
        ({"pre_tokenizer": None}, False),
        ({"normalizer": {"type": "Lowercase"}}, False),
        ({"added_tokens__1__rstrip": True}, False),
        ({"added_tokens__1__lstrip": True}, True),
        ({"added_tokens__1__content": "a b"}, False),
        ({"added_tokens__1__content": "  b"}, True),
    ],
    ids=str,
)
def test_tokenizers_that_are_exact(values: dict[str, Any], exact: bool) -> None:
    assert is_exact(changed(**values)) is exact


def test_a_merge_without_split_is_not_exact() -> None:
    """The counterexample: a token of a space and letters beside it."""
    tokenizer = byte_tokenizer(merges={"a Ġ": 256})
    definition = tokenizer.definition() | {"pre_tokenizer": None}
    assert not is_exact(definition)
