"""The tokenizer of the embedded model, and the config of a small model with its vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path

from gptx.config import GPT2Config
from gptx.embedded import EMBEDDED
from gptx.tokenization.pipeline import PipelineTokenizer

FOLDER = EMBEDDED["shakespeare"]
FILES = ("tokenizer.json", "vocab.json", "merges.txt")
# Heads of width 64, which readers assume for a file without their number.
CONFIG = GPT2Config(
    vocab_size=1024,
    n_positions=64,
    n_embd=64,
    n_layer=2,
    n_head=1,
    bos_token_id=0,
    eos_token_id=0,
)


def load_tokenizer() -> PipelineTokenizer:
    """Load the tokenizer from its tokenizer.json."""
    return PipelineTokenizer({"tokenizer.json": FOLDER / "tokenizer.json"})


def copy_tokenizer(folder: Path, *names: str) -> Path:
    """Copy files of the tokenizer into a folder, by default all; return the folder."""
    for name in names or FILES:
        shutil.copy(FOLDER / name, folder)
    return folder
