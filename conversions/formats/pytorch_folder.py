"""pytorch_model.bin, one file or shards, with config.json and the tokenizer's files beside it.

How transformers saved GPT-2 before there was safetensors: the names of the Hub with or without
`transformer.`, Conv1D `[in, out]`, masks among the tensors, the head there or not
(https://github.com/huggingface/transformers, src/transformers/models/gpt2/modeling_gpt2.py). Read
alone: what is written today is safetensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Checkpoint, Stored, config_of_shapes
from gptx.conversions.containers.torch_file import TorchFile, is_torch
from gptx.conversions.containers.torch_names import Tensor
from gptx.errors import NotFoundError, WeightsError
from gptx.model_files import shard_names
from gptx.stored_weights import is_dropped, is_mask_buffer
from gptx.tokenization.bpe import BytePairTokenizer

WEIGHTS = "pytorch_model.bin"
INDEX = f"{WEIGHTS}.index.json"


def detect(path: Path) -> bool:
    """Whether this is a folder with such a file or its shards, or a file of torch.save."""
    if path.is_dir():
        return any((path / name).is_file() for name in (WEIGHTS, INDEX))
    return is_torch(path)


def read(path: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open a folder, or one file with the config.json beside it, if there is one.

    Raises
    ------
    ConfigError, WeightsError, TokenizerError
        What the files hold is damaged, or no GPT-2 that gptx can run.
    NotFoundError, StorageError
        A file is missing, or cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    if config is None and (folder / "config.json").is_file():
        config = GPT2Config.from_file(folder / "config.json")
    if path.is_dir():
        return _checkpoint(_files(folder), config, BytePairTokenizer.of_folder(folder))
    return _checkpoint([path], config, None)


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    paths = [folder / name for name in shard_names(folder / INDEX)]
    if missing := [path for path in paths if not path.is_file()]:
        raise NotFoundError(f"{missing[0]} is missing: {INDEX} names it")
    return paths


def _checkpoint(
    paths: Iterable[Path], config: GPT2Config | None, tokenizer: BytePairTokenizer | None
) -> Checkpoint:
    places: dict[str, tuple[TorchFile, Tensor]] = {}
    stored: dict[str, Stored] = {}
    for path in paths:
        file = TorchFile(path)
        for raw, tensor in file.state_dict(file.value).items():
            name = raw.removeprefix("transformer.")
            if is_mask_buffer(name):
                continue
            if name in stored:
                raise WeightsError(f"{path}: tensor {name} is there twice")
            places[name] = file, tensor
            stored[name] = file.stored(tensor, name)
    notes: tuple[str, ...] = ()
    if config is None:
        if "wte.weight" in places and "lm_head.weight" in places:
            (file, table), head = places["wte.weight"], places["lm_head.weight"]
            if file.is_same(table, *head):  # tied
                del stored["lm_head.weight"]
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        config, notes = config_of_shapes(shapes)
    stored = {name: tensor for name, tensor in stored.items() if not is_dropped(name, config)}
    return Checkpoint(config, stored, tokenizer, notes)
