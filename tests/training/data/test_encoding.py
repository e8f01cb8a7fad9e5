"""The encoder: kinds of tokenizers, unknown characters, repeated words."""

from __future__ import annotations

import numpy as np
import pytest

from gptx.errors import DataError, ParameterError
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.characters import character_tokenizer
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.training.data import encoding
from gptx.training.data.encoding import Encoder, characters_of
from gptx.training.data.texts import BEGIN
from tests.support.byte_tokenizers import byte_tokenizer
from tests.support.cli import raises_error
from tests.support.embedded_tokenizer import load_tokenizer


def test_few_words_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is bounded, and the ids are the same."""
    monkeypatch.setattr(encoding, "MAX_WORDS", 2)
    tokenizer = load_tokenizer()
    encoder, text = Encoder(tokenizer), f"{'a' * 65} east the east sea at the east"
    for _ in range(2):
        assert encoder.encode(text).tolist() == tokenizer.encode(text)
    assert list(encoder._words) == [" east", " the"]


def test_the_end_of_text_is_at_each_mark() -> None:
    encoder = Encoder(character_tokenizer("ab", end_of_text=True))
    ids = encoder.ids(iter([BEGIN, "ab", BEGIN, BEGIN, "b"]))
    assert np.concatenate(list(ids)).tolist() == [2, 0, 1, 2, 2, 1]
    with raises_error(ParameterError, f"no {END_OF_TEXT}", "give end_of_text='none'"):
        list(Encoder(character_tokenizer("ab")).ids(iter([BEGIN])))


def test_an_unknown_character() -> None:
    for text in ("abö", f"a{END_OF_TEXT}ö"):
        tokenizer = character_tokenizer("ab<|endoftx>", end_of_text=True)
        with raises_error(DataError, "the text has 'ö'", "not among the 13 tokens"):
            Encoder(tokenizer, allow_special=True).encode(text)


def test_tokenizers_of_characters() -> None:
    definition = PipelineTokenizer.of_pieces(["a", "b"], special=["<x>"]).definition()
    assert characters_of(definition) == {"a": 0, "b": 1}
    definition["added_tokens"][0]["special"] = False  # it is found in any text
    assert characters_of(definition) == {}
    assert characters_of(byte_tokenizer().definition()) == {}
    assert characters_of(PipelineTokenizer.of_pieces(["a", "bc"]).definition()) == {}
    with_unknown = PipelineTokenizer.of_pieces(["a", "?"], unknown="?")
    assert characters_of(with_unknown.definition()) == {}
    assert Encoder(with_unknown).encode("aö").tolist() == [0, 1]
