"""Tokenizers of every kind: the ids of transformers, and streams of text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.errors import TokenizerError
from gptx.tokenization.decoder import is_local, steps_of
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.golden_tokenizers import NAMES, TEXTS, expected, folder_of, load

any_kind = pytest.mark.parametrize("name", NAMES)


@any_kind
@pytest.mark.parametrize("version", ["4", "5"])
def test_ids_are_those_of_transformers(name: str, version: str) -> None:
    found = [load(name).encode(text, allow_special=True) for text in TEXTS]
    assert found == expected(name, version)["ids"]


@any_kind
def test_special_tokens_are_plain_text_unless_allowed(name: str) -> None:
    tokenizer = load(name)
    definition = tokenizer.definition()
    unknown = definition["model"].get("unk_token", "<unk>")
    for entry in definition["added_tokens"]:
        if entry["content"] != unknown:  # the id of any text without a token
            ids = tokenizer.encode(f"a {entry['content']} b")
            assert entry["special"] == (entry["id"] not in ids)


def test_added_tokens_have_text() -> None:
    tokenizer = load("added_tokens")
    assert tokenizer.decode([321, 320, 322]) == "<speaker1><pad>hello there"
    assert tokenizer.token_bytes(321) == b"<speaker1>"


def test_the_flags_of_added_tokens() -> None:
    def flags(name: str) -> dict[str, list[str]]:
        names = ("special", "lstrip", "rstrip", "single_word", "normalized")
        added = load(name).definition()["added_tokens"]
        return {token["content"]: [name for name in names if token[name]] for token in added}

    assert flags("added_in_config") == {
        "<|endoftext|>": ["special"],
        "<pad>": ["special"],
        "<m>": ["special", "lstrip"],
        "word": ["single_word"],
    }
    assert flags("added_tokens") == {
        "<|endoftext|>": ["special", "normalized"],
        "<pad>": ["special"],
        "<speaker1>": ["special"],
        "hello there": ["normalized"],
    }


def test_a_listed_token_is_special_if_it_is_named(tmp_path: Path) -> None:
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(folder_of("added_tokens") / file, tmp_path)
    listed = {str(id): {"content": f"<{id}>", "special": id > 321} for id in range(320, 324)}
    settings = {"added_tokens_decoder": listed, "pad_token": "<321>", "sep_token": "<323>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = PipelineTokenizer.of_folder(tmp_path)
    assert tokenizer is not None
    added = tokenizer.definition()["added_tokens"]
    assert [token["id"] for token in added if token["special"]] == [0, 321, 322, 323]


@pytest.mark.parametrize("name", ["wordpiece", "unigram", "wordlevel", "metaspace"])
def test_added_tokens_after_special_ones(name: str) -> None:
    definition = load(name).definition()
    size = load(name).vocab_size
    entry = {**definition["added_tokens"][0], "normalized": False}
    special = {**entry, "id": size, "content": "<x>"}
    plain = {**entry, "id": size + 1, "content": "<y>", "special": False}
    definition["added_tokens"] += [special, plain]
    tokenizer = PipelineTokenizer({}, definition=json.dumps(definition))
    ids = tokenizer.encode("the<x>the<y>")
    assert [id for id in ids if id >= size] == [size + 1]
    allowed = tokenizer.encode("the<x>the<y>", allow_special=True)
    assert [id for id in allowed if id >= size] == [size, size + 1]
    assert tokenizer.encode("the<x>the<y>") == ids


def test_the_unknown_token_is_plain_text_too() -> None:
    tokenizer = load("wordlevel")
    assert tokenizer.encode("<unk>") == [2, 2, 2]  # "<", "unk", ">"
    assert tokenizer.encode("<unk>", allow_special=True) == [2]
    tokenizer = load("unigram")
    assert tokenizer.encode("the<s>") != tokenizer.encode("the<s>", allow_special=True)
    assert 0 not in tokenizer.encode("the<s>")
    assert tokenizer.encode("☃") == [*tokenizer.encode(" ")[:1], 2]


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"do_lower_case": False}, {"lowercase": False}),
        ({"do_lower_case": True, "strip_accents": False}, {"strip_accents": False}),
        ({"strip_accents": True}, {"strip_accents": True}),
        ({"strip_accents": "yes"}, {}),
        ({"tokenize_chinese_chars": False}, {"handle_chinese_chars": False}),
        ({"tokenize_chinese_chars": True}, {}),
    ],
)
@pytest.mark.parametrize("name", ["wordpiece", "word_list"])
def test_the_normalizer_of_bert(
    name: str, options: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folder_of(name), folder)
    settings = {"tokenizer_class": "BertTokenizer", **options}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = PipelineTokenizer.of_folder(folder)
    assert tokenizer is not None
    assert tokenizer.definition()["normalizer"] == {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
        **changes,
    }


@pytest.mark.parametrize(
    ("cls", "option", "given", "found"),
    [
        # Both versions of transformers give these.
        *[(cls, None, True, False) for cls in ("GPT2Tokenizer", "RobertaTokenizerFast")],
        *[(cls, None, True, False) for cls in ("BartTokenizer", "GPTNeoXTokenizer")],
        *[(cls, True, False, True) for cls in ("CodeGenTokenizer", "DebertaTokenizer")],
        *[("WhisperTokenizer", option, False, option is True) for option in (None, False, True)],
        *[("BloomTokenizer", None, given, given) for given in (False, True)],
        *[("PreTrainedTokenizerFast", True, given, given) for given in (False, True)],
    ],
)
def test_the_prefix_space_of_a_class(
    cls: str, option: bool | None, given: bool, found: bool, tmp_path: Path
) -> None:
    definition = load("prefix_of_class").definition()
    definition["pre_tokenizer"]["add_prefix_space"] = given
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    settings = {"tokenizer_class": cls} | ({} if option is None else {"add_prefix_space": option})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = PipelineTokenizer.of_folder(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.encode("Hello")[0] == tokenizer.encode(" ")[0]) == found


def test_parts_of_a_json_that_the_class_does_not_set(tmp_path: Path) -> None:
    definition = load("wordpiece").definition()
    definition["normalizer"]["clean_text"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    for cls, lower in (("BertTokenizer", True), ("PreTrainedTokenizerFast", False)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls}))
        tokenizer = PipelineTokenizer.of_folder(tmp_path)
        assert tokenizer is not None
        normalizer = tokenizer.definition()["normalizer"]
        assert (normalizer["clean_text"], normalizer["lowercase"]) == (False, lower)


@pytest.mark.parametrize("allow_special", [False, True])
def test_the_dropout_of_a_bpe_is_off(allow_special: bool) -> None:
    definition = load("prefix_of_json").definition()
    definition["model"]["dropout"] = 1.0  # no merge
    tokenizer = PipelineTokenizer({}, definition=json.dumps(definition))
    text = "the theory of their thoughts"
    expected = load("prefix_of_json").encode(text)
    assert tokenizer.encode(text, allow_special=allow_special) == expected


# Streams


def stream(tokenizer: PipelineTokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    decoder = tokenizer.decoder(prompt)
    return [*map(decoder.feed, ids), decoder.finish()]


def draw_ids(tokenizer: PipelineTokenizer, numbers: list[int]) -> list[int]:
    """Return ids of the vocabulary, and some that are not in it."""
    return [n % (tokenizer.vocab_size + 3) for n in numbers]


@any_kind
@given(numbers=st.lists(st.integers(0, 2**16), max_size=30))
@settings(max_examples=30, deadline=None)
def test_pieces_join_to_the_text_of_any_ids(name: str, numbers: list[int]) -> None:
    tokenizer = load(name)
    ids = draw_ids(tokenizer, numbers)
    assert "".join(stream(tokenizer, ids, [])) == tokenizer.decode(ids)


@any_kind
@given(numbers=st.lists(st.integers(0, 2**16), max_size=20), at=st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_the_text_after_a_prompt_continues_its_text(name: str, numbers: list[int], at: int) -> None:
    tokenizer = load(name)
    ids = draw_ids(tokenizer, numbers)
    prompt, new = ids[:at], ids[at:]
    text = "".join(stream(tokenizer, new, prompt))
    if not tokenizer.has_bytes and name != "byte_fallback":  # a character may be on both sides
        assert tokenizer.decode(prompt) + text == tokenizer.decode(ids)


@any_kind
def test_text_comes_with_each_token(name: str) -> None:
    tokenizer = load(name)
    ids = [id for text in TEXTS if text.isascii() for id in tokenizer.encode(text)]
    pieces = stream(tokenizer, ids, [])
    assert sum(piece != "" for piece in pieces) > 0.7 * len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("name", "prompt", "text", "pieces"),
    [
        ("wordpiece", "", "the word, theory", ["the", " w", "o", "r", "d", ",", " theory"]),
        ("wordpiece", "we", "the theory", [" the", " theory"]),
        ("metaspace", "", "the the", ["the", " the"]),
        ("metaspace", "we", "the the", [" the", " the"]),
        ("wordlevel", "", "the low", ["the", " low"]),
        ("wordlevel", "low", "the low", [" the", " low"]),
        ("word_ends", "we", "the low", [" the", " low"]),
        ("byte_fallback", "we", "the 🙂!", [" the", " ", "🙂!"]),
    ],
)
def test_pieces(name: str, prompt: str, text: str, pieces: list[str]) -> None:
    tokenizer = load(name)
    found = stream(tokenizer, tokenizer.encode(text), tokenizer.encode(prompt))
    assert [piece for piece in found if piece] == pieces


def test_bytes_that_are_not_utf_8_wait_for_the_end_of_their_run() -> None:
    tokenizer = load("byte_fallback")
    low, c3, a9, ff = map(tokenizer.token_id, ("low", "<0xC3>", "<0xA9>", "<0xFF>"))
    assert stream(tokenizer, [c3, a9, low], []) == ["", "", "élow", ""]
    assert stream(tokenizer, [c3, a9, ff, low], []) == ["", "", "", "\ufffd" * 3 + "low", ""]
    assert stream(tokenizer, [low, c3], []) == ["low", "", "\ufffd"]
    # A prompt that ends within a character is not part of the text after it.
    assert stream(tokenizer, [a9, low], [low, c3]) == ["", "\ufffdlow", ""]


def test_only_bytes_wait_for_the_next_token() -> None:
    definition = load("byte_fallback").definition()
    size = len(definition["model"]["vocab"])
    definition["model"]["vocab"] |= {"<0xyz": size, "sixsix": size + 1, "<0x0A>>": size + 2}
    tokenizer = PipelineTokenizer({}, definition=json.dumps(definition))
    ids = [size + 1, size + 2, size]
    assert stream(tokenizer, ids, []) == ["sixsix", "<0x0A>>", "<0xyz", ""]


# Decoders whose text can change before its end


def replace(pattern: dict[str, str]) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": ""}


def with_decoder(*steps: dict[str, object]) -> PipelineTokenizer:
    definition = load("metaspace").definition()
    definition["decoder"] = {"type": "Sequence", "decoders": steps}
    return PipelineTokenizer({}, definition=json.dumps(definition))


FUSE = {"type": "Fuse"}
ANY_STEP = [
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Strip", "content": " ", "start": 1, "stop": 1},
    replace({"Regex": "a+"}),
    {"type": "ByteFallback"},
]


@pytest.mark.parametrize(
    ("steps", "local"),
    [
        ([], True),
        (ANY_STEP, True),
        ([*ANY_STEP, FUSE], True),
        ([FUSE, replace({"String": "a"})], True),
        ([FUSE, replace({"String": "ab"})], False),
        ([FUSE, replace({"Regex": "a"})], False),
        ([FUSE, {"type": "Strip", "content": " ", "start": 9, "stop": 0}], True),
        ([FUSE, {"type": "Strip", "content": " ", "start": 0, "stop": 1}], False),
        ([FUSE, {"type": "ByteFallback"}], False),
        ([{"type": "BPEDecoder", "suffix": "</w>"}], True),
        ([{"type": "BPEDecoder", "suffix": "</w>"}, FUSE], False),
        ([{"type": "CTC", "pad_token": "", "word_delimiter_token": "|", "cleanup": True}], False),
        ([{"type": "ByteLevel"}, FUSE], False),
    ],
)
def test_steps_that_are_local(steps: list[dict[str, object]], local: bool) -> None:
    nested = {"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": steps}]}
    assert steps_of(nested) == steps
    assert is_local(steps) == local


def test_a_token_without_text_is_not_the_start_of_a_text() -> None:
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    tokenizer = with_decoder(replace({"String": "w"}), space, FUSE, strip)
    o, w, the = map(tokenizer.token_id, ("o", "w", "▁the"))
    assert stream(tokenizer, [w, the, w, w, the], []) == ["", "the", "", "", " the", ""]
    assert stream(tokenizer, [the], [o, w]) == [" the", ""]
    assert stream(tokenizer, [the], [w]) == ["the", ""]


def test_text_that_later_tokens_change_comes_at_the_end() -> None:
    tokenizer = with_decoder(FUSE, replace({"Regex": "w$"}))
    ids = tokenizer.encode("low w")
    *pieces, last = stream(tokenizer, ids, tokenizer.encode("the"))
    assert set(pieces) == {""}
    assert last == tokenizer.decode(ids) == "▁low▁"


def test_a_panic_of_the_library_is_an_error() -> None:
    tokenizer = with_decoder({"type": "Strip", "content": "w", "start": 0, "stop": 9})
    with pytest.raises(TokenizerError, match="tokens cannot be converted by this tokenizer"):
        tokenizer.decode(tokenizer.encode("w"))
