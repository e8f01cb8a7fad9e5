"""The tokenizers of tests/golden/tokenizers, and the ids that transformers gives for them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from gptx.tokenization.pipeline import PipelineTokenizer

FOLDER = Path(__file__).parents[1] / "golden" / "tokenizers"
_DATA: dict[str, Any] = json.loads((FOLDER / "ids.json").read_text())
TEXTS: list[str] = _DATA["texts"]
NAMES = list(_DATA["folders"])


def folder_of(name: str) -> Path:
    return FOLDER / name


def expected(name: str, version: str = "5") -> dict[str, Any]:
    """Return the ids of `TEXTS` ("ids") and of special tokens ("special") in transformers."""
    return dict(_DATA["folders"][name][version])


@cache
def load(name: str) -> PipelineTokenizer:
    """Load a tokenizer, once for all tests."""
    tokenizer = PipelineTokenizer.of_folder(folder_of(name))
    assert tokenizer is not None
    return tokenizer
