"""Damaged files of tokenizers: each is an error of one line, or gives some tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.fuzz import damaged_copies, fuzz
from tests.support.golden_tokenizers import TEXTS, folder_of

FILES = [
    ("added_tokens", "added_tokens.json"),
    ("added_tokens", "merges.txt"),
    ("added_tokens", "special_tokens_map.json"),
    ("added_tokens", "vocab.json"),
    ("added_in_config", "tokenizer_config.json"),
    ("lower", "tokenizer.json"),
    ("unigram", "tokenizer.json"),
    ("wordpiece", "tokenizer.json"),
    ("word_list", "vocab.txt"),
]


@damaged_copies
@pytest.mark.parametrize(("name", "file"), FILES)
def test_damaged_files(name: str, file: str, tmp_path: Path, copies: int) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folder_of(name), folder)

    def use() -> None:
        tokenizer = PipelineTokenizer.of_folder(folder)
        assert tokenizer is not None
        for text in TEXTS:
            ids = tokenizer.encode(text, allow_special=True)
            decoder = tokenizer.decoder()
            pieces = [*map(decoder.feed, ids), decoder.finish()]
            assert "".join(pieces) == tokenizer.decode(ids)

    assert fuzz(folder / file, use, copies=copies) > 0
