"""The formats, one row each; detection of a format; `read`, which opens a model of any format.

Imports are lazy: `gptx convert --help` needs the table only.

A format is one module in `formats/`, which reads and writes it, and one row of `FORMATS`. The
module has

- `detect(path) -> bool`, if it reads: True if the content of a file or folder is of this format;
  raises nothing;
- `read(path, config=None, ignore_unknown=False) -> Checkpoint`, if it reads: the tensors are read
  later, one by one;
- `write(checkpoint, path, **options)`, if it writes: to a path that does not exist, or into an
  empty folder. `convert` then puts the output in its place atomically. It may return notes: what
  the format cannot represent, one sentence each.
"""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from gptx.errors import (
    DataError,
    NotFoundError,
    ParameterError,
    StorageError,
    TokenizerError,
    WeightsError,
    argument,
)
from gptx.lfs_pointer import check_content, check_named_files

if TYPE_CHECKING:
    from gptx.config import GPT2Config
    from gptx.conversions.checkpoint import Checkpoint
    from gptx.tokenization.pipeline import PipelineTokenizer

DTYPES = ("float32", "float16", "bfloat16")
QUANTIZED_TYPES = ("int8", "int4")


@dataclass(frozen=True)
class Format:
    """A row of the table of formats.

    Attributes
    ----------
    title
        Description for users.
    module
        Name of the module in `formats/`.
    reads, writes
        True if the module reads the format, and if it writes it.
    dtypes, quantize
        Values of `--dtype` and of `--quantize` that the writer supports.
    suffix
        Suffix of the written file; "/" for a folder.
    by_suffix
        True if a destination with that suffix selects this format.
    files
        Patterns of the names of all files in a written folder.
    options
        Names of further keyword arguments of the writer.
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

    def load_module(self) -> ModuleType:
        """Import the module."""
        return importlib.import_module(f"gptx.conversions.formats.{self.module}")


_TOKENIZER = (
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "generation_config.json"),
)
_SAFETENSORS = ("config.json", "model*.safetensors", "model.safetensors.index.json", *_TOKENIZER)

# `detect` tries the formats in this order.
FORMATS: dict[str, Format] = {
    "mlx": Format(
        "MLX (mlx-lm) folder",
        "mlx_lm",
        dtypes=DTYPES,
        quantize=QUANTIZED_TYPES,
        files=_SAFETENSORS,
    ),
    "safetensors": Format("Hugging Face folder", "hugging_face", dtypes=DTYPES, files=_SAFETENSORS),
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
    "gguf": Format(
        "GGUF (llama.cpp)", "gguf", dtypes=DTYPES, quantize=QUANTIZED_TYPES, suffix=".gguf"
    ),
    "gpt-burn": Format("gpt-burn folder", "gpt_burn", writes=False),
    "nanogpt": Format("nanoGPT ckpt.pt", "nanogpt", writes=False),
    "pytorch": Format("PyTorch file, such as pytorch_model.bin", "pytorch_folder", writes=False),
    "openai": Format("OpenAI's TensorFlow checkpoint", "openai_tensorflow", writes=False),
    "onnx": Format(
        "ONNX folder",
        "onnx_folder",
        reads=False,
        quantize=("int8",),
        files=("model.onnx", "model.onnx.data", "config.json", *_TOKENIZER),
        options=("head",),
    ),
    "fastgpt-dat": Format("fastGPT model.dat, before March 2024", "fastgpt_dat", suffix=".dat"),
}


def detect(path: Path) -> str:
    """Return the name of the format of a file or folder, from its content.

    Raises
    ------
    NotFoundError
        `path` does not exist.
    WeightsError
        It has none of the `FORMATS`.
    StorageError
        It cannot be read.
    """
    if name := find_format(path):
        return name
    if path.is_file() and path.stat().st_size == 0:
        raise WeightsError(f"{path} is an empty file: fetch it again")
    from gptx.hub.resolve import hub_reading

    hint = hub_reading(path) if path.is_dir() else ""
    if description := describe_unsupported(path):
        raise WeightsError(f"{path} is {description}{hint}")
    if path.is_dir():
        check_named_files(path)
    names = ", ".join(name for name, row in FORMATS.items() if row.reads)
    raise WeightsError(f"{path} is in no supported format ({names}): see gptx convert --list{hint}")


def find_format(path: Path) -> str | None:
    """Return the name of the format of a file or folder; None if it has none of the `FORMATS`.

    Raises the errors of `detect` for a path that cannot be read.
    """
    try:
        if not path.exists():
            raise NotFoundError(f"{path} does not exist")
        if not (path.is_file() or path.is_dir()):
            raise WeightsError(
                f"{path} is neither a file nor a folder: write the model to a file first"
            )
        if path.is_file():
            check_content(path)
        for name, row in FORMATS.items():
            if row.reads and row.load_module().detect(path):
                return name
    except PermissionError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})") from error
    return None


# Of formats of one file. A folder is not searched for a model; the error names what it has.
_FILE_SUFFIXES = {".gguf", ".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".dat"}
# Files of transformers' Trainer beside a model.
_TRAINER_FILES = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state).*")

# Files that gptx does not read -> description, and a way to a file that it reads.
_OTHER_PROGRAMS = {
    "adapter_config.json": "an adapter (such as LoRA), not a model: merge it into its model with "
    "peft's merge_and_unload() and save_pretrained(), and give the result",
    "*.onnx": "an ONNX graph, which gptx writes and does not read: give the model that it was "
    "converted from",
    "tf_model.h5": "a TensorFlow model of transformers, which gptx does not read: save it with "
    "transformers' GPT2LMHeadModel.from_pretrained(FOLDER, from_tf=True).save_pretrained(OTHER)",
    "flax_model.msgpack": "a Flax model of transformers, which gptx does not read: save it with "
    "transformers' GPT2LMHeadModel.from_pretrained(FOLDER, from_flax=True).save_pretrained(OTHER)",
}

# Files of a Hugging Face folder that are no models without the others.
_PARTS_OF_FOLDERS = ("config.json", "*.index.json", *_TOKENIZER)
_SHARD = re.compile(r".+-\d+-of-\d+\.(safetensors|bin)")


def describe_unsupported(path: Path) -> str | None:
    """Describe a file of a known format that gptx does not read, or a folder with a model file."""
    if path.is_file() and any(map(path.match, _PARTS_OF_FOLDERS)):
        return f"one file of a model in a folder: give the folder, {path.parent}"
    for pattern, text in _OTHER_PROGRAMS.items():
        if path.match(pattern) or (path.is_dir() and any(path.glob(pattern))):
            return text
    if path.is_dir() and (names := _model_files(path)):
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        return f"a folder with {names[0]}{more}: give the path of that file, {path / names[0]}"
    return None


def _model_files(folder: Path) -> list[str]:
    """List files whose suffix is that of a format of one file; shards are not complete models."""
    try:
        files = sorted(folder.iterdir())
    except PermissionError:  # the reader of a Hugging Face folder reports it
        return []
    return [
        file.name
        for file in files
        if file.suffix in _FILE_SUFFIXES
        and "-of-" not in file.name
        and not _TRAINER_FILES.fullmatch(file.name)
        and file.is_file()
    ]


def read(
    source: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | GPT2Config | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    ignore_unknown: bool = False,
    revision: str | None = None,
    offline: bool = False,
) -> tuple[str, Checkpoint]:
    """Open a model of any format.

    Parameters
    ----------
    source
        A file or folder, an embedded name, an alias, a Hub id, or `openai:124M` and the like.
    config
        A config.json, for a format without a complete configuration.
    tokenizer
        A folder with the tokenizer's files, or a model that has a tokenizer, for a format without
        one: see `read_tokenizer`. None: that of the model, or the files beside it.
    ignore_unknown
        Leave out tensors that a GPT-2 does not have, with a note. Otherwise they are an error.
    revision, offline
        Options for a Hub model, see `gptx.hub.resolve.locate`.

    Returns
    -------
    format, checkpoint
        A name in `FORMATS`, and the model.

    Raises
    ------
    NotFoundError, StorageError
        A file is missing or cannot be read.
    WeightsError, ConfigError, TokenizerError
        The files are damaged, or contain no GPT-2 that gptx supports.
    """
    from gptx.config import GPT2Config
    from gptx.conversions.checkpoint import find_companions
    from gptx.tokenization import finding

    path = find_path(source, revision=revision, offline=offline)
    if config is not None and not isinstance(config, GPT2Config):
        config = GPT2Config.from_file(Path(config).expanduser())
    name = detect(path)
    try:
        checkpoint: Checkpoint = FORMATS[name].load_module().read(path, config, ignore_unknown)
    except DataError as error:
        if path.is_dir():
            check_named_files(path, str(error))
        elif _SHARD.fullmatch(path.name):
            raise WeightsError(
                f"{path} is one shard of a model: give the folder with all, {path.parent}"
            ) from error
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error.message}") from None
    if tokenizer is not None:
        found = read_tokenizer(tokenizer, checkpoint.config, offline=offline)
        checkpoint = _with_tokenizer(checkpoint, found)
    elif checkpoint.tokenizer is None and not path.is_dir():
        checkpoint = _with_files_beside(checkpoint, path)
    if path.is_dir():
        notes = checkpoint.notes
        if checkpoint.tokenizer is None and (fault := finding.describe_unreadable(path)):
            notes += (f"the model has no tokenizer that gptx reads: {fault}",)
        checkpoint = replace(checkpoint, companions=find_companions(path), notes=notes)
    return name, checkpoint


def find_path(
    source: str | os.PathLike[str], *, revision: str | None = None, offline: bool = False
) -> Path:
    """Return the path of a model's files; download them if necessary. See `read`."""
    from gptx.conversions.checkpoint import CARRIED_FILES
    from gptx.hub.resolve import find_source, importing_hub, is_openai, local_path
    from gptx.model_files import find_files

    if is_openai(source):
        with importing_hub():
            from gptx.conversions.formats.openai_download import fetch
        return fetch(str(source), revision=revision, offline=offline)
    path = local_path(source)
    if path is None:
        found = find_source(source, revision=revision, offline=offline)
        folder = find_files(found).folder
        for name in CARRIED_FILES:
            found.find(name)
        found.write_ref()
        return folder
    if revision is not None:
        raise ParameterError(
            f"{argument('revision')} is {revision!r}, but {str(source)!r} is not from the Hub"
        )
    return path


