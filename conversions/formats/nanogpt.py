"""ckpt.pt of nanoGPT: the model, the state of its optimizer, and its settings.

It is a checkpoint of a trainer, see `pytorch_folder.py`, with the settings of the model. Its linear
layers are `nn.Linear`, `[out, in]`; its norms have OpenAI's epsilon; its head is tied. Either all
layers have biases or none has. Since May 2023 its MLP uses the erf form of GELU, before
that the tanh form (`gelu_new`); the file does not contain the form
(https://github.com/karpathy/nanoGPT, model.py, train.py). The format is read only, without the
optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import (
    NO_TOKENIZER_NOTE,
    Checkpoint,
    StoredTensor,
    end_of_text_ids,
)
from gptx.conversions.containers.torch_file import TorchFile, is_torch
from gptx.conversions.formats.pytorch_folder import describe, is_same, model_tensors
from gptx.errors import ConfigError, GptxError, WeightsError
from gptx.stored_weights import HEAD, settle_head

FILE = "ckpt.pt"

ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")

ACTIVATION_NOTE = (
    'the file has no form of GELU: "gelu" (erf) is assumed, nanoGPT\'s since May 2023 '
    '(for an older model, give a config.json with "gelu_new")'
)


def detect(path: Path) -> bool:
    """Test for that file, or for a folder with it."""
    if path.is_dir():
        return is_torch(path / FILE)
    try:
        return is_torch(path) and _is_nanogpt(TorchFile(path).value)
    except GptxError:  # the reader of other PyTorch files reports the damage
        return False


def _is_nanogpt(value: Any) -> bool:
    return isinstance(value, dict) and "model" in value and "model_args" in value


def read(path: Path, config: GPT2Config | None = None, ignore_unknown: bool = False) -> Checkpoint:
    """Open ckpt.pt, or its folder.

    Parameters
    ----------
    config
        Settings that replace those of the file.

    Raises
    ------
    ConfigError, WeightsError
        The file is damaged, or the model is not a GPT-2 that gptx supports.
    StorageError
        The file cannot be read.
    """
    path = path / FILE if path.is_dir() else path
    file = TorchFile(path)
    if not _is_nanogpt(file.value):
        raise WeightsError(f'{path} is not a file of nanoGPT: it has no "model" and "model_args"')
    tensors, notes = model_tensors([file], ignore_unknown=ignore_unknown)
    # The head is tied, except in nanoGPT's first weeks.
    tensors, config, head_notes = settle_head(tensors, config, is_same)
    notes = (*notes, *head_notes, NO_TOKENIZER_NOTE)
    if config is None:
        tied = HEAD not in tensors
        config = _config(path, file.value["model_args"], len(tensors), tied)
        notes = (ACTIVATION_NOTE, *notes)
    else:
        config = replace(config, quantization=None)
    stored = dict(_with_biases(describe(tensors), config))
    return Checkpoint(config, stored, None, notes, ignore_unknown=ignore_unknown)


def _config(path: Path, arguments: Any, n_tensors: int, tied: bool) -> GPT2Config:
    """Make the config of the arguments of nanoGPT's GPTConfig."""
    if not isinstance(arguments, dict):
        raise ConfigError(f"{path} is not a file of nanoGPT: its model_args is not a dict")
    for argument in ARGUMENTS:
        if type(arguments.get(argument)) is not int:
            raise ConfigError(
                f"{path}: {argument} of its model_args is not an integer: give a config.json"
            )
    if arguments["n_layer"] > n_tensors:  # limits the list of names that follows from it
        raise WeightsError(
            f"{path} is damaged: it has {n_tensors} tensors for {arguments['n_layer']} layers"
        )
    end = end_of_text_ids(arguments["vocab_size"])["eos_token_id"]
    return GPT2Config(
        vocab_size=arguments["vocab_size"],
        n_positions=arguments["block_size"],
        n_embd=arguments["n_embd"],
        n_layer=arguments["n_layer"],
        n_head=arguments["n_head"],
        activation_function="gelu",
        tie_word_embeddings=tied,
        bos_token_id=end,
        eos_token_id=end,
    )


def _with_biases(
    stored: dict[str, StoredTensor], config: GPT2Config
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors, and zeros for the biases of a model without any."""
    yield from stored.items()
    if any(name.endswith(".bias") for name in stored):
        return
    for name, shape in config.tensor_shapes().items():
        weight = stored.get(name.removesuffix("bias") + "weight")
        if name.endswith(".bias") and weight is not None:
            zeros = partial(np.zeros, shape, weight.dtype)
            yield name, StoredTensor(shape, weight.dtype, zeros)
