"""A Hugging Face folder: config.json, safetensors (one file or shards), tokenizer files.

This is gptx's own form. The reader shares `gptx.model_files` and `gptx.safetensors_weights` with
`gptx.load`; it also reads mlx-lm's names and quantized matrices. The writer uses the names and the
layout of OpenAI's models on the Hub: no `transformer.`, Conv1D `[in, out]`, no tied head, no masks
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import (
    Array,
    Checkpoint,
    StoredTensor,
    infer_config,
    unquantized,
    write_config_and_tokenizer,
)
from gptx.conversions.containers.binary import dtype_name, write_array
from gptx.files import create
from gptx.model_files import CONFIG, INDEX, WEIGHTS, Folder, find_files
from gptx.safetensors_weights import open_weights
from gptx.tokenization.pipeline import PipelineTokenizer

ALIGNMENT_BYTES = 64  # of the data, for vector instructions on the mapped file
STORED_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32"}


def detect(path: Path) -> bool:
    """Test for a folder with safetensors, or for a safetensors file."""
    if path.is_dir():
        return (path / CONFIG).is_file() and any((path / n).is_file() for n in (WEIGHTS, INDEX))
    return path.suffix == ".safetensors" or _begins_with_header(path)


def _begins_with_header(path: Path) -> bool:
    """Test for the length of a header that fits into the file, and for the header's first byte."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8
    except OSError:
        return False


def read(path: Path, config: GPT2Config | None = None, ignore_unknown: bool = False) -> Checkpoint:
    """Open a folder, or one safetensors file, with the config.json beside it if it exists.

    Raises
    ------
    ConfigError, WeightsError, TokenizerError
        A file is damaged, or the model is not a GPT-2 that gptx supports.
    NotFoundError, StorageError
        A file is missing, or cannot be read.
    """
    if not path.is_dir():
        beside = path.with_name(CONFIG)
        if config is None and beside.is_file():
            config = GPT2Config.from_file(beside)
        return _checkpoint((path,), config, None, ignore_unknown)
    files = find_files(Folder(path))
    found = GPT2Config.from_file(files.config)
    tokenizer = PipelineTokenizer(files.tokenizer) if files.tokenizer else None
    return _checkpoint(files.weights, config or found, tokenizer, ignore_unknown)


def _checkpoint(
    paths: Sequence[Path],
    config: GPT2Config | None,
    tokenizer: PipelineTokenizer | None,
    ignore_unknown: bool,
) -> Checkpoint:
    found = open_weights(paths, config, ignore_unknown=ignore_unknown)
    config, notes = found.config, found.notes
    if config is None:
        shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
        config, notes = infer_config(shapes)
    stored = {
        name: StoredTensor(
            tensor.shape, tensor.dtype, tensor.read, tensor.quantization, tensor.file_type
        )
        for name, tensor in found.tensors.items()
    }
    return Checkpoint(config, stored, tokenizer, notes, ignore_unknown=ignore_unknown)


# Writing


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file to be written.

    Attributes
    ----------
    name, shape
        Name and shape in the file.
    dtype
        A key of `STORED_TYPES`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * (2 if self.dtype.endswith("16") else 4)


def write(checkpoint: Checkpoint, folder: Path, *, dtype: str | None = None) -> None:
    """Write a folder that gptx, transformers and mlx-lm load.

    Parameters
    ----------
    folder
        An empty folder.
    dtype
        "float32", "float16" or "bfloat16"; None keeps the type of each tensor (float64 becomes
        float32).
    """
    layout = [
        (FileTensor(name, tensor.shape, dtype or dtype_name(tensor.dtype)),)
        for name, tensor in checkpoint.stored.items()
    ]
    tensors = ((unquantized(tensor),) for tensor in checkpoint.tensors.values())
    write_safetensors(folder / WEIGHTS, layout, tensors, "pt")
    write_config_and_tokenizer(checkpoint, folder, dtype)


def write_folder(
    folder: Path,
    config: GPT2Config,
    tensors: Iterable[tuple[str, Array]],
    *,
    dtype: str = "float32",
) -> None:
    """Write a folder of tensors that arrive one by one, without a tokenizer.

    Parameters
    ----------
    folder
        An empty folder.
    tensors
        Name and array, in the order of `config.tensor_shapes()`, as from
        `gptx.random_weights.random_tensors`. One array is in memory at a time.
    dtype
        "float32", "float16" or "bfloat16".
    """
    shapes = config.tensor_shapes()
    layout = [(FileTensor(name, shape, dtype),) for name, shape in shapes.items()]
    write_safetensors(folder / WEIGHTS, layout, ((array,) for _, array in tensors), "pt")
    with create(folder / CONFIG) as file:
        data = {**config.to_dict(), "torch_dtype": dtype}
        file.write((json.dumps(data, indent=2) + "\n").encode())


def write_safetensors(
    path: Path,
    layout: Sequence[tuple[FileTensor, ...]],
    tensors: Iterator[tuple[Array, ...]],
    made_for: str,
) -> None:
    """Write a safetensors file of arrays that arrive one by one.

    Parameters
    ----------
    layout
        Tensors of the file, a tuple for each item of `tensors`.
    tensors
        Arrays of those tensors.
    made_for
        "pt" or "mlx", the `format` in the file's metadata, which transformers requires.
    """
    header: dict[str, object] = {"__metadata__": {"format": made_for}}
    end = 0
    for tensor in (tensor for group in layout for tensor in group):
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": STORED_TYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % ALIGNMENT_BYTES)
    with create(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for group, arrays in zip(layout, tensors, strict=True):
            for tensor, array in zip(group, arrays, strict=True):
                if tensor.dtype == "uint32":
                    file.write(np.ascontiguousarray(array, "<u4").data)
                else:
                    write_array(file, array, tensor.dtype, f"tensor {tensor.name}")
