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


def read_object(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    """Read a JSON object from one of the files; an empty one if the file is not among them.

    Raises
    ------
    TokenizerError
        The file is damaged.
    StorageError
        The file cannot be read.
    """
    path = files.get(name)
    if path is None:
        return {}
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} is damaged: expected a JSON object: fetch the model again")
    return data
