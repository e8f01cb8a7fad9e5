"""gptx.conversions.vocabularies.token_lists: tokenizers as lists of tokens and merges."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gptx.conversions.vocabularies.token_lists import (
    CONTROL,
    NORMAL,
    UNUSED,
    token_lists,
    tokenizer_from_lists,
)
from gptx.errors import TokenizerError
from gptx.tokenization.byte_level import byte_of_letter
from gptx.tokenization.pipeline import PipelineTokenizer

LETTERS = list(byte_of_letter())


def vocabulary(tokenizer: PipelineTokenizer) -> dict[str, int]:
    return dict(tokenizer.definition()["model"]["vocab"])


def test_an_empty_vocabulary_has_only_fillers() -> None:
    tokens, kinds, merges = token_lists(PipelineTokenizer.of_vocabulary({}, []), 2, "a program")
    assert (tokens, kinds, merges) == (["[PAD0]", "[PAD1]"], [UNUSED] * 2, [])
    assert vocabulary(tokenizer_from_lists(tokens, merges, kinds, "the test")) == {}


@pytest.mark.parametrize("with_kinds", [True, False])
def test_gaps_in_the_ids_are_kept(with_kinds: bool) -> None:
    vocab = {letter: id for id, letter in enumerate(LETTERS)} | {"th": 259}
    source = PipelineTokenizer.of_vocabulary(vocab, [("t", "h")])
    tokens, kinds, merges = token_lists(source, 262, "a program")
    assert tokens[256:] == ["[PAD256]", "[PAD257]", "[PAD258]", "th", "[PAD260]", "[PAD261]"]
    found = tokenizer_from_lists(tokens, merges, kinds if with_kinds else (), "the test")
    assert vocabulary(found) == vocab
    assert found.encode("th") == [259]


@pytest.mark.parametrize("kind", [CONTROL, NORMAL])
def test_a_filler_of_another_kind_is_a_token(kind: int) -> None:
    kinds = [NORMAL] * 256 + [kind]
    found = tokenizer_from_lists([*LETTERS, "[PAD256]"], [], kinds, "the test")
    assert vocabulary(found)["[PAD256]"] == 256


def test_fillers_differ_from_tokens() -> None:
    source = PipelineTokenizer.of_vocabulary(
        {letter: id for id, letter in enumerate(LETTERS)}, [], {"[PAD258]": 256, "[PAD258]_": 257}
    )
    tokens, kinds, merges = token_lists(source, 259, "a program")
    assert tokens[256:] == ["[PAD258]", "[PAD258]_", "[PAD258]__"]
    found = tokenizer_from_lists(tokens, merges, kinds, "the test")
    assert set(vocabulary(found)) == {*LETTERS, "[PAD258]", "[PAD258]_"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, r"a normalizer \(NFC\)"),
        ({"pre_tokenizer": None}, "the pre-tokenizer none"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre-tokenizer Whitespace"),
        ({"use_regex": False}, "a pre-tokenizer without GPT-2's pattern .*"),
        ({"add_prefix_space": True}, "add_prefix_space: true"),
        ({"ignore_merges": True}, "ignore_merges: true"),
        ({"continuing_subword_prefix": "##"}, 'continuing_subword_prefix: "##"'),
        ({"end_of_word_suffix": "</w>"}, 'end_of_word_suffix: "</w>"'),
    ],
)
def test_differences_from_gpt2_are_named(changes: dict[str, Any], message: str) -> None:
    definition = PipelineTokenizer.of_vocabulary({"a": 0}, []).definition()
    for name, value in changes.items():
        parts = (definition, definition["pre_tokenizer"], definition["model"])
        next(part for part in parts if name in part)[name] = value
    tokenizer = PipelineTokenizer({}, definition=json.dumps(definition))
    with pytest.raises(TokenizerError, match=f"the tokenizer has {message}, a program supports"):
        token_lists(tokenizer, 10, "a program")


def test_a_filler_of_another_id_is_a_token() -> None:
    found = tokenizer_from_lists([*LETTERS, "[PAD257]"], [], (), "the test")
    assert vocabulary(found)["[PAD257]"] == 256


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0},
    ],
    ids=lambda model: model["type"],
)
def test_other_tokenizers_than_bpe_are_refused(model: dict[str, Any]) -> None:
    definition = PipelineTokenizer.of_vocabulary({}, []).definition() | {"model": model}
    tokenizer = PipelineTokenizer({}, definition=json.dumps(definition))
    with pytest.raises(TokenizerError, match=f"is of the type {model['type']}, expected a byte"):
        token_lists(tokenizer, 10, "a program")
