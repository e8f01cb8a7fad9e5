"""gptx.tokenization.pipeline: GPT-2's own tokenizer, the embedded one, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.embedded import EMBEDDED
from gptx.errors import PromptError, TokenizerError
from gptx.tokenization.byte_level import END_OF_TEXT, byte_of_letter
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.golden_tokenizers import folder_of
from tests.tokenization.vocabularies import (
    KINDS,
    TEXTS,
    TWO_FILES,
    load,
    path_of,
    random_ids,
    random_texts,
)


@pytest.fixture(scope="session")
def library(kind: str) -> tokenizers.Tokenizer:
    """The same vocabulary in the tokenizers library, without gptx."""
    return tokenizers.Tokenizer.from_file(str(path_of(KINDS[kind][0], "tokenizer.json")))


@pytest.fixture(params=["gpt2", "gpt2, two files"])
def gpt2(request: pytest.FixtureRequest) -> PipelineTokenizer:
    return load(request.param)


# Encoding


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (
            "Alan Turing theorized that computers would one day become very powerful, but even he "
            "could not imagine",
            "36235 39141 18765 1143 326 9061 561 530 "
            "1110 1716 845 3665 11 475 772 339 714 407 5967",
        ),
        (
            "Ondřej Čertík was born in",
            "46 358 129 247 68 73 34754 234 861 8836 74 373 4642 287",
        ),
        ("", ""),
    ],
)
def test_ids_of_gpt2(gpt2: PipelineTokenizer, text: str, ids: str) -> None:
    expected = [int(id) for id in ids.split()]
    assert gpt2.encode(text) == expected
    assert gpt2.decode(expected) == text


def test_end_of_text_of_gpt2(gpt2: PipelineTokenizer) -> None:
    text = f"a{END_OF_TEXT}b"
    assert gpt2.encode(text, allow_special=True) == [64, 50256, 65]
    assert 50256 not in gpt2.encode(text)
    assert gpt2.vocab_size == 50257


def test_end_of_text_is_ordinary_text_unless_allowed(tokenizer: PipelineTokenizer) -> None:
    text = f"One.{END_OF_TEXT}Two.{END_OF_TEXT}"
    special = tokenizer.encode(END_OF_TEXT, allow_special=True)
    ordinary = tokenizer.encode(text)
    allowed = tokenizer.encode(text, allow_special=True)
    assert len(special) == 1
    assert special[0] not in ordinary
    assert allowed.count(special[0]) == 2
    assert tokenizer.decode(ordinary) == tokenizer.decode(allowed) == text
    assert tokenizer.encode(text) == ordinary, "allow_special has a lasting effect"


@pytest.mark.parametrize("vocabulary", ["gpt2", "shakespeare"])
def test_both_forms_of_the_files_agree(vocabulary: str) -> None:
    one, two = load(vocabulary), load(f"{vocabulary}, two files")
    for text in TEXTS[:750]:
        assert one.encode(text) == two.encode(text)
        assert one.encode(text, allow_special=True) == two.encode(text, allow_special=True)


def test_vocab_and_merges_are_not_opened_beside_tokenizer_json(tmp_path: Path) -> None:
    files = dict.fromkeys(TWO_FILES, tmp_path / "absent")
    files["tokenizer.json"] = path_of("shakespeare", "tokenizer.json")
    assert PipelineTokenizer(files).vocab_size == 1024


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "\ude00\ud83d"])
def test_lone_surrogate_is_refused(tokenizer: PipelineTokenizer, text: str) -> None:
    with pytest.raises(PromptError, match="lone surrogate") as error:
        tokenizer.encode(text)
    assert str(error.value).isprintable()
    assert f"character {2 if text[0] == 'a' else 0}" in str(error.value)


# Decoding


def test_random_texts_make_the_round_trip(tokenizer: PipelineTokenizer) -> None:
    assert [text for text in TEXTS if tokenizer.decode(tokenizer.encode(text)) != text] == []


@pytest.mark.fuzz
def test_many_random_texts_make_the_round_trip(tokenizer: PipelineTokenizer) -> None:
    for text in random_texts(20_000, seed=1):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_random_texts_cover_unicode() -> None:
    everything = "".join(TEXTS)
    assert {ord(letter) >> 16 for letter in everything} == set(range(17))  # every plane
    assert not any(0xD800 <= ord(letter) < 0xE000 for letter in everything)
    assert END_OF_TEXT in everything
    assert "" in TEXTS


@given(text=st.text())
@settings(max_examples=40, deadline=None)
def test_any_text_makes_the_round_trip(tokenizer: PipelineTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_has_the_result_of_the_library(
    tokenizer: PipelineTokenizer, library: tokenizers.Tokenizer
) -> None:
    sequences = random_ids(tokenizer.vocab_size, 1000)
    texts = [tokenizer.decode(ids) for ids in sequences]
    assert texts == [library.decode(ids, skip_special_tokens=False) for ids in sequences]
    assert sum("\ufffd" in text for text in texts) > 250, "too few sequences are not UTF-8"


def test_every_token_has_the_bytes_that_the_library_decodes(
    tokenizer: PipelineTokenizer, library: tokenizers.Tokenizer
) -> None:
    for id in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(id).decode(errors="replace")
        assert text == library.decode([id], skip_special_tokens=False)
        assert text


@pytest.mark.parametrize("id", [10**6, 2**31, 2**32 - 1, 2**32, 2**70, -1])
def test_ids_outside_the_vocabulary_decode_to_nothing(
    tokenizer: PipelineTokenizer, id: int
) -> None:
    assert tokenizer.token_bytes(id) == b""
    good = tokenizer.encode("ab")
    assert tokenizer.decode([id, *good, id]) == "ab"


def test_the_piece_of_a_token_is_text_or_an_incomplete_character(
    tokenizer: PipelineTokenizer,
) -> None:
    pieces = [tokenizer.piece(id) for id in tokenizer.encode("Now é")]
    assert [piece for piece in pieces if isinstance(piece, str)]
    texts = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    assert b"".join(texts) == "Now é".encode()
    for id in range(256):
        piece = tokenizer.piece(id)
        data = tokenizer.token_bytes(id)
        assert piece == (data.decode() if data < b"\x80" else data)
    assert tokenizer.piece(10**6) == ""


def test_the_piece_of_a_token_without_bytes() -> None:
    tokenizer = PipelineTokenizer.of_folder(folder_of("wordpiece"))
    assert tokenizer is not None
    pieces = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
    vocab = tokenizer.definition()["model"]["vocab"]
    assert {token: pieces[id] for token, id in vocab.items()} == {token: token for token in vocab}
    assert any(token.startswith("##") for token in vocab)
    assert tokenizer.piece(10**6) == ""


def test_vocab_size_is_the_number_of_tokens(tokenizer: PipelineTokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size - 1) != b""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


def test_byte_of_letter_is_a_bijection() -> None:
    table = byte_of_letter()
    assert sorted(table.values()) == list(range(256))
    assert all(len(letter) == 1 and letter.isprintable() for letter in table)
    # From GPT-2's vocabulary: a space, a line feed, a letter, the first byte of ř.
    assert [table[letter] for letter in "ĠĊaÅ"] == [0x20, 0x0A, 0x61, 0xC5]


def test_the_letters_of_added_tokens_are_text(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(path_of("shakespeare", "tokenizer.json")))
    library.add_special_tokens(["<| señor |>"])  # its letters are not bytes of GPT-2
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    found = PipelineTokenizer({"tokenizer.json": path})
    ids = found.encode("a<| señor |>b", allow_special=True)
    assert ids[1:-1] == [1024]
    assert found.decode(ids) == library.decode(ids, skip_special_tokens=False) == "a<| señor |>b"


# Damaged files


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe\x00", b'{"version": "1.0", "model": {}}'],
)
def test_a_damaged_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer") as error:
        PipelineTokenizer({"tokenizer.json": path})
    assert str(path) in str(error.value)


def test_an_error_names_the_vocabulary_only(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("tokenizer.json", "vocab.json", "merges.txt")}
    for path in paths.values():
        path.write_text("x")
    with pytest.raises(TokenizerError, match=r"^\S*tokenizer\.json cannot be read"):
        PipelineTokenizer(paths)
    del paths["tokenizer.json"]
    with pytest.raises(TokenizerError, match=r"^\S*vocab\.json and \S*merges\.txt cannot be read"):
        PipelineTokenizer(paths)
    with pytest.raises(TokenizerError, match=r"^the vocabulary cannot be read"):
        PipelineTokenizer({}, definition="x")


def test_a_truncated_tokenizer_json(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path_of("shakespeare", "tokenizer.json").read_bytes()[:-100])
    with pytest.raises(TokenizerError, match="cannot be read"):
        PipelineTokenizer({"tokenizer.json": path})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b""),
        ("vocab.json", b"[]"),
        ("vocab.json", b'{"a": 0}'),  # tokens of the merges are missing
        ("vocab.json", b'{"a": -1}'),
        ("vocab.json", b'{"a": "b"}'),
        ("merges.txt", b"#version: 0.2\nfoo bar\n"),
        ("merges.txt", b"#version: 0.2\nfoo\n"),
        ("merges.txt", b"\xff\xff"),
    ],
)
def test_damaged_vocabulary_or_merges(tmp_path: Path, name: str, content: bytes) -> None:
    files = {other: path_of("shakespeare", other) for other in TWO_FILES}
    files[name] = tmp_path / name
    files[name].write_bytes(content)
    with pytest.raises(TokenizerError, match=r"vocab\.json and .*merges\.txt cannot be read"):
        PipelineTokenizer(files)


@pytest.mark.parametrize("given", [[], ["vocab.json"], ["merges.txt"]])
def test_missing_files(given: list[str]) -> None:
    with pytest.raises(TokenizerError, match="is missing") as error:
        PipelineTokenizer({name: path_of("shakespeare", name) for name in given})
    absent = next(name for name in TWO_FILES if name not in given)
    assert f"'{absent}' is missing" in str(error.value)


def test_a_list_of_words_of_another_class(tmp_path: Path) -> None:
    path, config = folder_of("word_list") / "vocab.txt", tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "RobertaTokenizer"}')
    with pytest.raises(TokenizerError, match="is the vocabulary of a RobertaTokenizer") as error:
        PipelineTokenizer({"vocab.txt": path, config.name: config})
    assert str(error.value).startswith(str(path))


def test_a_path_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read"):
        PipelineTokenizer({"tokenizer.json": tmp_path / "tokenizer.json"})


def test_tokens_that_are_not_bytes(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"hello": 0, "你好": 1}, "unk_token": "hello"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    tokenizer = PipelineTokenizer({"tokenizer.json": path})
    assert tokenizer.decode([0, 1, 7, -1, 2**32 - 1, 2**32, 2**40]) == "hello 你好"
    for id in (0, 1, 7):
        with pytest.raises(TokenizerError, match=f"token {id} is .*no bytes of its own"):
            tokenizer.token_bytes(id)


def test_a_token_that_is_not_in_the_alphabet_of_bytes() -> None:
    vocab = byte_of_letter() | {"你好": 256}
    tokenizer = PipelineTokenizer.of_vocabulary(vocab, [])
    assert tokenizer.token_bytes(256).decode() == "你好"
    assert tokenizer.decode([104, 256]) == "h你好"


def test_padding_and_truncation_of_the_file_are_not_applied(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(path_of("shakespeare", "tokenizer.json")))
    library.enable_padding(length=64)
    library.enable_truncation(4)
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    text = "Before we proceed any further, hear me speak."
    found = PipelineTokenizer({"tokenizer.json": path})
    plain = PipelineTokenizer({"tokenizer.json": path_of("shakespeare", "tokenizer.json")})
    assert found.encode(text) == plain.encode(text)
    assert found.encode("O", allow_special=True) == plain.encode("O")


def test_end_of_text_that_a_file_does_not_mark_as_special(tmp_path: Path) -> None:
    source = EMBEDDED["shakespeare"] / "tokenizer.json"
    data = json.loads(source.read_text())
    data["added_tokens"][0]["special"] = False
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    tokenizer = PipelineTokenizer({"tokenizer.json": path})
    assert 0 not in tokenizer.encode("a<|endoftext|>b")
    assert 0 in tokenizer.encode("a<|endoftext|>b", allow_special=True)


def test_other_added_tokens(tmp_path: Path) -> None:
    data = json.loads((EMBEDDED["shakespeare"] / "tokenizer.json").read_text())
    plain = {**data["added_tokens"][0], "id": 1024, "content": "covid", "special": False}
    mask = {**plain, "id": 1025, "content": "<mask>", "special": True, "lstrip": True}
    data["added_tokens"] += [plain, mask]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    text = "hello covid <mask> x"
    expected = tokenizers.Tokenizer.from_file(str(path)).encode(text).ids
    ours = PipelineTokenizer({"tokenizer.json": path})
    assert ours.encode(text, allow_special=True) == expected
    assert 1024 in ours.encode(text)
    assert 1025 not in ours.encode(text)
