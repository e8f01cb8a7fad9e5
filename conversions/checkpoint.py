"""What every format reads into and is written from: a config, tensors, a tokenizer.

A tensor is read when it is asked for and kept by nobody, so a model of any size passes through in
the memory of one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.errors import ConfigError, WeightsError
from gptx.files import BFLOAT16, widened
from gptx.quantization import Quantization, QuantizedTensor, dequantize
from gptx.tokenization.bpe import BytePairTokenizer
from gptx.weights import LINEAR

Array = np.ndarray

HEAD_DIM = 64  # D in each of OpenAI's sizes: what is taken where a format does not say


@dataclass(frozen=True)
class Stored:
    """A tensor where it lies.

    Attributes
    ----------
    shape
        As in `GPT2Config.tensor_shapes`, however it is stored.
    dtype
        Of what `read` returns: a float type or `BFLOAT16`; float32 if that is a `QuantizedTensor`.
    read
        Reads it: an array of that shape and type, or a `QuantizedTensor` [out, in].
    quantization
        How the `QuantizedTensor` is that `read` gives; None if it gives floats.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Array | QuantizedTensor]
    quantization: Quantization | None = None


class Tensors(Mapping[str, "Array | QuantizedTensor"]):
    """Tensors by name; each is read anew whenever it is asked for."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> Array | QuantizedTensor:
        return self.stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


@dataclass(frozen=True)
class Checkpoint:
    """A model as it lies in its files.

    Attributes
    ----------
    config
        What kind of GPT-2 it is.
    stored
        The tensors of `config.tensor_shapes()`, under those names, in that order.
    tokenizer
        Text <-> token ids; None if the files hold none.
    notes
        What its reader had to assume, a sentence each.

    Raises
    ------
    WeightsError
        A tensor is missing, unknown, misshapen or not of a float type.
    """

    config: GPT2Config
    stored: Mapping[str, Stored]
    tokenizer: BytePairTokenizer | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expected = self.config.tensor_shapes()
        for name, shape in expected.items():
            if name not in self.stored:
                raise WeightsError(f"tensor {name} is missing: the weights do not fit the config")
            found = self.stored[name]
            if found.shape != shape:
                raise WeightsError(
                    f"tensor {name} has shape {list(found.shape)}, "
                    f"the config asks for {list(shape)}"
                )
            if found.dtype.kind != "f" and found.dtype != BFLOAT16:
                raise WeightsError(f"tensor {name} is of type {found.dtype}, expected a float type")
        if unknown := [name for name in self.stored if name not in expected]:
            raise WeightsError(f"tensor {unknown[0]} is unknown: the weights do not fit the config")
        ordered = {name: self.stored[name] for name in expected}
        object.__setattr__(self, "stored", ordered)
        if not any(tensor.quantization for tensor in ordered.values()):
            # Somebody's config may say so; the tensors know better.
            object.__setattr__(self, "config", replace(self.config, quantization=None))

    @property
    def tensors(self) -> Tensors:
        """The tensors; those of a quantized matrix as `QuantizedTensor`."""
        return Tensors(self.stored)

    def as_floats(self) -> Checkpoint:
        """The same model without quantized matrices: their codes as the floats they stand for."""
        if self.config.quantization is None:
            return self
        stored = {
            name: Stored(tensor.shape, tensor.dtype, _FloatsOf(name, tensor.read))
            for name, tensor in self.stored.items()
        }
        return replace(self, config=replace(self.config, quantization=None), stored=stored)


@dataclass(frozen=True)
class _FloatsOf:
    name: str
    read: Callable[[], Array | QuantizedTensor]

    def __call__(self) -> Array:
        tensor = self.read()
        if not isinstance(tensor, QuantizedTensor):
            return tensor
        floats = dequantize(tensor)
        return floats.T if LINEAR.fullmatch(self.name) else floats


def config_of_shapes(
    shapes: Mapping[str, tuple[int, ...]], given: GPT2Config | None = None
) -> tuple[GPT2Config, tuple[str, ...]]:
    """The config of tensors that came without one, and the notes to make of it.

    Parameters
    ----------
    shapes
        Of the tensors under our names, in our layout.
    given
        What the caller knows; it is returned as it is (`Checkpoint` holds the tensors to it).

    Raises
    ------
    ConfigError, WeightsError
        The shapes are not those of a GPT-2.
    """
    if given is not None:
        return replace(given, quantization=None), ()
    for name in ("wte.weight", "wpe.weight"):
        if len(shapes.get(name, ())) != 2:
            raise WeightsError(f"tensor {name} is missing or no matrix: this is no GPT-2")
    (V, C), (S, _) = shapes["wte.weight"], shapes["wpe.weight"]
    layers = {int(m[1]) for name in shapes if (m := re.match(r"h\.(\d{1,5})\.", name))}
    if C % HEAD_DIM:
        raise ConfigError(
            f"the file does not say how many heads share a width of {C}, which is no multiple of "
            f"{HEAD_DIM}: give the model's config.json"
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
        **end_of_text(V),
    )
    note = (
        f"the file does not say how many heads there are: {config.n_head} of {HEAD_DIM}, "
        "as in OpenAI's models, are assumed (or give the model's config.json)"
    )
    return config, (note,)


def require_openai(config: GPT2Config, program: str, *known: str) -> None:
    """Raise if a model has settings that OpenAI's have not, for programs that know no others.

    Parameters
    ----------
    program
        What the error calls it, "llm.c" for example.
    known
        Settings that it does know.

    Raises
    ------
    ConfigError
        It would compute something else.
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
        if found != value and name not in known:
            raise ConfigError(f"{name} is {found!r}, {program} has {value!r} alone")


def end_of_text(vocab_size: int, tokenizer: BytePairTokenizer | None = None) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id` where the format names none.

    Those of <|endoftext|> in the tokenizer; without one OpenAI's, if the vocabulary holds it.
    """
    if tokenizer is not None:
        id = tokenizer.end_of_text_id
    else:
        id = 50256 if vocab_size > 50256 else None
    return {"bos_token_id": id, "eos_token_id": id}


def plain(tensor: Array | QuantizedTensor) -> Array:
    """A tensor of a checkpoint without quantization, as it is stored."""
    assert not isinstance(tensor, QuantizedTensor), "as_floats() comes first"
    return tensor


def float_array(tensor: Array | QuantizedTensor) -> Array:
    """The same with bfloat16 as float32."""
    return widened(plain(tensor))
