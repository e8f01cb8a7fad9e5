"""The model files of llm.c, `gpt2_124M.bin`: a header of 256 integers, then numbers.

The tensors of one kind lie together, layer after layer, and the matrices of linear layers
`[out, in]`. The table of tokens has rows of zeros after its last one, up to a multiple of 128
(https://github.com/karpathy/llm.c, train_gpt2.py: `write_model`, `write_tensors`). Its GPT-2 has
OpenAI's settings alone, and its tokenizer is in another file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import (
    Array,
    Checkpoint,
    Stored,
    end_of_text,
    plain,
    require_openai,
)
from gptx.conversions.containers.binary import BinaryFile, dtype_name, write_array
from gptx.errors import ConfigError, GptxError, WeightsError
from gptx.files import create
from gptx.safetensors_file import BFLOAT16
from gptx.stored_weights import is_linear_weight

MAGIC = 20240326
HEADER = 256 * 4  # bytes
ROWS = 128  # the table of tokens has a multiple of them

# What the header calls the types. Version 1, of April 2024, has no padding. Versions 2 and 4 were
# bfloat16 with norms in float32, for days only and in changing order: nobody can read them now.
UNPADDED = 1
VERSIONS = {"float32": 3, "bfloat16": 5}
DTYPES = {UNPADDED: np.dtype("<f4"), 3: np.dtype("<f4"), 5: BFLOAT16}


def detect(path: Path) -> bool:
    """Whether a file begins as llm.c's models do (its tokenizers and states begin otherwise)."""
    try:
        return path.is_file() and BinaryFile(path).read(0, 4, "") == struct.pack("<i", MAGIC)
    except GptxError:
        return False


def read(path: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open a model file of version 1, 3 or 5.

    Parameters
    ----------
    config
        For what the header does not say; it has to fit what it says.

    Raises
    ------
    ConfigError, WeightsError
        The file is truncated or damaged, or no GPT-2 that gptx can run.
    StorageError
        It cannot be read.
    """
    file = BinaryFile(path)
    magic, version, S, V, L, H, C, padded = struct.unpack("<8i", file.read(0, 32, "the header"))
    if magic != MAGIC:
        raise WeightsError(f"{path} begins with {magic}, expected {MAGIC}: this is no llm.c model")
    if version not in DTYPES:
        raise WeightsError(
            f"{path} is of version {version}, gptx reads {', '.join(map(str, DTYPES))}: "
            "write it again with llm.c's train_gpt2.py"
        )
    if version == UNPADDED:
        padded = V
    if padded < V:
        raise WeightsError(f"{path} says that {V} tokens were padded to {padded}: it is damaged")
    try:
        found = GPT2Config(
            vocab_size=V, n_positions=S, n_embd=C, n_layer=L, n_head=H, **end_of_text(V)
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    dtype = DTYPES[version]
    expected = HEADER + _count(found, padded) * dtype.itemsize
    if file.size != expected:
        raise WeightsError(
            f"{path} has {file.size} bytes, by its header it should have {expected}: "
            "it is truncated or damaged, fetch it again"
        )
    if config is not None:
        config = replace(config, quantization=None)
        _compare(path, found, config)
    stored = {}
    offset = HEADER
    for name, shape in _layout(found):
        tensor = _Tensor(file, offset, shape, dtype, name)
        stored[name] = tensor.stored()
        rows = padded if name == "wte.weight" else shape[0]
        offset += rows * math.prod(shape[1:]) * dtype.itemsize
    return Checkpoint(config or found, stored)


def _count(config: GPT2Config, padded: int) -> int:
    """How many numbers there are, without a list of all layers."""
    shapes = replace(config, n_layer=1).tensor_shapes()
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    layer = sum(n for name, n in count.items() if name.startswith("h."))
    return (
        sum(count.values())
        + (config.n_layer - 1) * layer
        + (padded - config.vocab_size) * config.n_embd
    )


def _layout(config: GPT2Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors in the order of the file, with their shapes there, without padding."""
    for name, shape in replace(config, n_layer=1).tensor_shapes().items():
        stored = shape[::-1] if is_linear_weight(name) else shape
        if not name.startswith("h."):
            yield name, stored
            continue
        for layer in range(config.n_layer):
            yield f"h.{layer}.{name.removeprefix('h.0.')}", stored


def _compare(path: Path, found: GPT2Config, given: GPT2Config) -> None:
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "mlp_dim"):
        if getattr(found, name) != getattr(given, name):
            raise ConfigError(
                f"{name} is {getattr(found, name)} in {path}, the config that was given says "
                f"{getattr(given, name)}: give the one that belongs to it, or none"
            )


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies, and its shape there."""

    file: BinaryFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    name: str

    @property
    def transposed(self) -> bool:
        return is_linear_weight(self.name)

    def read(self) -> Array:
        array = self.file.array(self.offset, self.shape, self.dtype, f"tensor {self.name}")
        return array.T if self.transposed else array

    def stored(self) -> Stored:
        shape = self.shape[::-1] if self.transposed else self.shape
        return Stored(shape, self.dtype, self.read)


def write(checkpoint: Checkpoint, path: Path, *, dtype: str | None = None) -> None:
    """Write a file that llm.c's programs load: version 3, or 5 of bfloat16.

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
    require_openai(config, "llm.c")
    if dtype is None:
        found = {dtype_name(tensor.dtype) for tensor in checkpoint.stored.values()}
        dtype = "bfloat16" if found == {"bfloat16"} else "float32"
    V, C = config.vocab_size, config.n_embd
    padding = -V % ROWS
    header = (MAGIC, VERSIONS[dtype], config.n_positions, V, config.n_layer, config.n_head, C)
    with create(path) as file:
        file.write(struct.pack("<8i", *header, V + padding).ljust(HEADER, b"\0"))
        for name, _ in _layout(config):
            array = plain(checkpoint.tensors[name])
            write_array(file, array.T if is_linear_weight(name) else array, dtype, f"tensor {name}")
            if name == "wte.weight":
                rows = np.zeros((padding, C), np.float32)
                write_array(file, rows, dtype, "padding")
