"""ckpt.pt of nanoGPT: the model, the state of its optimizer, and how it was made.

Its linear layers are `nn.Linear`, `[out, in]`, its norms have OpenAI's epsilon, its head is tied.
Its biases are all there or none is; its MLP uses the erf form of GELU since May 2023, and the tanh
form (`gelu_new`) before, which no file tells (https://github.com/karpathy/nanoGPT, model.py,
train.py). Read alone; of the optimizer nothing is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Checkpoint, Stored, end_of_text
from gptx.conversions.containers.torch_file import TorchFile, is_torch
from gptx.conversions.containers.torch_names import Tensor
from gptx.errors import ConfigError, GptxError, WeightsError
from gptx.stored_weights import is_linear_weight, is_mask_buffer

FILE = "ckpt.pt"
WRAPPERS = re.compile(r"^((_orig_mod|module)\.)*(transformer\.)?")  # torch.compile's and DDP's

ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")

ACTIVATION_NOTE = (
    "the file does not say which GELU its model used: that of nanoGPT since May 2023 is assumed "
    '(erf form, "gelu"; give a config.json with "gelu_new" for an older one)'
)
TOKENIZER_NOTE = "nanoGPT keeps no tokenizer with its model: give that of its data"


def detect(path: Path) -> bool:
    """Whether this is such a file, or a folder with one."""
    if path.is_dir():
        return is_torch(path / FILE)
    try:
        return is_torch(path) and _is_ours(TorchFile(path).value)
    except GptxError:  # a damaged one is refused by the reader of any PyTorch file
        return False


def _is_ours(value: Any) -> bool:
    return isinstance(value, dict) and "model" in value and "model_args" in value


def read(path: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open ckpt.pt, or the folder that it is in.

    Parameters
    ----------
    config
        In the place of what the file says.

    Raises
    ------
    ConfigError, WeightsError
        The file is damaged, or holds no GPT-2 that gptx can run.
    StorageError
        It cannot be read.
    """
    path = path / FILE if path.is_dir() else path
    file = TorchFile(path)
    if not _is_ours(file.value):
        raise WeightsError(f'{path} has no "model" and "model_args": nanoGPT did not write it')
    tensors: dict[str, Tensor] = {}
    for raw, tensor in file.state_dict(file.value["model"]).items():
        name = WRAPPERS.sub("", raw)
        if name in tensors:
            raise WeightsError(f"{path}: tensor {name} is there twice")
        if not is_mask_buffer(name):
            tensors[name] = tensor
    notes: tuple[str, ...] = (TOKENIZER_NOTE,)
    # Tied, but for the first weeks of nanoGPT.
    head, table = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    tied = head is None or table is None or file.is_same(head, file, table)
    if config is None:
        config = _config(path, file.value["model_args"], len(tensors), tied)
        notes = (ACTIVATION_NOTE, *notes)
    else:
        config = replace(config, quantization=None)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    stored = {
        name: file.stored(tensor, name, transposed=is_linear_weight(name))
        for name, tensor in tensors.items()
    }
    return Checkpoint(config, dict(_with_biases(stored, config)), None, notes)


def _config(path: Path, arguments: Any, n_tensors: int, tied: bool) -> GPT2Config:
    """What its GPTConfig says."""
    if not isinstance(arguments, dict):
        raise ConfigError(f"{path}: model_args is no dict: nanoGPT did not write it")
    for argument in ARGUMENTS:
        if type(arguments.get(argument)) is not int:
            raise ConfigError(
                f"{path}: {argument} of its model_args is no whole number: give its config.json"
            )
    if arguments["n_layer"] > n_tensors:  # before a list of so many is made
        raise WeightsError(f"{path} does not hold the layers that it says it has: it is damaged")
    end = end_of_text(arguments["vocab_size"])["eos_token_id"]
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


def _with_biases(stored: dict[str, Stored], config: GPT2Config) -> Iterator[tuple[str, Stored]]:
    """Zeros for the biases of a model that was trained without."""
    yield from stored.items()
    if any(name.endswith(".bias") for name in stored):
        return
    for name, shape in config.tensor_shapes().items():
        weight = stored.get(name.removesuffix("bias") + "weight")
        if name.endswith(".bias") and weight is not None:
            yield name, Stored(shape, weight.dtype, partial(np.zeros, shape, weight.dtype))
