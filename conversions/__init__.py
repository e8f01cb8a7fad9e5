"""Conversions: the GPT-2 files that there are, read and written.

A format is one file here, reader and writer together, and one row of `FORMATS`. Its module has

- `detect(path) -> bool`: whether this is such a file or folder, from what is in it; never raises;
- `read(path, config=None) -> Checkpoint`, if it is read: tensors are read later, one by one;
- `write(checkpoint, path, **choices)`, if it is written: to where nothing is yet, or into an empty
  folder. `convert` puts what was written in its place, whole or not at all.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Array, Checkpoint, Stored, end_of_text
from gptx.conversions.containers.binary import DTYPES as FLOATS
from gptx.embedded import EMBEDDED
from gptx.errors import (
    DataError,
    NotFoundError,
    ParameterError,
    StorageError,
    TokenizerError,
    WeightsError,
)
from gptx.files import atomic_path
from gptx.hub.resolve import ALIASES, importing_hub, locate
from gptx.quantization import GROUP_SIZE, Quantization, QuantizedTensor
from gptx.tokenization.bpe import FILES, BytePairTokenizer

CODES = ("int8", "int4")


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes
    ----------
    title
        What it is, for people.
    module
        The file in this package that reads and writes it.
    reads, writes
        What that can do.
    dtypes, quantize
        What `--dtype` and `--quantize` can ask of the writer.
    suffix
        Of the file that is written; "/" for a folder.
    by_suffix
        Whether that suffix means this format if nothing else is said.
    files
        Of a folder: the names that can be in it, as patterns.
    options
        Further keyword arguments that the writer takes.
    """

    title: str
    module: str
    reads: bool = True
    writes: bool = True
    dtypes: tuple[str, ...] = ("float32",)
    quantize: tuple[str, ...] = ()
    suffix: str = "/"
    by_suffix: bool = True
    files: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def load(self) -> ModuleType:
        """Its module."""
        return importlib.import_module(f"gptx.conversions.formats.{self.module}")


TOKENIZER = (*FILES, "tokenizer_config.json")
SAFETENSORS = ("config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER)

# In the order in which they are asked whether a file is theirs.
FORMATS: dict[str, Format] = {
    "mlx": Format(
        "MLX (mlx-lm) folder", "mlx_lm", dtypes=FLOATS, quantize=CODES, files=SAFETENSORS
    ),
    "safetensors": Format("Hugging Face folder", "hugging_face", dtypes=FLOATS, files=SAFETENSORS),
    "llm.c": Format(
        "llm.c model (gpt2_124M.bin)",
        "llm_c",
        dtypes=("float32", "bfloat16"),
        suffix=".bin",
    ),
    "staticgrad": Format(
        "staticgrad folder",
        "staticgrad",
        files=("gpt2_weights.bin", "gpt2_metadata.json", "gpt2_vocab.bin"),
    ),
    "json": Format("gptx (Rust, C++) model_weights.json", "gptx_json", suffix=".json"),
    "fastgpt": Format("fastGPT model.gguf", "fastgpt", suffix=".gguf", by_suffix=False),
    "gguf": Format("GGUF (llama.cpp)", "gguf", dtypes=FLOATS, quantize=CODES, suffix=".gguf"),
    "gpt-burn": Format("gpt-burn folder", "gpt_burn", writes=False),
    "nanogpt": Format("nanoGPT ckpt.pt", "nanogpt", writes=False),
    "pytorch": Format("PyTorch pytorch_model.bin", "pytorch_folder", writes=False),
    "openai": Format("OpenAI's TensorFlow checkpoint", "openai_tensorflow", writes=False),
    "onnx": Format(
        "ONNX folder",
        "onnx_folder",
        reads=False,
        quantize=("int8",),
        files=("model.onnx", "model.onnx.data", "config.json", *TOKENIZER),
        options=("head",),
    ),
    "fastgpt-dat": Format("fastGPT model.dat, before 2024", "fastgpt_dat", suffix=".dat"),
}


def detect(path: Path) -> str:
    """The name of the format of a file or folder, from what is in it.

    Raises
    ------
    NotFoundError
        There is nothing at `path`.
    WeightsError
        It is none of `FORMATS`.
    StorageError
        It may not be read.
    """
    try:
        if not path.exists():
            raise NotFoundError(f"{path} does not exist")
        if not (path.is_file() or path.is_dir()):
            raise WeightsError(f"{path} is neither a file nor a folder")
        for name, row in FORMATS.items():
            if row.reads and row.load().detect(path):
                return name
    except PermissionError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})") from error
    titles = ", ".join(row.title for row in FORMATS.values() if row.reads)
    raise WeightsError(f"{path} is none of the formats that gptx reads: {titles}")


