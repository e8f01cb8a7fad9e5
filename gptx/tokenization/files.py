"""The files of a tokenizer, under the names of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptx.errors import StorageError, TokenizerError

TOKENIZER = "tokenizer.json"
VOCAB, MERGES = "vocab.json", "merges.txt"
WORDS = "vocab.txt"  # a line each: the vocabulary of BERT's tokenizer
SETTINGS = "tokenizer_config.json"
ADDED_TOKENS, SPECIAL_TOKENS = "added_tokens.json", "special_tokens_map.json"

FILES = (TOKENIZER, VOCAB, MERGES, WORDS, SETTINGS, ADDED_TOKENS, SPECIAL_TOKENS)
MAX_VOCABULARY_BYTES = 2**28  # 250,000 tokens of many languages need 0.03 GB
MAX_SETTINGS_BYTES = 2**24


def check_vocabularies(files: Mapping[str, Path]) -> None:
    """Check the sizes of vocabularies before they are read.

    Raises
    ------
    TokenizerError
        A file is too large.
    """
    for name in (TOKENIZER, VOCAB, MERGES, WORDS):
        path = files.get(name)
        if path and path.is_file() and (size := path.stat().st_size) > MAX_VOCABULARY_BYTES:
            raise TokenizerError(
                f"{path} has {size} bytes, expected at most {MAX_VOCABULARY_BYTES}: "
                "fetch the model again"
            )


def read_object(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    """Read a JSON object from one of the files; an empty one if the file is not among them.

    Raises
    ------
    TokenizerError
        The file is damaged or too large.
    StorageError
        The file cannot be read.
    """
    path = files.get(name)
    if path is None:
        return {}
    try:
        is_small = path.stat().st_size <= MAX_SETTINGS_BYTES
        data = json.loads(path.read_bytes()) if is_small else None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise TokenizerError(
            f"{path} is damaged: expected a JSON object of at most {MAX_SETTINGS_BYTES} bytes: "
            "fetch the model again"
        )
    return data
