"""The model files of llm.c, `gpt2_124M.bin`: a header of 256 integers, then the tensors.

The tensors of one kind are stored together, layer after layer; the matrices of linear layers are
`[out, in]`. The table of tokens is padded with rows of zeros to a multiple of 128 rows
(https://github.com/karpathy/llm.c, train_gpt2.py: `write_model`, `write_tensors`). llm.c supports
OpenAI's settings only, and stores the tokenizer in another file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import (
    Checkpoint,
    end_of_text_ids,
    require_openai_settings,
    stored_array,
    unquantized,
)
from gptx.conversions.containers.binary import BinaryFile, dtype_name, write_array
from gptx.errors import ConfigError, GptxError, WeightsError
from gptx.files import create
from gptx.quantization import QuantizedTensor
from gptx.safetensors_file import BFLOAT16
from gptx.stored_weights import is_linear_weight

MAGIC = 20240326
HEADER_BYTES = 256 * 4
TABLE_ROW_MULTIPLE = 128  # of the table of tokens

# Versions of the header. Version 1, of April 2024, has no padding. Versions 2 and 4 existed for
# days only, with changing orders of the tensors: they are not supported.
UNPADDED = 1
VERSIONS = {"float32": 3, "bfloat16": 5}
DTYPES = {UNPADDED: np.dtype("<f4"), 3: np.dtype("<f4"), 5: BFLOAT16}


def detect(path: Path) -> bool:
    """Test for the magic number of llm.c's models; its tokenizers and states have others."""
    try:
        return path.is_file() and BinaryFile(path).read(0, 4, "") == struct.pack("<i", MAGIC)
    except GptxError:
        return False