def read(
    source: str | Path,
    *,
    config: str | Path | GPT2Config | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> tuple[str, Checkpoint]:
    """Open a model of any format.

    Parameters
    ----------
    source
        A file or folder, an embedded name, an alias or a Hub id.
    config
        A config.json, for formats that do not say all of what it says.
    tokenizer
        A folder with the tokenizer's files, for formats that have none.
    revision, offline
        Of a Hub model, see `gptx.hub.resolve.locate`.

    Returns
    -------
    format, checkpoint
        A name in `FORMATS`, and the model.

    Raises
    ------
    NotFoundError, StorageError
        A file is missing or cannot be read.
    WeightsError, ConfigError, TokenizerError
        The files are damaged, or no GPT-2 that gptx can run.
    """
    path = _path_of(source, revision, offline)
    if config is not None and not isinstance(config, GPT2Config):
        config = GPT2Config.from_file(config)
    name = detect(path)
    try:
        checkpoint: Checkpoint = FORMATS[name].load().read(path, config)
    except DataError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from None
    if tokenizer is not None:
        checkpoint = _with_tokenizer(checkpoint, Path(os.path.expanduser(tokenizer)))
    return name, checkpoint


def _with_tokenizer(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The model with the tokenizer of a folder, and its end of text if the model names none."""
    tokenizer, config = BytePairTokenizer.of_folder(folder), checkpoint.config
    if tokenizer is None:
        raise NotFoundError(f"{folder} has no tokenizer.json, and no vocab.json and merges.txt")
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, "
            f"the model {config.vocab_size}: it belongs to another one"
        )
    if config.eos_token_id is None:
        config = replace(config, **end_of_text(config.vocab_size, tokenizer))
    return replace(checkpoint, config=config, tokenizer=tokenizer)


def _path_of(source: str | Path, revision: str | None, offline: bool) -> Path:
    path = Path(os.path.expanduser(source))
    name = str(source)
    if name.startswith("openai:"):
        with importing_hub():
            from gptx.conversions.formats.openai_download import fetch
        return fetch(name, revision=revision, offline=offline)
    if revision is None and name not in EMBEDDED:
        if path.is_dir() or (path.exists() and name not in ALIASES):
            return path
        # A checkpoint of TensorFlow goes by what the names of its files begin with.
        if (index := Path(f"{path}.index")).is_file():
            return index
    return locate(source, revision=revision, offline=offline).folder


def convert(
    source: str | Path,
    destination: str | Path,
    to: str | None = None,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int = GROUP_SIZE,
    config: str | Path | GPT2Config | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    offline: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Checkpoint:
    """Write a model of any format in another one, tensor by tensor.

    Parameters
    ----------
    source, config, tokenizer, revision, offline
        See `read`.
    destination
        The file or folder to write. It appears whole or not at all.
    to
        A name in `FORMATS`. If None: what the suffix of `destination` means, or a folder of
        safetensors (of MLX, if `quantize` is given).
    dtype
        "float32", "float16" or "bfloat16", what the format has of them. If None: the source's type
        if the format has it, else float32.
    quantize, group_size
        "int8" or "int4", if the format has them, and weights that share a scale (MLX alone).
    overwrite
        Replace what is at `destination`.
    progress
        Called with a tensor's name, the numbers read so far and how many there are, before each
        tensor is read.
    **options
        Of one format: `Format.options`.

    Returns
    -------
    Checkpoint
        The source.

    Raises
    ------
    ParameterError
        The format does not have what was asked for, or `destination` is there already.
    ConfigError, WeightsError, TokenizerError
        The source is damaged, or the format cannot hold such a model.
    NotFoundError, StorageError
        A file is missing, or cannot be read or written.
    """
    destination = Path(os.path.expanduser(destination))
    name = _target(to, destination, quantize)
    row = FORMATS[name]
    for what, asked, allowed in (
        ("dtype", dtype, row.dtypes),
        ("quantize", quantize, row.quantize),
    ):
        if asked is not None and asked not in allowed:
            there = f"has {', '.join(allowed)}" if allowed else "has none"
            raise ParameterError(f"{what} is {asked!r}, but the format {name} {there}")
    if unknown := [option for option in options if option not in row.options]:
        raise ParameterError(f"the format {name} has no option {unknown[0]!r}")
    how = Quantization.named(quantize, group_size)
    _check_destination(destination, row, overwrite)
    _, checkpoint = read(
        source, config=config, tokenizer=tokenizer, revision=revision, offline=offline
    )
    model = checkpoint
    if how is not None and name == "mlx" and checkpoint.config.quantization not in (None, how):
        raise ParameterError(
            f"{how} was asked for, but the weights are {checkpoint.config.quantization} already: "
            "leave quantize out, or take the model's float weights"
        )
    if how == checkpoint.config.quantization and name == "mlx":
        how = None
    elif name != "mlx":
        model = model.as_floats()
    if progress is not None:
        model = _watched(model, progress)
    choices: dict[str, Any] = dict(options)
    if len(row.dtypes) > 1:
        choices["dtype"] = dtype
    if row.quantize:
        choices["quantization"] = how
    with atomic_path(destination) as path:
        if row.suffix == "/":
            path.mkdir()
        row.load().write(model, path, **choices)
    return checkpoint


def _target(to: str | None, destination: Path, quantize: str | None) -> str:
    """The format that is meant."""
    writers = {name: row for name, row in FORMATS.items() if row.writes}
    if to is not None:
        if to not in writers:
            raise ParameterError(f"to is {to!r}, expected one of {', '.join(writers)}")
        return to
    if destination.is_dir() or not destination.suffix or destination.suffix[1:].isdigit():
        return "mlx" if quantize else "safetensors"
    for name, row in writers.items():
        if row.by_suffix and row.suffix == destination.suffix:
            return name
    names = ", ".join(writers)
    raise ParameterError(f"{destination} does not say which format is meant: give --to {names}")


def _check_destination(destination: Path, row: Format, overwrite: bool) -> None:
    """Raise unless the destination can be written without losing anything."""
    if not destination.absolute().parent.is_dir():
        raise StorageError(f"{destination} cannot be written (there is no such folder)")
    if destination.is_dir():
        if row.suffix != "/":
            raise ParameterError(f"{destination} is a folder, expected the name of a file")
        entries = sorted(destination.iterdir())
        for entry in entries:
            if entry.is_dir() or not any(entry.match(pattern) for pattern in row.files):
                raise ParameterError(
                    f"folder {destination} holds {entry.name}, which is not of this format and "
                    "would be lost: give another folder"
                )
        if not entries:
            return
    elif not destination.exists():
        return
    elif row.suffix == "/":
        raise ParameterError(f"{destination} is a file, expected the name of a folder")
    if not overwrite:
        raise ParameterError(f"{destination} is there already: give another name, or --overwrite")


def _watched(checkpoint: Checkpoint, progress: Callable[[str, int, int], None]) -> Checkpoint:
    """The same model, which tells when a tensor is read."""
    total = checkpoint.config.n_parameters
    done = 0

    def watched(name: str, tensor: Stored) -> Stored:
        def read() -> Array | QuantizedTensor:
            nonlocal done
            progress(name, done, total)
            done += math.prod(tensor.shape)
            return tensor.read()

        return replace(tensor, read=read)

    return replace(
        checkpoint,
        stored={name: watched(name, tensor) for name, tensor in checkpoint.stored.items()},
    )
