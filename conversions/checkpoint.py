"""A model in the form that every format is read into and written from.

A checkpoint is a config, tensors and a tokenizer. A tensor is read from its file on each access and
is not kept, so a conversion needs the memory of one tensor only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.containers.binary import dtype_name
from gptx.errors import ConfigError, WeightsError
from gptx.files import create
from gptx.quantization import Quantization, QuantizedTensor, dequantize
from gptx.safetensors_file import widen_bfloat16
from gptx.stored_weights import check_weights, drop_unknown, have_same_numbers, is_linear_weight
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.tokenization.saving import (
    TEMPLATES,
    UNREAD_FILES,
    copy_file,
    save_tokenizer,
    write_unread_tokenizer,
)

Array = np.ndarray

NO_TOKENIZER_NOTE = "the file has no tokenizer: give the tokenizer of the model's data"
GENERATION = "generation_config.json"
CARRIED_FILES = (GENERATION, *TEMPLATES)  # conversions copy them
HEAD_DIM = 64  # D of all of OpenAI's models: assumed for a format that has no number of heads


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in its file.

    Attributes
    ----------
    shape
        Shape as in `GPT2Config.tensor_shapes`, whatever the layout of the file is.
    dtype
        Type of the array that `read` returns: a float type or `BFLOAT16`. For a `QuantizedTensor`
        it is float32.
    read
        Function that reads the tensor: an array of that shape and type, or a `QuantizedTensor`
        [out, in].
    quantization
        Quantization of the `QuantizedTensor`; None for an array.
    file_type
        Name of the type in the file if `dtype` is another one, such as "Q6_K"; else None.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Array | QuantizedTensor]
    quantization: Quantization | None = None
    file_type: str | None = None

    def is_same(self, other: StoredTensor) -> bool:
        """Return True if the tensor has the shape and the numbers of another one of floats."""
        if self.shape != other.shape:
            return False
        return have_same_numbers(float_array(self.read()), float_array(other.read()))


def stored_array(
    read: Callable[[], Array], shape: tuple[int, ...], dtype: np.dtype, *, transposed: bool = False
) -> StoredTensor:
    """Describe an unquantized tensor.

    Parameters
    ----------
    read
        Function that reads the array as the file stores it.
    shape, dtype
        Shape and type of that array.
    transposed
        The file stores the matrix as `[out, in]`, gptx as `[in, out]`.
    """
    if transposed:
        return StoredTensor(shape[::-1], dtype, lambda: read().T)
    return StoredTensor(shape, dtype, read)


class LazyTensors(Mapping[str, "Array | QuantizedTensor"]):
    """Tensors by name; each access reads the tensor from its file."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> Array | QuantizedTensor:
        return self.stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


@dataclass(frozen=True)
class Checkpoint:
    """A model in its files.

    Attributes
    ----------
    config
        The model's settings.
    stored
        Name -> tensor, for all of `config.tensor_shapes()`, in that order.
    tokenizer
        The model's tokenizer; None if the files contain none.
    notes
        Assumptions of the reader, one sentence each.
    ignore_unknown : bool
        Leave out tensors that the config does not have. Otherwise they are an error.
    companions
        Name -> path, of files of a Hugging Face folder that no other field replaces.

    Raises
    ------
    WeightsError
        See `gptx.stored_weights.check_weights`.
    """

    config: GPT2Config
    stored: Mapping[str, StoredTensor]
    tokenizer: PipelineTokenizer | None = None
    notes: tuple[str, ...] = ()
    ignore_unknown: InitVar[bool] = False
    companions: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self, ignore_unknown: bool) -> None:
        stored = self.stored
        if ignore_unknown:
            stored, notes = drop_unknown(stored, self.config)
            object.__setattr__(self, "notes", self.notes + notes)
        check_weights(stored, self.config)
        ordered = {name: stored[name] for name in self.config.tensor_shapes()}
        object.__setattr__(self, "stored", ordered)
        if not any(tensor.quantization for tensor in ordered.values()):
            # A config.json can name a quantization that the tensors do not have.
            object.__setattr__(self, "config", replace(self.config, quantization=None))

    @property
    def tensors(self) -> LazyTensors:
        """Name -> array, or `QuantizedTensor` for a quantized matrix."""
        return LazyTensors(self.stored)

    def as_floats(self) -> Checkpoint:
        """Return the same model with quantized matrices dequantized to float32."""
        if self.config.quantization is None:
            return self
        stored = {
            name: StoredTensor(tensor.shape, tensor.dtype, _DequantizingReader(name, tensor.read))
            for name, tensor in self.stored.items()
        }
        return replace(self, config=replace(self.config, quantization=None), stored=stored)


