"""The files of a GPT-2 tokenizer, under the names that transformers and mlx-lm expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptx.files import create
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.pipeline import PipelineTokenizer


def write_tokenizer(tokenizer: PipelineTokenizer, n_positions: int, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, and vocab.json and merges.txt of a BPE.

    Parameters
    ----------
    n_positions
        Context length of the model, for tokenizer_config.json.
    """
    definition = tokenizer.definition()
    model = definition["model"]
    end = END_OF_TEXT if tokenizer.end_of_text_id is not None else None
    settings = {
        "add_prefix_space": False,
        "bos_token": end,
        "eos_token": end,
        "model_max_length": n_positions,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": end,
    }
    _write_json(folder / "tokenizer.json", definition)
    _write_json(folder / "tokenizer_config.json", settings)
    if model["type"] != "BPE":
        return
    _write_json(folder / "vocab.json", model["vocab"])
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    with create(folder / "merges.txt") as file:
        file.write(f"#version: 0.2\n{merges}".encode())


def _write_json(path: Path, data: Any) -> None:
    with create(path) as file:
        file.write(json.dumps(data, ensure_ascii=False).encode())
