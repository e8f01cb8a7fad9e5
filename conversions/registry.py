"""The formats, one row each, and the detection of a format.

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
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from gptx.errors import NotFoundError, StorageError, WeightsError
from gptx.lfs_pointer import check_content, check_named_files

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