@dataclass(frozen=True)
class _DequantizingReader:
    name: str
    read: Callable[[], Array | QuantizedTensor]

    def __call__(self) -> Array:
        tensor = self.read()
        if not isinstance(tensor, QuantizedTensor):
            return tensor
        floats = dequantize(tensor)
        return floats.T if is_linear_weight(self.name) else floats


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], given: GPT2Config | None = None
) -> tuple[GPT2Config, tuple[str, ...]]:
    """Infer the config of a model whose files have none.

    Parameters
    ----------
    shapes
        Name -> shape of each tensor, names and layout as in gptx.
    given
        Config from the caller, which takes precedence; `Checkpoint` compares the shapes with it.

    Returns
    -------
    config, notes
        The config, and the assumptions in it, one sentence each.

    Raises
    ------
    ConfigError, WeightsError
        The shapes are not those of a GPT-2.
    """
    if given is not None:
        return replace(given, quantization=None), ()
    for name in ("wte.weight", "wpe.weight"):
        if len(shapes.get(name, ())) != 2:
            raise WeightsError(f"tensor {name} is missing or not a matrix: this is not a GPT-2")
    (V, C), (S, _) = shapes["wte.weight"], shapes["wpe.weight"]
    layers = {int(m[1]) for name in shapes if (m := re.match(r"h\.(\d{1,5})\.", name))}
    if C % HEAD_DIM:
        raise ConfigError(
            f"the number of heads is missing, and the width {C} is not a multiple of {HEAD_DIM}: "
            "give the model's config.json"
        )
    hidden = (shapes.get("h.0.mlp.c_fc.bias") or (4 * C,))[0]
    config = GPT2Config(
        vocab_size=V,
        n_positions=S,
        n_embd=C,
        n_layer=len(layers),
        n_head=C // HEAD_DIM,
        n_inner=None if hidden == 4 * C else hidden,
        tie_word_embeddings="lm_head.weight" not in shapes,
        **end_of_text_ids(V),
    )
    note = (
        f"the file has no number of heads: {config.n_head} of width {HEAD_DIM} are assumed, with "
        f"the activation {config.activation_function}, as in OpenAI's models (if that is wrong, "
        "give the model's config.json)"
    )
    return config, (note,)


def require_openai_settings(config: GPT2Config, program: str, *supported: str) -> None:
    """Raise an error if the model has settings that OpenAI's models do not have.

    Parameters
    ----------
    program
        Name of the program that supports only those, for the error message.
    supported
        Names of settings of which the program supports all values.

    Raises
    ------
    ConfigError
        The program would compute something else.
    """
    openai = {
        "n_inner": 4 * config.n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    for name, value in openai.items():
        found = config.mlp_dim if name == "n_inner" else getattr(config, name)
        if found != value and name not in supported:
            reason = " (the model has its own lm_head.weight)" if name.startswith("tie") else ""
            raise ConfigError(f"{name} is {found!r}{reason}, {program} supports only {value!r}")


def end_of_text_ids(vocab_size: int, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Return `bos_token_id` and `eos_token_id` for a format that has neither.

    Both are the id of <|endoftext|> in the tokenizer. Without a tokenizer they are OpenAI's 50256
    if the vocabulary has that id, else None.
    """
    if tokenizer is not None:
        id = getattr(tokenizer, "end_of_text_id", None)  # a tokenizer of the caller may lack it
    else:
        id = 50256 if vocab_size > 50256 else None
    return {"bos_token_id": id, "eos_token_id": id}


def unquantized(tensor: Array | QuantizedTensor) -> Array:
    """Return a tensor of a checkpoint without quantization, in its stored type."""
    assert not isinstance(tensor, QuantizedTensor), "call as_floats() first"
    return tensor


def float_array(tensor: Array | QuantizedTensor) -> Array:
    """Return a tensor of a checkpoint without quantization, with bfloat16 as float32."""
    return widen_bfloat16(unquantized(tensor))


def write_config_and_tokenizer(checkpoint: Checkpoint, folder: Path, dtype: str | None) -> None:
    """Write config.json, the tokenizer's files, and those that the source has beside them.

    Parameters
    ----------
    dtype
        Value of `torch_dtype`; None: the type that all tensors have.
    """
    data = checkpoint.config.to_dict()
    found = {dtype_name(tensor.dtype) for tensor in checkpoint.stored.values()}
    if dtype or len(found) == 1:
        data["torch_dtype"] = dtype or found.pop()
    with create(folder / "config.json") as file:
        file.write((json.dumps(data, indent=2) + "\n").encode())
    if checkpoint.tokenizer is not None:
        config = checkpoint.config
        save_tokenizer(
            checkpoint.tokenizer,
            folder,
            context=config.n_positions,
            bos_id=config.bos_token_id,
            eos_ids=config.eos_token_ids,
        )
    else:
        write_unread_tokenizer(checkpoint.companions, folder)
    if path := checkpoint.companions.get(GENERATION):
        copy_file(path, folder / GENERATION)


def find_companions(folder: Path) -> dict[str, Path]:
    """Find the `Checkpoint.companions` of a folder."""
    paths = {name: folder / name for name in (GENERATION, *UNREAD_FILES)}
    return {name: path for name, path in paths.items() if path.is_file()}
