"""The folder of staticgrad: float32 without a header, its description, and the tokens' bytes.

- `gpt2_weights.bin`: the tensors in the order of PyTorch's `named_parameters`, in the Hub's layout;
- `gpt2_metadata.json`: name (with `transformer.`), shape, size and first two numbers of each tensor
  (https://github.com/Malav-P/staticgrad, gpt2_python/scripts/gpt2_python.py: `get_weights`);
- `gpt2_vocab.bin`: for each token its length in one byte, and its bytes (scripts/gpt2_vocab.py).

The program expects the first and the last in `gpt2_python/bin/`. It is compiled for the sizes of
124M, and splits a text into the longest tokens, without merges. Its files of training data are not
converted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import (
    Checkpoint,
    StoredTensor,
    end_of_text_ids,
    float_array,
    infer_config,
    require_openai_settings,
)
from gptx.conversions.containers.binary import Array, BinaryFile, write_array
from gptx.conversions.vocabularies.byte_tokens import tokenizer_from_bytes
from gptx.conversions.vocabularies.token_lists import tokens_by_id
from gptx.errors import TokenizerError, WeightsError
from gptx.files import create
from gptx.stored_weights import settle_head
from gptx.tokenization.pipeline import PipelineTokenizer

WEIGHTS = "gpt2_weights.bin"
METADATA = "gpt2_metadata.json"
VOCABULARY = "gpt2_vocab.bin"

MAX_METADATA_BYTES = 2**22  # 48 layers need 0.12 MB
MAX_TOKEN_BYTES = 255
DTYPE = np.dtype("<f4")


def detect(path: Path) -> bool:
    """Test for a folder with the weights and the metadata."""
    return (path / WEIGHTS).is_file() and (path / METADATA).is_file()


def read(path: Path, config: GPT2Config | None = None, ignore_unknown: bool = False) -> Checkpoint:
    """Open a folder, with its config.json if it has one.

    The merges of the tokenizer are recovered from the order of the tokens.

    Raises
    ------
    WeightsError, ConfigError, TokenizerError
        A file is truncated or damaged, or the model is not a GPT-2 that gptx supports.
    StorageError
        A file cannot be read.
    """
    if config is None and (path / "config.json").is_file():
        config = GPT2Config.from_file(path / "config.json")
    file = BinaryFile(path / WEIGHTS)
    stored: dict[str, StoredTensor] = {}
    offset = 0
    for name, shape in _metadata_entries(path / METADATA):
        if name in stored:
            raise WeightsError(f"{path / METADATA}: duplicate tensor {name}")
        read_tensor = partial(file.map, offset, shape, DTYPE, f"tensor {name}")
        stored[name] = StoredTensor(shape, DTYPE, read_tensor)
        offset += math.prod(shape) * DTYPE.itemsize
    if file.size != offset:
        raise WeightsError(
            f"{file.path} has {file.size} bytes, expected {offset} by {METADATA}: one of them is "
            "truncated, damaged or of another model"
        )
    stored, config, head_notes = settle_head(stored, config, StoredTensor.is_same)
    found, notes = infer_config({n: tensor.shape for n, tensor in stored.items()}, config)
    notes = head_notes + notes
    tokenizer = None
    if (path / VOCABULARY).is_file():
        tokenizer = tokenizer_from_bytes(_read_tokens(path / VOCABULARY, found.vocab_size))
        if tokenizer is None:
            notes += (
                f"{VOCABULARY} is ignored: its tokens are not those of a byte-level BPE in order",
            )
        elif config is None:
            found = replace(found, **end_of_text_ids(found.vocab_size, tokenizer))
    return Checkpoint(found, stored, tokenizer, notes, ignore_unknown=ignore_unknown)


def _metadata_entries(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name, without prefix, and the shape of each tensor in the metadata."""
    file = BinaryFile(path)
    if file.size > MAX_METADATA_BYTES:
        raise WeightsError(f"{path} has {file.size} bytes, expected at most {MAX_METADATA_BYTES}")
    try:
        entries = json.loads(file.read(0, file.size, "the metadata"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}): write it again") from None
    if not isinstance(entries, list):
        raise WeightsError(f"{path} is invalid: expected a list of tensors: write it again")
    for i, entry in enumerate(entries):
        shape = _shape(entry)
        if shape is None:
            raise WeightsError(
                f'{path}: entry {i} is invalid, expected a "name", a "shape" and its "size"'
            )
        yield entry["name"].removeprefix("transformer."), shape


def _shape(entry: Any) -> tuple[int, ...] | None:
    """Return the shape of an entry; None if the entry is invalid."""
    if not isinstance(entry, dict):
        return None
    name, shape, size = (entry.get(key) for key in ("name", "shape", "size"))
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_.]{1,99}", name):
        return None
    if not isinstance(shape, list) or not 1 <= len(shape) <= 2:
        return None
    if any(type(n) is not int or not 1 <= n < 2**48 for n in shape) or size != math.prod(shape):
        return None
    return tuple(shape)


def _read_tokens(path: Path, vocab_size: int) -> list[bytes]:
    """Read the bytes of `vocab_size` tokens, all that the file may contain."""
    file = BinaryFile(path)
    data = file.read(0, min(file.size, (MAX_TOKEN_BYTES + 1) * vocab_size + 1), "the tokens")
    tokens: list[bytes] = []
    at = 0
    while at < len(data) and len(tokens) < vocab_size:
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    if len(tokens) != vocab_size or at != file.size:
        raise TokenizerError(
            f"{path} is truncated, damaged or of another model: expected {vocab_size} tokens"
        )
    return tokens


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the three files; without a tokenizer, the first two.

    Parameters
    ----------
    folder
        An empty folder.

    Raises
    ------
    ConfigError
        staticgrad would compute something else.
    TokenizerError
        A token has more than 255 bytes or an id beyond the vocabulary, or the tokenizer is not a
        BPE.
    """
    config = checkpoint.config
    require_openai_settings(config, "staticgrad")
    vocabulary = _encode_tokens(checkpoint.tokenizer, config.vocab_size)
    metadata = []
    with create(folder / WEIGHTS) as file:
        for name, shape in config.tensor_shapes().items():
            array = float_array(checkpoint.tensors[name])
            write_array(file, array, "float32", f"tensor {name}")
            entry = {"name": f"transformer.{name}", "shape": shape, "size": array.size}
            metadata.append({**entry, "first two": _first_two(array)})
    with create(folder / METADATA) as file:
        file.write(json.dumps(metadata, indent=4).encode())
    if vocabulary:
        with create(folder / VOCABULARY) as file:
            file.write(vocabulary)


def _first_two(array: Array) -> list[float]:
    return [float(np.float32(x)) for x in islice(array.flat, 2)]


def _encode_tokens(tokenizer: PipelineTokenizer | None, vocab_size: int) -> bytes:
    """Return the length and the bytes of each id's token; length 0 for an id without a token."""
    if tokenizer is None:
        return b""
    tokens_by_id(tokenizer.definition(), vocab_size)  # an id beyond the vocabulary is an error
    tokens = [tokenizer.token_bytes(id) for id in range(vocab_size)]
    if (longest := max(map(len, tokens))) > MAX_TOKEN_BYTES:
        raise TokenizerError(
            f"a token has {longest} bytes, staticgrad supports at most {MAX_TOKEN_BYTES}"
        )
    return b"".join(bytes([len(token)]) + token for token in tokens)
