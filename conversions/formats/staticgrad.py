"""The folder of staticgrad: headerless float32, what is in them, and the bytes of the tokens.

- `gpt2_weights.bin`: the tensors in the order of PyTorch's `named_parameters`, in the Hub's layout;
- `gpt2_metadata.json`: the name (with `transformer.`), shape, size and first two numbers of each
  (https://github.com/Malav-P/staticgrad, gpt2_python/scripts/gpt2_python.py: `get_weights`);
- `gpt2_vocab.bin`: each token's length, one byte, and its bytes (scripts/gpt2_vocab.py).

Its program looks for the first and the last in `gpt2_python/bin/`; as it is, it takes the sizes of
124M alone, and splits a text into the longest tokens that fit, not by merges. What it trains on,
token ids as uint16 one after the other, is no part of a model.
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
    Stored,
    config_of_shapes,
    end_of_text,
    float_array,
    require_openai,
)
from gptx.conversions.containers.binary import Array, BinaryFile, write_array
from gptx.conversions.vocabularies.byte_tokens import tokenizer_of_bytes
from gptx.conversions.vocabularies.token_lists import entries_of
from gptx.errors import TokenizerError, WeightsError
from gptx.files import create
from gptx.tokenization.bpe import BytePairTokenizer

WEIGHTS = "gpt2_weights.bin"
METADATA = "gpt2_metadata.json"
VOCABULARY = "gpt2_vocab.bin"

MAX_METADATA = 2**22  # bytes: 48 layers take an eighth of a megabyte
DTYPE = np.dtype("<f4")


def detect(path: Path) -> bool:
    """Whether this is a folder with such weights and metadata."""
    return (path / WEIGHTS).is_file() and (path / METADATA).is_file()


def read(path: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open a folder, with the config.json in it, if there is one.

    The tokenizer's merges are those that the order of the tokens implies.

    Raises
    ------
    WeightsError, ConfigError, TokenizerError
        A file is truncated or damaged, or no GPT-2 that gptx can run.
    StorageError
        A file cannot be read.
    """
    if config is None and (path / "config.json").is_file():
        config = GPT2Config.from_file(path / "config.json")
    file = BinaryFile(path / WEIGHTS)
    stored: dict[str, Stored] = {}
    offset = 0
    for name, shape in _entries(path / METADATA):
        if name in stored:
            raise WeightsError(f"{path / METADATA}: tensor {name} is there twice")
        tensor = partial(file.array, offset, shape, DTYPE, f"tensor {name}")
        stored[name] = Stored(shape, DTYPE, tensor)
        offset += math.prod(shape) * DTYPE.itemsize
    if file.size != offset:
        raise WeightsError(
            f"{file.path} has {file.size} bytes, the tensors in {METADATA} have {offset}: one of "
            "them is truncated, damaged or of another model"
        )
    found, notes = config_of_shapes({n: tensor.shape for n, tensor in stored.items()}, config)
    tokenizer = None
    if (path / VOCABULARY).is_file():
        tokenizer = tokenizer_of_bytes(_tokens(path / VOCABULARY, found.vocab_size))
        if tokenizer is None:
            notes += (f"{VOCABULARY} is no byte-level BPE in order: there is no tokenizer",)
        elif config is None:
            found = replace(found, **end_of_text(found.vocab_size, tokenizer))
    return Checkpoint(found, stored, tokenizer, notes)


def _entries(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names, without prefix, and shapes of the metadata."""
    file = BinaryFile(path)
    if file.size > MAX_METADATA:
        raise WeightsError(f"{path} has {file.size} bytes, expected at most {MAX_METADATA}")
    try:
        entries = json.loads(file.read(0, file.size, "the metadata"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}): write it again") from None
    if not isinstance(entries, list):
        raise WeightsError(f"{path} holds no list of tensors: write it again")
    for i, entry in enumerate(entries):
        shape = _shape(entry)
        if shape is None:
            raise WeightsError(
                f'{path}: entry {i} is damaged, expected a "name", a "shape" and its "size"'
            )
        yield entry["name"].removeprefix("transformer."), shape


def _shape(entry: Any) -> tuple[int, ...] | None:
    """The shape of a tensor; None if its entry is damaged."""
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


def _tokens(path: Path, vocab_size: int) -> list[bytes]:
    """The bytes of the tokens, as many as the model has."""
    file = BinaryFile(path)
    data = file.read(0, min(file.size, 256 * vocab_size + 1), "the tokens")
    tokens: list[bytes] = []
    at = 0
    while at < len(data) and len(tokens) < vocab_size:
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    if len(tokens) != vocab_size or at != file.size:
        raise TokenizerError(
            f"{path} is truncated, damaged or of another model: it should hold {vocab_size} tokens"
        )
    return tokens


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the three files; without a tokenizer, the first two.

    Parameters
    ----------
    folder
        It exists and is empty.

    Raises
    ------
    ConfigError
        staticgrad would compute something else.
    TokenizerError
        A token has more than 255 bytes, the model has not all the tokens, or they are no BPE.
    """
    config = checkpoint.config
    require_openai(config, "staticgrad")
    vocabulary = _vocabulary(checkpoint.tokenizer, config.vocab_size)
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


def _vocabulary(tokenizer: BytePairTokenizer | None, vocab_size: int) -> bytes:
    """The bytes of the tokens; none for an id that no token has. Nothing without a tokenizer."""
    if tokenizer is None:
        return b""
    entries_of(tokenizer.definition(), vocab_size)  # or an id beyond would be lost
    tokens = [tokenizer.token_bytes(id) for id in range(vocab_size)]
    if (longest := max(map(len, tokens))) > 255:
        raise TokenizerError(f"a token has {longest} bytes, staticgrad takes 255 at most")
    return b"".join(bytes([len(token)]) + token for token in tokens)
