"""gptx.tokenization.finding: which files are searched for, and which are a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptx.tokenization.finding import describe_unreadable, find_tokenizer

FILES = [
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json"),
    *("added_tokens.json", "special_tokens_map.json"),
]


class Place:
    """A folder that logs the names of files that are searched for."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.searched: list[str] = []
        for name in names:
            (folder / name).write_text("{}")

    def find(self, name: str) -> Path | None:
        self.searched.append(name)
        return self.folder / name if (self.folder / name).is_file() else None


def test_all_files_of_a_folder(tmp_path: Path) -> None:
    found = find_tokenizer(Place(tmp_path, *FILES).find)
    assert found == {name: tmp_path / name for name in FILES}


def test_one_form_of_the_vocabulary(tmp_path: Path) -> None:
    place = Place(tmp_path, *FILES)
    found = find_tokenizer(place.find, all_forms=False)
    assert list(found) == place.searched == ["tokenizer.json", *FILES[4:]]
    (tmp_path / "tokenizer.json").unlink()
    assert list(find_tokenizer(place.find, all_forms=False)) == [*FILES[1:3], *FILES[4:]]


def test_settings_without_a_vocabulary_are_no_tokenizer(tmp_path: Path) -> None:
    place = Place(tmp_path, *FILES[4:])
    assert find_tokenizer(place.find) == {}
    assert "tokenizer_config.json" not in place.searched
    assert "spiece.model" in place.searched  # so that a download of the Hub has it


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("cls", ["BertTokenizer", "BertTokenizerFast"])
def test_a_list_of_words_is_a_tokenizer_if_a_file_says_so(
    tmp_path: Path, name: str, cls: str
) -> None:
    place = Place(tmp_path, "vocab.txt")
    assert find_tokenizer(place.find) == {}
    (tmp_path / name).write_text(json.dumps({"tokenizer_class": cls}))
    assert "vocab.txt" in find_tokenizer(place.find)


def test_the_class_of_tokenizer_config_comes_first(tmp_path: Path) -> None:
    place = Place(tmp_path, "vocab.txt")
    (tmp_path / "config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert find_tokenizer(place.find) == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("spiece.model", "SentencePiece"),
        ("sentencepiece.bpe.model", "SentencePiece"),
        ("tokenizer.model", "SentencePiece"),
        ("vocab.txt", '"tokenizer_class": "BertTokenizer"'),
    ],
)
def test_a_tokenizer_that_is_not_read_is_described(tmp_path: Path, name: str, words: str) -> None:
    assert describe_unreadable(tmp_path) is None
    (tmp_path / name).touch()
    described = describe_unreadable(tmp_path)
    assert described is not None
    assert str(tmp_path / name) in described
    assert words in described
