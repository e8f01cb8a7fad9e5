"""gptx.conversions.vocabularies.comparison: what decides the ids and the text of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from gptx.conversions.vocabularies.comparison import compare_tokenizers
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.golden_tokenizers import NAMES, load

Change = Callable[[dict[str, Any]], object]


def changed(name: str, change: Change) -> PipelineTokenizer:
    definition = load(name).definition()
    change(definition)
    return PipelineTokenizer({}, definition=json.dumps(definition))


def moved_added_tokens(definition: dict[str, Any]) -> None:
    """Put the added tokens into the vocabulary, as a GGUF has them."""
    tokens = {token["content"]: token["id"] for token in definition["added_tokens"]}
    definition["model"]["vocab"] |= tokens


def in_sequences(definition: dict[str, Any]) -> None:
    split = definition["pre_tokenizer"]
    inner = {"type": "Sequence", "pretokenizers": [split]}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [inner]}
    definition["normalizer"] = {"type": "Sequence", "normalizers": []}


def other_form(definition: dict[str, Any]) -> None:
    definition["pre_tokenizer"]["trim_offsets"] = False
    definition["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    definition["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": True,
    }
    definition["model"] |= {"continuing_subword_prefix": "", "fuse_unk": True}
    definition["decoder"] = {**definition["decoder"], "add_prefix_space": True}
    for token in definition["added_tokens"]:
        token["normalized"] = True  # without a normalizer


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_is_the_same_as_itself(name: str) -> None:
    assert compare_tokenizers(load(name), changed(name, lambda definition: None)) == {}


@pytest.mark.parametrize("change", [moved_added_tokens, in_sequences, other_form])
def test_other_forms_of_the_same_tokenizer(change: Change) -> None:
    name = "added_beside_json"
    assert compare_tokenizers(load(name), changed(name, change)) == {}


def test_no_decoder_is_the_decoder_of_bytes() -> None:
    plain = changed("added_tokens", lambda definition: definition.update(decoder=None))
    assert compare_tokenizers(load("added_tokens"), plain) == {}


def test_tokenizers_of_different_kinds_differ() -> None:
    for a, b in [("prefix_of_class", "prefix_without_config"), ("metaspace", "unigram")]:
        assert compare_tokenizers(load(a), load(b))


def set_model(**values: Any) -> Change:
    return lambda definition: definition["model"].update(values)


def set_flag(token: int, **flags: bool) -> Change:
    return lambda definition: definition["added_tokens"][token].update(flags)


def swap_merges(definition: dict[str, Any]) -> None:
    merges = definition["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def rename_token(definition: dict[str, Any]) -> None:
    vocab = definition["model"]["vocab"]
    vocab["!"], vocab["?"] = vocab["?"], vocab["!"]


def change_score(definition: dict[str, Any]) -> None:
    definition["model"]["vocab"][50][1] -= 1.0


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("lower", lambda d: d.update(normalizer=None), ['added token "[X]"', "normalizer"]),
        ("lower", set_flag(3, normalized=False), ['added token "[X]"']),
        ("added_tokens", set_flag(1, lstrip=True), ['added token "<pad>"']),
        ("added_tokens", set_flag(1, rstrip=True), ['added token "<pad>"']),
        ("added_tokens", set_flag(1, single_word=True), ['added token "<pad>"']),
        ("added_tokens", set_flag(1, special=False), ['added token "<pad>"']),
        ("added_tokens", lambda d: d["pre_tokenizer"].update(use_regex=False), ["pre_tokenizer"]),
        ("added_tokens", set_model(ignore_merges=True), ["ignore_merges"]),
        ("added_tokens", swap_merges, ["merges 3 (and 1 more)"]),
        ("added_tokens", rename_token, ['id of "!" (and 1 more)']),
        ("unigram", change_score, ['scores "']),
        ("metaspace", set_model(fuse_unk=True), ["fuse_unk"]),
        ("metaspace", lambda d: d.update(decoder=None), ["decoder"]),
        ("wordpiece", set_model(max_input_chars_per_word=3), ["max_input_chars_per_word"]),
        ("wordpiece", lambda d: d["decoder"].update(cleanup=False), ["decoder"]),
    ],
)
def test_parts_that_decide(name: str, change: Change, parts: list[str]) -> None:
    found = compare_tokenizers(load(name), changed(name, change))
    assert len(found) == len(parts)
    assert all(key.startswith(part) for key, part in zip(found, parts, strict=True))
    assert all(x != y for x, y in found.values())
    swapped = compare_tokenizers(changed(name, change), load(name))
    assert sorted(map(sorted, swapped.values())) == sorted(map(sorted, found.values()))


def test_an_added_token_that_only_one_has() -> None:
    fewer = changed("added_beside_json", lambda definition: definition["added_tokens"].pop())
    found = compare_tokenizers(load("added_beside_json"), fewer)
    assert found == {
        'id of "hello there"': ("322", "null"),
        'added token "hello there"': ("[]", "null"),
    }


def test_long_values_are_shortened() -> None:
    long = {"type": "Prepend", "prepend": "x" * 1000}
    found = compare_tokenizers(load("lower"), changed("lower", lambda d: d.update(normalizer=long)))
    assert all(len(value) < 110 for value in found["normalizer"])
