"""Files of torch.save: pytorch_model.bin, one file or shards, and the checkpoints of trainers.

transformers saved GPT-2 in this form before safetensors: names with or without `transformer.`,
Conv1D `[in, out]`, masks among the tensors, with or without the head
(https://github.com/huggingface/transformers, src/transformers/models/gpt2/modeling_gpt2.py). The
format is read only: transformers writes safetensors now.

A trainer saves a dict in which the model's tensors are one value, such as `model_state_dict`, or
`state_dict` of Lightning. The states of its optimizer are not read. Matrices of linear layers are
[out, in] if the model has them as torch.nn.Linear.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Checkpoint, StoredTensor, infer_config, stored_array
from gptx.conversions.containers.torch_file import FileTensor, TorchFile, is_torch
from gptx.conversions.containers.torch_globals import TorchTensor
from gptx.errors import NotFoundError, WeightsError
from gptx.model_files import shard_names
from gptx.stored_weights import HEAD, TABLE, have_same_numbers, is_linear_weight, settle_head
from gptx.tensor_names import are_out_in, is_gpt2_tensor, model_names
from gptx.tokenization.pipeline import PipelineTokenizer

WEIGHTS = "pytorch_model.bin"
INDEX = f"{WEIGHTS}.index.json"
# Tensors can share numbers, as the head and the table do. A limit: a small file fills no memory.
MAX_SHARING = 64  # bytes of all tensors per byte of the files


def detect(path: Path) -> bool:
    """Test for a folder with that file or its shards, or for a file of torch.save."""
    if path.is_dir():
        return any((path / name).is_file() for name in (WEIGHTS, INDEX))
    return is_torch(path)


def read(path: Path, config: GPT2Config | None = None, ignore_unknown: bool = False) -> Checkpoint:
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
        tokenizer = PipelineTokenizer.of_folder(folder)
        return _checkpoint(_files(folder), config, tokenizer, ignore_unknown)
    return _checkpoint([path], config, None, ignore_unknown)


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    paths = [folder / name for name in shard_names(folder / INDEX)]
    if missing := [path for path in paths if not path.is_file()]:
        raise NotFoundError(f"{missing[0]} is missing, expected by {INDEX}: fetch it")
    return paths


def _checkpoint(
    paths: Sequence[Path],
    config: GPT2Config | None,
    tokenizer: PipelineTokenizer | None,
    ignore_unknown: bool,
) -> Checkpoint:
    found, notes = model_tensors([TorchFile(path) for path in paths], ignore_unknown=ignore_unknown)
    found, config, head_notes = settle_head(found, config, is_same)
    stored = describe(found)
    config, config_notes = infer_config({n: tensor.shape for n, tensor in stored.items()}, config)
    notes += head_notes + config_notes
    return Checkpoint(config, stored, tokenizer, notes, ignore_unknown=ignore_unknown)


def model_tensors(
    files: Sequence[TorchFile], *, ignore_unknown: bool = False
) -> tuple[dict[str, FileTensor], tuple[str, ...]]:
    """Find the tensors of a GPT-2 in a file or in shards.

    Returns
    -------
    tensors, notes
        Name in gptx -> tensor, and what is left out, one sentence each; see `model_names`.

    Raises
    ------
    WeightsError
        The files have no model, several ones or one without numbers; see `model_names`.
    """
    tensors: dict[str, FileTensor] = {}
    notes: tuple[str, ...] = ()
    for file in files:
        state, state_notes = _state_dict(file)
        notes += state_notes
        for stored_name, tensor in file.tensors(state).items():
            if stored_name in tensors:
                raise WeightsError(f"{file.path}: duplicate tensor {stored_name}")
            tensors[stored_name] = tensor
    names, name_notes = model_names(tensors, ignore_unknown=ignore_unknown)
    found = {name: tensors[stored] for stored, name in names.items()}
    if not any(tensor.nbytes for tensor in found.values()):
        raise WeightsError(
            f"{files[0].path} has empty tensors only, as DeepSpeed saves them in ZeRO stage 3: "
            "join the partitions with its zero_to_fp32.py, and give the result"
        )
    return found, notes + name_notes


def is_same(head: FileTensor, table: FileTensor) -> bool:
    """Return True if the head has the numbers of the table; one view is not read twice."""
    return head == table or have_same_numbers(head.reader(HEAD)(), table.reader(TABLE)())


def describe(tensors: Mapping[str, FileTensor]) -> dict[str, StoredTensor]:
    """Describe the tensors as those of a checkpoint, with matrices [in, out].

    Raises
    ------
    WeightsError
        A tensor overlaps itself, or the tensors share so many numbers that they are far larger than
        their files.
    """
    out_in = are_out_in({name: tensor.shape for name, tensor in tensors.items()})
    described = {
        name: stored_array(
            tensor.reader(name),
            tensor.shape,
            tensor.dtype,
            transposed=out_in and is_linear_weight(name),
        )
        for name, tensor in tensors.items()
    }
    files = {tensor.file for tensor in tensors.values()}
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    n_stored = sum(file.size for file in files)
    if n_bytes > MAX_SHARING * n_stored:
        paths = ", ".join(sorted(str(file.path) for file in files))
        raise WeightsError(
            f"{paths}: the tensors have {n_bytes} bytes, the file {n_stored}: it is damaged"
        )
    return described


# Keys of the model in checkpoints of trainers. The other dicts of a file are averages, or moments
# of an optimizer under the names of the tensors.
STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")


def _state_dict(file: TorchFile) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Find the dict of the model's tensors; add a note if there are several."""
    found = file.find_dicts(_has_gpt2)
    if len(found) > 1 and (usual := [path for path in STATE_DICTS if path in found]):
        others = _keys([path for path in found if path != usual[0]])
        note = f"the file has several models: {usual[0]} is read, not {others}"
        return found[usual[0]], (note,)
    if len(found) == 1:
        return next(iter(found.values())), ()
    value = file.value
    if found:
        fault = f"several models ({_keys(found)}): save one of them"
    elif not isinstance(value, dict):
        fault = "no dict of tensors: save the model's state_dict()"
    elif all(isinstance(item, TorchTensor) for item in value.values()):
        return value, ()  # `model_names` names the tensors
    else:
        fault = f"no state_dict of a GPT-2: found the keys {_keys(value)}"
    raise WeightsError(f"{file.path} has {fault}")


def _has_gpt2(value: dict[str, Any]) -> bool:
    return any(isinstance(item, TorchTensor) and is_gpt2_tensor(k) for k, item in value.items())


def _keys(keys: Collection[str]) -> str:
    shown = [ascii(key[:40])[1:-1] for key in list(keys)[:8]]
    return ", ".join(shown) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
