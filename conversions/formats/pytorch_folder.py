"""pytorch_model.bin, one file or shards, with config.json and the tokenizer's files.

transformers saved GPT-2 in this form before safetensors: names with or without `transformer.`,
Conv1D `[in, out]`, masks among the tensors, with or without the head
(https://github.com/huggingface/transformers, src/transformers/models/gpt2/modeling_gpt2.py). The
format is read only: transformers writes safetensors now.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Checkpoint, StoredTensor, infer_config, stored_array
from gptx.conversions.containers.torch_file import TorchFile, is_torch
from gptx.conversions.containers.torch_globals import TorchTensor
from gptx.errors import NotFoundError, WeightsError
from gptx.model_files import shard_names
from gptx.stored_weights import is_mask_buffer, settle_head
from gptx.tokenization.pipeline import PipelineTokenizer

WEIGHTS = "pytorch_model.bin"
INDEX = f"{WEIGHTS}.index.json"


def detect(path: Path) -> bool:
    """Test for a folder with that file or its shards, or for a file of torch.save."""
    if path.is_dir():
        return any((path / name).is_file() for name in (WEIGHTS, INDEX))
    return is_torch(path)


def read(path: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open a folder, or one file, with the config.json beside it if it exists.

    Raises
    ------
    ConfigError, WeightsError, TokenizerError
        A file is damaged, or the model is not a GPT-2 that gptx supports.
    NotFoundError, StorageError
        A file is missing or cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    if config is None and (folder / "config.json").is_file():
        config = GPT2Config.from_file(folder / "config.json")
    if path.is_dir():
        return _checkpoint(_files(folder), config, PipelineTokenizer.of_folder(folder))
    return _checkpoint([path], config, None)


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    paths = [folder / name for name in shard_names(folder / INDEX)]
    if missing := [path for path in paths if not path.is_file()]:
        raise NotFoundError(f"{missing[0]} is missing, expected by {INDEX}: fetch it")
    return paths


def _checkpoint(
    paths: Iterable[Path], config: GPT2Config | None, tokenizer: PipelineTokenizer | None
) -> Checkpoint:
    found: dict[str, _FileTensor] = {}
    for path in paths:
        file = TorchFile(path)
        for file_name, tensor in file.tensors(file.value).items():
            name = file_name.removeprefix("transformer.")
            if is_mask_buffer(name):
                continue
            if name in found:
                raise WeightsError(f"{path}: duplicate tensor {name}")
            found[name] = _FileTensor(file, tensor)
    found, config, head_notes = settle_head(found, config, _FileTensor.is_same)
    stored = {name: tensor.stored(name) for name, tensor in found.items()}
    config, notes = infer_config({name: tensor.shape for name, tensor in stored.items()}, config)
    return Checkpoint(config, stored, tokenizer, head_notes + notes)


@dataclass(frozen=True)
class _FileTensor:
    """A tensor and its file."""

    file: TorchFile
    tensor: TorchTensor

    def is_same(self, other: _FileTensor) -> bool:
        """Return True if the tensor has the numbers of another one; equal views are not read."""
        return self.file.is_same(self.tensor, other.file, other.tensor)

    def stored(self, name: str) -> StoredTensor:
        """Describe the tensor as a part of a checkpoint."""
        tensor = self.tensor
        read_tensor = self.file.reader(tensor, name)
        return stored_array(read_tensor, tensor.shape, tensor.storage.dtype)