def read_tokenizer(
    source: str | os.PathLike[str],
    config: GPT2Config,
    *,
    offline: bool = False,
    token: str | None = None,
) -> PipelineTokenizer:
    """Read a tokenizer for a model that comes without one.

    Parameters
    ----------
    source
        A folder with the tokenizer's files, or one of them; or a model that has a tokenizer: an
        embedded name, a file of any format, an alias or a Hub id. Weights are not downloaded.
    config
        Config of the model.

    Raises
    ------
    NotFoundError
        The source does not exist, or has no tokenizer.
    TokenizerError
        The tokenizer is damaged, or has more tokens than the model.
    """
    from gptx.hub.resolve import local_path, locate
    from gptx.tokenization import finding
    from gptx.tokenization.files import FILES
    from gptx.tokenization.pipeline import PipelineTokenizer

    if not str(source).strip():
        raise ParameterError(
            f"{argument('tokenizer')} is {source!r}, expected a folder, or a model that has one"
        )
    path = local_path(source)
    if path is None:
        try:
            files = locate(source, offline=offline, token=token, weights=False).tokenizer
        except NotFoundError as error:
            raise NotFoundError(f"{argument('tokenizer')}: {error}") from None
        found = PipelineTokenizer(files) if files else None
    else:
        path = path.parent if path.name in FILES else path  # such as tokenizer.json
        found = PipelineTokenizer.of_folder(path) if path.is_dir() else None
        if found is None and find_format(path) is not None:
            found = read(path)[1].tokenizer
    if found is None:
        unread = finding.describe_unreadable(path) if path is not None else None
        expected = "expected tokenizer.json, or vocab.json and merges.txt"
        raise NotFoundError(f"{source} has no tokenizer: {unread or expected}")
    if found.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer of {source} has {found.vocab_size} tokens, the model "
            f"{config.vocab_size}: give the tokenizer of this model"
        )
    return found


def _with_files_beside(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Add the tokenizer in the folder of a file, unless it is that of a larger model."""
    from gptx.tokenization.pipeline import PipelineTokenizer

    tokenizer = PipelineTokenizer.of_folder(path.absolute().parent)
    if tokenizer is None or tokenizer.vocab_size > checkpoint.config.vocab_size:
        return checkpoint
    notes = checkpoint.notes
    if not path.with_name("config.json").is_file():  # else the folder is that of the model
        notes += (f"the tokenizer in the folder of {path.name} is used",)
    return _with_tokenizer(replace(checkpoint, notes=notes), tokenizer)


def _with_tokenizer(checkpoint: Checkpoint, tokenizer: PipelineTokenizer) -> Checkpoint:
    """Replace the tokenizer, and add its end of text if the model has none."""
    from gptx.conversions.checkpoint import NO_TOKENIZER_NOTE, end_of_text_ids

    config = checkpoint.config
    if config.eos_token_id is None:
        config = replace(config, **end_of_text_ids(config.vocab_size, tokenizer))
    notes = tuple(note for note in checkpoint.notes if note != NO_TOKENIZER_NOTE)
    return replace(checkpoint, config=config, tokenizer=tokenizer, notes=notes)
