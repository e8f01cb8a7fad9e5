"""gptx.tokenization.vowels: gpt-burn's pieces that resemble syllables."""

from __future__ import annotations

import string
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.errors import ParameterError, PromptError
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.vowels import UNKNOWN, VOWELS, count_vowel_pieces, vowel_tokenizer
from tests.tokenization.laws import LINES, Saved

# The example in the README of gpt-burn, with its pieces and ids.
GERMAN = (
    "Albert Einstein war ein schweizerisch-US-amerikanischer theoretischer Physiker deutscher "
    "Herkunft."
)
PIECES = ["Albert", " ", "Einst", "ein", " ", "war", " ", "ein", " ", "schw", "eizer", "isch"]
PIECES += ["-", "US", "-", "amer", "ikan", "isch", "er", " ", "theor", "etisch", "er", " "]
PIECES += ["Phys", "iker", " ", "deutsch", "er", " ", "Herk", "unft"]
IDS = [2, 0, 3, 9, 0, 19, 0, 9, 0, 16, 10, 15, 1, 6, 1, 7, 13, 15, 11, 0, 17, 12, 11, 0, 5, 14, 0]
IDS += [8, 11, 0, 4, 18]

WHITE_SPACE = {*map(chr, [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)])}
WHITE_SPACE |= set("\u2028\u2029\u202f\u205f\u3000")
BREAKS = WHITE_SPACE | set(string.punctuation)
# Letters of 1 to 4 bytes, vowels, both kinds of break, and neighbors of white space.
ALPHABET = "aeiouäöüAxyz.-_ \n\xa0\u2005\u3000日éж😀\0\x1f\x7f\u200b"


def pieces_of(text: str) -> list[str]:
    """Return the pieces of a text, character by character as the rule says; the definition."""
    pieces = [""]
    for letter in text:
        is_break = letter in BREAKS or pieces[-1][-1:] in BREAKS
        if is_break or (letter in VOWELS and len(pieces[-1].encode()) > 3):
            pieces.append("")
        pieces[-1] += letter
    return [piece for piece in pieces if piece]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    text = ALPHABET + "xayaz xayaz äxüx äxüx 日日 日日"
    made = vowel_tokenizer(count_vowel_pieces(text), text, 40, end_of_text=True)
    return Saved(made, tmp_path_factory.mktemp("vowels"))


def test_the_ids_of_gpt_burn() -> None:
    tokenizer = vowel_tokenizer(Counter(PIECES), GERMAN, 99)
    ids = tokenizer.encode(GERMAN)
    assert ids[:-1] == IDS  # gpt-burn leaves out the last piece, of one character
    assert [tokenizer.piece(id) for id in ids] == [*PIECES, "."]
    assert ids[-1] > tokenizer.token_id(UNKNOWN) == len(set(PIECES))
    assert tokenizer.decode(ids) == GERMAN


def test_the_pieces_of_gpt_burn() -> None:
    assert pieces_of(GERMAN) == [*PIECES, "."]
    assert count_vowel_pieces(GERMAN) == Counter([*PIECES, "."])


@given(text=st.text(ALPHABET) | st.text())
@settings(max_examples=100, deadline=None)
def test_the_pieces_are_those_of_the_rule(text: str) -> None:
    assert count_vowel_pieces(text) == Counter(pieces_of(text))


def test_the_rule_for_each_character() -> None:
    """Up to U+3100, with all white space, and beside the limits of UTF-8 and of the planes."""
    others = [0xD7FF, 0xE000, 0xFEFF, 0xFFFF, 0x10000, 0x1F600, 0x10FFFF]
    for code in [*range(0x3100), *others]:
        text = f"ab{chr(code)}axaa"
        assert list(count_vowel_pieces(text)) == list(dict.fromkeys(pieces_of(text))), hex(code)


@given(text=st.text(ALPHABET))
@settings(max_examples=80, deadline=None)
def test_a_text_makes_the_round_trip(saved: Saved, text: str) -> None:
    saved.check(text)
    known = {saved.made.piece(id) for id in range(saved.made.vocab_size)}
    expected: list[str] = []
    for piece in pieces_of(text):
        expected += [piece] if piece in known else piece
    assert [saved.made.piece(id) for id in saved.made.encode(text)] == expected


@given(parts=st.lists(st.text(ALPHABET)), space=st.sampled_from(" \n.\u2005"))
@settings(max_examples=50, deadline=None)
def test_counts_of_parts_add_up(parts: list[str], space: str) -> None:
    parts = [space + part for part in parts]
    total = sum((count_vowel_pieces(part) for part in parts), Counter())
    assert total == count_vowel_pieces("".join(parts))


def test_the_most_frequent_pieces_are_tokens() -> None:
    pieces = Counter({"once": 1, "most": 9, "or": 3, "also": 3, "a": 2, "z": 1})
    tokenizer = vowel_tokenizer(pieces, "acelmnorstz", 14)
    tokens = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
    # Two longer pieces have room; of those with the same count, the first in the order of Unicode.
    assert tokens == ["also", "most", UNKNOWN, *"acelmnorstz"]
    tokenizer = vowel_tokenizer(pieces, "acelmnorstz", 15)
    tokens = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
    assert tokens == ["a", "also", "most", "or", UNKNOWN, *"celmnorstz"]


def test_a_frequent_character_is_a_piece() -> None:
    tokenizer = vowel_tokenizer(Counter({" ": 5, "word": 2}), "word ", 99)
    tokens = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
    assert tokens == [" ", "word", UNKNOWN, *"dorw"]


def test_no_text_gets_the_unknown_token(saved: Saved) -> None:
    text = "<?>"
    tokenizer = vowel_tokenizer(count_vowel_pieces(text), text, 10)
    assert [tokenizer.piece(id) for id in tokenizer.encode(text)] == ["<", "?", ">"]
    with pytest.raises(PromptError, match="'ж' at character 4"):
        tokenizer.encode("<?><ж")


def test_the_end_of_text_is_the_last_token() -> None:
    tokenizer = vowel_tokenizer(count_vowel_pieces(LINES), LINES, 60, end_of_text=True)
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (60, 59)
    assert tokenizer.encode(END_OF_TEXT, allow_special=True) == [59]


def test_a_vocabulary_without_room_for_the_characters() -> None:
    with pytest.raises(ParameterError, match=r"vocab_size is 5, expected at least 6: .* 5 char"):
        vowel_tokenizer(Counter(), "abcde", 5)
    assert vowel_tokenizer(Counter(), "abcde", 6).vocab_size == 6
    with pytest.raises(ParameterError, match="vocab_size is 6, expected at least 7"):
        vowel_tokenizer(Counter(), "abcde", 6, end_of_text=True)
