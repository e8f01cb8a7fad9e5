"""gptx.tokenization.characters: a vocabulary of the characters of a text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.errors import PromptError
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.characters import character_tokenizer
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.shared_files import shared
from tests.tokenization.laws import Saved

ALPHABET = "abc<|>?\n\r\t \0\x1f\x85\xa0ä日😀\U0010ffff"


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "end of text"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    made = character_tokenizer(ALPHABET, end_of_text=request.param)
    return Saved(made, tmp_path_factory.mktemp("characters"))


def test_the_ids_of_nanogpt_for_shakespeare() -> None:
    text = shared("data/tinyshakespeare.txt").read_text()
    tokenizer = character_tokenizer(text)
    assert tokenizer.vocab_size == 65  # as nanoGPT prints it
    # The first ids of "hii there" in the lecture that introduces nanoGPT.
    assert tokenizer.encode("hii there") == [46, 47, 47, 1, 58, 46, 43, 56, 43]
    assert tokenizer.decode(tokenizer.encode(text[:5000])) == text[:5000]


@given(text=st.text(ALPHABET))
@settings(max_examples=60, deadline=None)
def test_each_character_is_a_token(saved: Saved, text: str) -> None:
    order = sorted(ALPHABET)
    assert saved.made.encode(text) == [order.index(letter) for letter in text]
    saved.check(text)


def test_counts_of_characters_are_characters() -> None:
    tokenizer = character_tokenizer(Counter("hello"))
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("hello") == [1, 0, 2, 2, 3]


def test_the_end_of_text_is_the_last_token() -> None:
    tokenizer = character_tokenizer("ab<|endoftx>", end_of_text=True)
    last = tokenizer.vocab_size - 1
    assert tokenizer.end_of_text_id == last
    text = f"a{END_OF_TEXT}"
    assert tokenizer.encode(text, allow_special=True) == [tokenizer.encode("a")[0], last]
    assert last not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert character_tokenizer("ab").end_of_text_id is None


@pytest.mark.parametrize(
    ("text", "letter", "place"),
    [
        ("aжb", "ж", 1),
        ("ж", "ж", 0),
        ("abab😀", "😀", 4),
        ("b\ra", "\\r", 1),
        (END_OF_TEXT, "<", 0),
    ],
)
def test_an_unknown_character_is_named(text: str, letter: str, place: int) -> None:
    with pytest.raises(PromptError, match=f"has '.*' at character {place}, which is not") as error:
        character_tokenizer("ab").encode(text)
    assert f"'{letter}'" in str(error.value)
    assert "2 tokens" in str(error.value)


def test_the_characters_of_a_special_token_need_no_tokens() -> None:
    tokenizer = character_tokenizer("ab", end_of_text=True)
    assert tokenizer.encode(f"a{END_OF_TEXT}b", allow_special=True) == [0, 2, 1]
    with pytest.raises(PromptError, match="'x' at character 14"):
        tokenizer.encode(f"a{END_OF_TEXT}xb", allow_special=True)
    with pytest.raises(PromptError, match="'<' at character 1"):
        tokenizer.encode(f"a{END_OF_TEXT}b")


def test_an_unknown_character_of_a_vocabulary_that_was_read(tmp_path: Path) -> None:
    character_tokenizer("ab").save(tmp_path)
    tokenizer = PipelineTokenizer.of_folder(tmp_path)
    assert tokenizer is not None
    with pytest.raises(PromptError, match="'c' at character 2"):
        tokenizer.encode("abcd")


def test_unknown_characters_of_a_vocabulary_with_a_token_for_them() -> None:
    tokenizer = PipelineTokenizer.of_pieces(["a", "b", "<?>"], unknown="<?>")
    assert tokenizer.encode("aжb😀😀<?>") == [0, 2, 1, 2, 2, 2, 2, 2]
    assert tokenizer.encode("<?>") == [2, 2, 2]
    assert tokenizer.decode([0, 2]) == "a<?>"
