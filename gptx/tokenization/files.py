"""The files of a tokenizer."""

from __future__ import annotations

FILES = ("tokenizer.json", "vocab.json", "merges.txt")  # the first, or both others
