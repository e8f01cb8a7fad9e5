"""gptx.tokenization.training: a byte-level BPE of a text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.errors import ParameterError
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.training import train_bpe
from tests.tokenization.laws import LINES, Saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(train_bpe([LINES], 280), tmp_path_factory.mktemp("bpe"))


def test_the_tokens_are_bytes_then_merges_then_the_end_of_text(saved: Saved) -> None:
    tokenizer = saved.made
    assert tokenizer.vocab_size == 280
    assert {tokenizer.token_bytes(id) for id in range(256)} == {bytes([b]) for b in range(256)}
    assert all(len(tokenizer.token_bytes(id)) > 1 for id in range(256, 279))
    assert tokenizer.end_of_text_id == 279
    assert tokenizer.encode(f"a{END_OF_TEXT}", allow_special=True)[1:] == [279]


@given(text=st.text())
@settings(max_examples=40, deadline=None)
def test_any_text_makes_the_round_trip(saved: Saved, text: str) -> None:
    saved.check(text)


def test_a_frequent_word_is_one_token(saved: Saved) -> None:
    assert [len(saved.made.encode(word)) for word in (" speak", " Romeo")] == [1, 6]


def test_the_same_texts_give_the_same_tokens(saved: Saved) -> None:
    again = train_bpe(iter([LINES]), 280)
    assert again.definition() == saved.made.definition()


def test_the_first_merge_is_the_most_frequent_pair() -> None:
    tokenizer = train_bpe(["xy xy xy ab ab"], 257 + 1)
    assert tokenizer.token_bytes(256) == b"xy"


def test_no_pair_is_counted_across_parts_or_the_end_of_a_text() -> None:
    for texts in (["xy", "ab", "xy", "ab"], [f"xy{END_OF_TEXT}ab{END_OF_TEXT}xy{END_OF_TEXT}ab"]):
        tokenizer = train_bpe(texts, 400)
        merged = {tokenizer.token_bytes(id) for id in range(256, tokenizer.vocab_size)}
        assert merged == {b"xy", b"ab", END_OF_TEXT.encode()}


def test_a_vocabulary_without_room_for_the_bytes() -> None:
    with pytest.raises(ParameterError, match="vocab_size is 256, expected at least 257"):
        train_bpe(["text"], 256)
    assert train_bpe([], 257).vocab_size == 257
