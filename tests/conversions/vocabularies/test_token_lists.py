"""gptx.conversions.vocabularies.token_lists: tokenizers as lists of tokens and merges."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gptx.conversions.vocabularies.token_lists import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    flags_of_added_tokens,
    token_lists,
    tokenizer_from_lists,
)
from gptx.errors import TokenizerError
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.byte_tokenizers import LETTERS, byte_tokenizer


def vocabulary(tokenizer: PipelineTokenizer) -> dict[str, int]:
    return dict(tokenizer.definition()["model"]["vocab"])


def test_an_empty_vocabulary_has_only_fillers() -> None:
    tokens, kinds, merges = token_lists(PipelineTokenizer.of_vocabulary({}, []), 2, "a program")
    assert (tokens, kinds, merges) == (["[PAD0]", "[PAD1]"], [UNUSED] * 2, [])
    assert vocabulary(tokenizer_from_lists(tokens, merges, kinds, "the test")) == {}


@pytest.mark.parametrize("with_kinds", [True, False])
def test_gaps_in_the_ids_are_kept(with_kinds: bool) -> None:
    source = byte_tokenizer(merges={"t h": 259})
    tokens, kinds, merges = token_lists(source, 262, "a program")
    assert tokens[256:] == ["[PAD256]", "[PAD257]", "[PAD258]", "th", "[PAD260]", "[PAD261]"]
    found = tokenizer_from_lists(tokens, merges, kinds if with_kinds else (), "the test")
    assert vocabulary(found) == LETTERS | {"th": 259}
    assert found.encode("th") == [259]


@pytest.mark.parametrize("kind", [CONTROL, NORMAL])
def test_a_filler_of_another_kind_is_a_token(kind: int) -> None:
    kinds = [NORMAL] * 256 + [kind]
    found = tokenizer_from_lists([*LETTERS, "[PAD256]"], [], kinds, "the test")
    assert vocabulary(found)["[PAD256]"] == 256


def test_fillers_differ_from_tokens() -> None:
    source = byte_tokenizer({"[PAD258]": 256, "[PAD258]_": 257})
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


def test_kinds_are_those_of_llama_cpp() -> None:
    assert (NORMAL, CONTROL, USER_DEFINED, UNUSED) == (1, 3, 4, 5)


def test_added_tokens_and_their_kinds() -> None:
    tokens = [*LETTERS, "<s>", "a word", "th"]
    kinds = [NORMAL] * 256 + [CONTROL, USER_DEFINED, NORMAL]
    found = tokenizer_from_lists(tokens, ["t h"], kinds, "the test")
    added = {t["content"]: t["special"] for t in found.definition()["added_tokens"]}
    assert added == {"<s>": True, "a word": False}
    assert found.encode("<s>", allow_special=True) == [256]
    assert 256 not in found.encode("<s>")
    assert found.encode("a wordth") == [257, 258]
    assert token_lists(found, 259, "a program") == (tokens, kinds, ["t h"])
    kinds[257] = CONTROL
    found = tokenizer_from_lists(tokens, ["t h"], kinds, "the test")
    assert all(token["special"] for token in found.definition()["added_tokens"])


def test_flags_that_lists_do_not_have_are_named() -> None:
    source = byte_tokenizer({"<s>": 256, "<t>": 257})
    assert flags_of_added_tokens(source) == {}
    definition = source.definition()
    definition["added_tokens"][1] |= dict.fromkeys(("lstrip", "single_word", "normalized"), True)
    changed = PipelineTokenizer({}, definition=json.dumps(definition))
    assert flags_of_added_tokens(changed) == {"<t>": ["lstrip", "single_word"]}


@pytest.mark.parametrize(
    ("tokens", "merges", "kinds", "message"),
    [
        ([*LETTERS], [], [NORMAL] * 255, "has 256 tokens, but 255 token types"),
        ([*LETTERS, "a"], [], (), "it has a duplicate token"),
        ([*LETTERS, "a b"], [], (), "token 256 is 'a b', not byte-level BPE"),
        ([*LETTERS, "你"], [], [NORMAL] * 257, "token 256 is '你', not byte-level BPE"),
        ([*LETTERS, ""], [], [NORMAL] * 256 + [CONTROL], "token 256 is '', not byte-level BPE"),
        ([*LETTERS], ["t h"], (), "the merge 't h' makes no token"),
        ([*LETTERS, "th"], ["th "], (), "the merge 'th ' makes no token"),
        ([*LETTERS, "th"], [" th"], (), "the merge ' th' makes no token"),
    ],
)
def test_lists_that_are_damaged(
    tokens: list[str], merges: list[str], kinds: list[int], message: str
) -> None:
    with pytest.raises(TokenizerError, match=f"^the test.*{message}"):
        tokenizer_from_lists(tokens, merges, kinds, "the test")


def test_an_id_beyond_the_vocabulary_of_the_model() -> None:
    source = byte_tokenizer({"<s>": 300})
    assert len(token_lists(source, 301, "a program")[0]) == 301
    with pytest.raises(TokenizerError, match="has the token id 300, the model 300 tokens"):
        token_lists(source, 300, "a program")


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