def read(path: Path, config: GPT2Config | None = None, ignore_unknown: bool = False) -> Checkpoint:
    """Open a model file of version 1, 3 or 5.

    Parameters
    ----------
    config
        Settings that the header does not have; the others must equal those of the header.

    Raises
    ------
    ConfigError, WeightsError
        The file is truncated or damaged, or the model is not a GPT-2 that gptx supports.
    StorageError
        The file cannot be read.
    """
    file = BinaryFile(path)
    magic, version, S, V, L, H, C, padded = struct.unpack("<8i", file.read(0, 32, "the header"))
    if magic != MAGIC:
        raise WeightsError(f"{path} is not a model of llm.c: it starts with {magic}, not {MAGIC}")
    if version not in DTYPES:
        raise WeightsError(
            f"{path} has version {version}, expected one of {', '.join(map(str, DTYPES))}: "
            "write it again with llm.c's train_gpt2.py"
        )
    if version == UNPADDED:
        padded = V
    if padded < V:
        raise WeightsError(
            f"{path} is damaged: its header has {V} tokens, padded to {padded}: fetch it again"
        )
    try:
        found = GPT2Config(
            vocab_size=V, n_positions=S, n_embd=C, n_layer=L, n_head=H, **end_of_text_ids(V)
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    dtype = DTYPES[version]
    expected = HEADER_BYTES + count_parameters(found, padded) * dtype.itemsize
    if file.size != expected:
        raise WeightsError(
            f"{path} is truncated or damaged: it has {file.size} bytes, expected {expected} by its "
            "header: fetch it again"
        )
    if config is not None:
        config = replace(config, quantization=None)
        _compare_sizes(path, found, config)
    stored = {}
    for name, shape, offset in _places(found, padded, HEADER_BYTES, dtype):
        read_tensor = partial(file.map, offset, shape, dtype, f"tensor {name}")
        stored[name] = stored_array(read_tensor, shape, dtype, transposed=is_linear_weight(name))
    return Checkpoint(config or found, stored, ignore_unknown=ignore_unknown)


def map_parameters(
    file: BinaryFile, offset: int, config: GPT2Config, padded: int
) -> dict[str, np.ndarray]:
    """Map float32 tensors into memory that are stored in the order of a model file.

    Parameters
    ----------
    offset
        Of the first tensor, in bytes.
    padded
        Rows of the table of tokens in the file.

    Returns
    -------
    dict
        Name -> array in gptx's layout, read-only.

    Raises
    ------
    WeightsError
        The file is too short.
    """
    arrays = {}
    for name, shape, place in _places(config, padded, offset, DTYPES[VERSIONS["float32"]]):
        array = file.map(place, shape, "<f4", f"tensor {name}")
        arrays[name] = array.T if is_linear_weight(name) else array
    return arrays


def _places(
    config: GPT2Config, padded: int, offset: int, dtype: np.dtype
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield name, shape without padding, and offset of each tensor in the file."""
    for name, shape in _layout(config):
        yield name, shape, offset
        rows = padded if name == "wte.weight" else shape[0]
        offset += rows * math.prod(shape[1:]) * dtype.itemsize


def padded_vocabulary(config: GPT2Config) -> int:
    """Return the number of rows of the table of tokens, as llm.c's programs expect it."""
    return -(-config.vocab_size // TABLE_ROW_MULTIPLE) * TABLE_ROW_MULTIPLE


def count_parameters(config: GPT2Config, padded: int) -> int:
    """Count the numbers of the file from one layer; the header's layer count can be huge."""
    shapes = replace(config, n_layer=1).tensor_shapes()
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    layer = sum(n for name, n in count.items() if name.startswith("h."))
    return (
        sum(count.values())
        + (config.n_layer - 1) * layer
        + (padded - config.vocab_size) * config.n_embd
    )


def _layout(config: GPT2Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors in the order of the file, with their shapes in it, without padding."""
    for name, shape in replace(config, n_layer=1).tensor_shapes().items():
        file_shape = shape[::-1] if is_linear_weight(name) else shape
        if not name.startswith("h."):
            yield name, file_shape
            continue
        for layer in range(config.n_layer):
            yield f"h.{layer}.{name.removeprefix('h.0.')}", file_shape


def _compare_sizes(path: Path, found: GPT2Config, given: GPT2Config) -> None:
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "mlp_dim"):
        if getattr(found, name) != getattr(given, name):
            raise ConfigError(
                f"{name} is {getattr(found, name)} in {path}, and {getattr(given, name)} in the "
                "given config: give the config of this model, or none"
            )


def write(checkpoint: Checkpoint, path: Path, *, dtype: str | None = None) -> None:
    """Write a file that llm.c's programs load: version 3, or version 5 for bfloat16.

    Parameters
    ----------
    dtype
        "float32" or "bfloat16"; None: bfloat16 if every tensor is of that type, else float32.

    Raises
    ------
    ConfigError
        llm.c would compute something else.
    WeightsError
        A number is too large for `dtype`.
    """
    config = checkpoint.config
    require_openai_settings(config, "llm.c")
    if dtype is None:
        found = {dtype_name(tensor.dtype) for tensor in checkpoint.stored.values()}
        dtype = "bfloat16" if found == {"bfloat16"} else "float32"
    header = (MAGIC, VERSIONS[dtype], config.n_positions, config.vocab_size, config.n_layer)
    sizes = (config.n_head, config.n_embd, padded_vocabulary(config))
    with create(path) as file:
        file.write(struct.pack("<8i", *header, *sizes).ljust(HEADER_BYTES, b"\0"))
        write_parameters(file, checkpoint.tensors, config, dtype)


def write_parameters(
    file: BinaryIO,
    tensors: Mapping[str, np.ndarray | QuantizedTensor],
    config: GPT2Config,
    dtype: str = "float32",
) -> None:
    """Append tensors in the order of a model file, the table of tokens padded with zeros.

    Parameters
    ----------
    tensors
        Name -> tensor in gptx's layout, for all of `config.tensor_shapes()`. Each is accessed once.
    dtype
        "float32" or "bfloat16".

    Raises
    ------
    WeightsError
        A number is too large for `dtype`.
    """
    for name, _ in _layout(config):
        array = unquantized(tensors[name])
        write_array(file, array.T if is_linear_weight(name) else array, dtype, f"tensor {name}")
        if name == "wte.weight":
            padding = padded_vocabulary(config) - config.vocab_size
            write_array(file, np.zeros((padding, config.n_embd), np.float32), dtype, "padding")
