"""gptx.tokenization.decoder: text from tokens that arrive one by one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.tokenization.decoder import Utf8Decoder
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.tokenization.vocabularies import TEXTS, random_ids


def pieces_of(tokenizer: PipelineTokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.decoder()
    return [*map(decoder.feed, ids), decoder.finish()]


def test_the_pieces_of_texts_join_to_the_texts(tokenizer: PipelineTokenizer) -> None:
    for text in TEXTS[:750]:
        pieces = pieces_of(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert pieces[-1] == ""
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_the_pieces_of_random_ids_join_to_the_result_of_decode(
    tokenizer: PipelineTokenizer,
) -> None:
    for ids in random_ids(tokenizer.vocab_size, 1000):
        pieces, complete = pieces_of(tokenizer, ids), tokenizer.decode(ids)
        assert "".join(pieces) == complete
        assert sum(piece.count("\ufffd") for piece in pieces) == complete.count("\ufffd")


@given(numbers=st.lists(st.integers(0, 2**16)), shorten=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_pieces_of_any_ids(tokenizer: PipelineTokenizer, numbers: list[int], shorten: int) -> None:
    ids = [n % tokenizer.vocab_size for n in numbers] + tokenizer.encode("😀")
    ids = ids[: len(ids) - shorten]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_with_its_last_byte() -> None:
    decoder = Utf8Decoder(lambda byte: bytes([byte]))
    pieces = [decoder.feed(byte) for byte in "aé€😀".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    assert decoder.finish() == ""


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        (b"\xe2\x82", ["", "", "\ufffd"]),  # an incomplete character at the end
        (b"\xe2\x82a", ["", "", "\ufffda", ""]),  # an incomplete character before a letter
        (b"\xffa", ["\ufffd", "a", ""]),  # a byte that begins no character
        (b"\xc3\xc3\xa9", ["", "\ufffd", "é", ""]),
    ],
)
def test_bytes_that_are_not_utf_8(data: bytes, pieces: list[str]) -> None:
    decoder = Utf8Decoder(lambda byte: bytes([byte]))
    assert [*map(decoder.feed, data), decoder.finish()] == pieces
