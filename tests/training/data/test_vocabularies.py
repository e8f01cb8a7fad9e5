"""The tokenizer of a corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptx.errors import NotFoundError
from gptx.tokenization.vowels import count_vowel_pieces
from gptx.training.data import vocabularies
from gptx.training.data.texts import TextFile
from gptx.training.data.vocabularies import count_pieces, make_tokenizer, read_tokenizer
from tests.support.byte_tokenizers import byte_tokenizer
from tests.support.cli import raises_error
from tests.support.embedded_tokenizer import FOLDER, load_tokenizer

TEXT = "the theater at the other end, then the rest of them\n" * 20


def file(tmp_path: Path) -> TextFile:
    (tmp_path / "text").write_text(TEXT)
    return TextFile(tmp_path / "text", "text")


@pytest.mark.parametrize("part_characters", [7, 10**6])
@pytest.mark.parametrize("options", [{"train_bpe": 270}, {"vocab_size": 30}], ids=["bpe", "vowels"])
def test_a_vocabulary_does_not_depend_on_the_parts(
    options: dict[str, int], part_characters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabularies, "PART_CHARACTERS", part_characters)
    source = "characters" if "train_bpe" in options else "vowels"
    whole = make_tokenizer(source, [file(tmp_path)], set(TEXT), **options)  # type: ignore[arg-type]
    if "train_bpe" in options:
        expected = vocabularies.training.train_bpe([TEXT], 270)
    else:
        pieces = count_vowel_pieces(TEXT)
        expected = vocabularies.vowel_tokenizer(pieces, set(TEXT), 30)
    assert list(whole.encode(TEXT)) == expected.encode(TEXT)


def test_the_counted_pieces_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabularies, "MAX_PIECES", 8)
    texts = [f" {x} often often" for x in "bcdfghjklmnp"]
    counts = count_pieces(iter(texts))
    assert len(counts) <= 8
    assert counts == count_pieces(iter(texts))
    assert counts["often"] == 24


def test_a_tokenizer_that_exists(tmp_path: Path) -> None:
    given = byte_tokenizer()
    assert make_tokenizer(given, [], ()) is given
    assert read_tokenizer(FOLDER).encode(TEXT) == load_tokenizer().encode(TEXT)
    assert read_tokenizer("shakespeare").encode(TEXT) == load_tokenizer().encode(TEXT)
    with raises_error(NotFoundError, "has no tokenizer"):
        read_tokenizer(tmp_path)
