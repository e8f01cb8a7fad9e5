"""The vocabularies of the tests, and random texts and token ids."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from gptx.embedded import EMBEDDED
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.shared_files import shared

ONE_FILE, TWO_FILES = ("tokenizer.json",), ("vocab.json", "merges.txt")
KINDS = {
    "gpt2": ("gpt2", ONE_FILE),
    "gpt2, two files": ("gpt2", TWO_FILES),
    "shakespeare": ("shakespeare", ONE_FILE),
    "shakespeare, two files": ("shakespeare", TWO_FILES),
}


def path_of(vocabulary: str, name: str) -> Path:
    if vocabulary == "gpt2":  # not part of the repository
        return shared(f"tokenizer/gpt2/{name}")
    return EMBEDDED[vocabulary] / name


@cache
def load(kind: str) -> PipelineTokenizer:
    """Load a tokenizer of `KINDS`, once for all tests."""
    vocabulary, names = KINDS[kind]
    return PipelineTokenizer({name: path_of(vocabulary, name) for name in names})


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Draw texts of pieces of many kinds, from all planes of Unicode."""
    rng = np.random.default_rng(seed)
    kinds: list[Callable[[], str]] = [
        lambda: "".join(map(chr, rng.integers(0x20, 0x7F, 6))),
        lambda: str(
            rng.choice(["word", "The", "don't", "we'll", " and", "0123", "naïve", "Čertík"])
        ),
        lambda: str(rng.choice([" ", "  ", "\n\n", "\t", "\r\n", " \n ", "\u00a0", "\u3000"])) * 3,
        lambda: "e" + "".join(map(chr, rng.integers(0x300, 0x370, 3))),  # combining marks
        lambda: "".join(map(chr, rng.integers(0x1F300, 0x1FAFF, 2))) + "\u200d\ufe0f",  # emoji
        lambda: "".join(map(chr, rng.integers(0, 0x20, 3))),  # control characters
        lambda: "".join(map(chr, rng.integers(0x80, 0xD800, 3))),
        lambda: "".join(map(chr, rng.integers(0xE000, 0x110000, 3))),
        lambda: END_OF_TEXT,
    ]
    choices = rng.integers(0, len(kinds), (n, 8))
    lengths = rng.integers(0, 9, n)
    return [
        "".join(kinds[i]() for i in row[:length])
        for row, length in zip(choices, lengths, strict=True)
    ]


TEXTS = random_texts(1500)


def random_ids(vocab_size: int, n: int) -> list[list[int]]:
    """Draw sequences of tokens that are rare in texts: most of them are not UTF-8."""
    rng = np.random.default_rng(1)
    # Half of them from the first 256 tokens, which are single bytes.
    limits = [vocab_size, 256]
    return [[int(i) for i in rng.integers(0, limits[i % 2], rng.integers(0, 24))] for i in range(n)]
