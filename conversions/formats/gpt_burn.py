"""gpt-burn, a GPT-2 in Rust: a folder with its config.json and model.mpk.

model.mpk is a record of Burn 0.13, see `containers/messagepack.py`; its linear layers are
`[in, out]`. config.json is that of a training run. The format is read only
(https://github.com/felix-andreas/gpt-burn, src/model.rs, src/train.rs).

Its tokenizer is part of the program (src/tokenizer.rs): 103 characters, and `<?>` for all others. A
model with a vocabulary of that size gets them, unless the folder has a `tokenizer.bin`, which the
program writes for vowel pieces.

Its model differs from GPT-2 in three ways:

- Queries, keys, values and the output of the attention have no biases: they become zero.
- The head has a bias. If possible, the bias of the last layer norm includes it. That is generally
  possible only for a vocabulary not larger than the width. Otherwise the width is doubled: a
  duplicate of each channel changes neither mean nor variance of a layer norm. The layer norms
  multiply the duplicates by 0. The last layer norm makes one duplicate a constant 1, and the head
  multiplies that channel by the bias. The added heads have zero queries, keys and values.
- A layer norm of Burn 0.13 divides by sqrt(variance) + 1e-5, GPT-2 by sqrt(variance + epsilon).
  With epsilon = 1e-10, the relative difference is below 1e-5 / sqrt(variance): 0.04% in the first
  layer of an untrained model, less than 1e-5 for activations of order 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits, punctuation

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Checkpoint, StoredTensor
from gptx.conversions.containers.binary import Array, BinaryFile
from gptx.conversions.containers.messagepack import FLOATS, NUMBER_LAYOUTS, Kind, Record, Schema
from gptx.errors import ConfigError, NotFoundError, StorageError, WeightsError
from gptx.tokenization.pipeline import PipelineTokenizer

WEIGHTS, PIECES = "model.mpk", "tokenizer.bin"
# The tokens of `CharTokenizer`, in the order of their ids.
UNKNOWN = "<?>"
LETTERS = f"\n {ascii_lowercase}{ascii_uppercase}{punctuation}{digits}äüöÄÖÜß"
CHARACTERS = [*LETTERS, UNKNOWN]
BURN_EPSILON = 1e-5  # of Burn's layer norm
EPSILON = 1e-10  # its square, for GPT-2's layer norm

# The structs of src/model.rs.
NORM: Schema = {"gamma": Kind.TENSOR, "beta": Kind.TENSOR, "epsilon": Kind.NIL}
LINEAR: Schema = {"weight": Kind.TENSOR, "bias": Kind.TENSOR}
UNBIASED: Schema = {"weight": Kind.TENSOR, "bias": Kind.NIL}
EMBEDDING: Schema = {"weight": Kind.TENSOR}
ATTENTION: Schema = {
    "n_heads": Kind.NIL,
    "d_k": Kind.NIL,
    "query": UNBIASED,
    "key": UNBIASED,
    "value": UNBIASED,
    "attn_dropout": Kind.NIL,
    "out": UNBIASED,
    "resid_dropout": Kind.NIL,
}
MLP: Schema = {
    "linear_1": LINEAR,
    "gelu": Kind.NIL,
    "linear_2": LINEAR,
    "dropout": Kind.NIL,
}
BLOCK: Schema = {"norm_1": NORM, "multi_head": ATTENTION, "norm_2": NORM, "pwff": MLP}
MODEL: Schema = {
    "token_embedding": EMBEDDING,
    "positional_embedding": EMBEDDING,
    "dropout": Kind.NIL,
    "blocks": [BLOCK],
    "norm": NORM,
    "linear": LINEAR,
}
METADATA = dict.fromkeys(("float", "int", "format", "version", "settings"), Kind.TEXT)
RECORD: Schema = {"metadata": {**METADATA}, "item": MODEL, "_b": []}

# gptx's names -> names in the record or in one of its blocks.
NAMES = {
    "wte.weight": "token_embedding.weight",
    "wpe.weight": "positional_embedding.weight",
    "ln_1.weight": "norm_1.gamma",
    "ln_1.bias": "norm_1.beta",
    "attn.c_proj.weight": "multi_head.out.weight",
    "ln_2.weight": "norm_2.gamma",
    "ln_2.bias": "norm_2.beta",
    "mlp.c_fc.weight": "pwff.linear_1.weight",
    "mlp.c_fc.bias": "pwff.linear_1.bias",
    "mlp.c_proj.weight": "pwff.linear_2.weight",
    "mlp.c_proj.bias": "pwff.linear_2.bias",
    "ln_f.weight": "norm.gamma",
    "ln_f.bias": "norm.beta",
    "lm_head.weight": "linear.weight",
}
RECORD_PREFIX = re.compile(r"^item\.(blocks\.\d+\.)?")

SIZES = ("context_length", "vocab_size", "n_layers", "n_heads", "d_model", "d_hidden")


def detect(path: Path) -> bool:
    """Test for a folder with a record of Burn, or for such a file."""
    file = path / WEIGHTS if path.is_dir() else path
    try:
        if not file.is_file():  # opening a pipe would wait for its writer
            return False
        with open(file, "rb") as opened:
            start = opened.read(10)
    except OSError:
        return False
    return start == b"\x83\xa8metadata"


def read(path: Path, config: GPT2Config | None = None, ignore_unknown: bool = False) -> Checkpoint:
    """Open a folder with config.json and model.mpk, or model.mpk with config.json beside it.

    Raises
    ------
    ConfigError
        config.json is damaged, or `config` was given: gpt-burn's has all settings.
    WeightsError
        The record is damaged, or does not fit config.json.
    NotFoundError, StorageError
        A file is missing or cannot be read.
    """
    if config is not None:
        raise ConfigError("gpt-burn's config.json has all settings: leave out the other config")
    file = path / WEIGHTS if path.is_dir() else path
    sizes = _read_sizes(file.with_name("config.json"))
    model = _BurnModel(Record(BinaryFile(file), RECORD), sizes)
    model.check()
    folded = model.fold_head_bias()
    C, M, H = sizes["d_model"], sizes["d_hidden"], sizes["n_heads"]
    width, heads = (C, H) if folded is not None else (2 * C, 2 * H)
    found = GPT2Config(
        vocab_size=sizes["vocab_size"],
        n_positions=sizes["context_length"],
        n_embd=width,
        n_layer=sizes["n_layers"],
        n_head=heads,
        n_inner=None if 4 * width == M else M,
        activation_function="gelu",
        layer_norm_epsilon=EPSILON,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    notes = [
        f"Burn's layer norm divides by sqrt(variance) + {BURN_EPSILON}, this one by sqrt(variance "
        f"+ {EPSILON}): for small activations the results differ slightly"
    ]
    if folded is None:
        notes.append(f"the model is {width} wide instead of {C}, to contain the bias of its head")
    get = model.tensor if folded is not None else model.doubled_tensor
    stored = {
        name: StoredTensor(shape, model.dtype, partial(get, name))
        for name, shape in found.tensor_shapes().items()
    }
    if folded is not None:
        stored["ln_f.bias"] = StoredTensor(folded.shape, folded.dtype, lambda: folded)
    tokenizer = _tokenizer(file.parent, found.vocab_size)
    return Checkpoint(found, stored, tokenizer, tuple(notes), ignore_unknown=ignore_unknown)


def _tokenizer(folder: Path, vocab_size: int) -> PipelineTokenizer | None:
    """Return the tokenizer of gpt-burn's characters; None for a model of another vocabulary."""
    if vocab_size != len(CHARACTERS) or (folder / PIECES).exists():
        return None
    return PipelineTokenizer.of_pieces(CHARACTERS, unknown=UNKNOWN)


def _read_sizes(path: Path) -> dict[str, int]:
    """Read the sizes of the model from config.json."""
    if not path.is_file():
        raise NotFoundError(f"{path} is missing, expected beside {WEIGHTS}")
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # includes invalid UTF-8
        raise ConfigError(f"{path} is not valid JSON ({error}): fetch it again") from None
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict):
        raise ConfigError(f'{path} is not a config.json of gpt-burn: it has no object "model"')
    for name in SIZES:
        value = model.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ConfigError(f"{path}: {name} is {str(value)[:40]!r}, expected an integer > 0")
    if model["d_model"] % model["n_heads"]:
        raise ConfigError(
            f"{path}: d_model {model['d_model']} is not a multiple of n_heads {model['n_heads']}"
        )
    return {name: model[name] for name in SIZES}


@dataclass(frozen=True)
class _BurnModel:
    """A record of a model, and the sizes of its config.json; its tensors under gptx's names."""

    record: Record
    sizes: Mapping[str, int]

    @property
    def dtype(self) -> np.dtype:
        """Type of all numbers."""
        return FLOATS[self.record.texts["metadata.float"]]

    def check(self) -> None:
        """Compare the record with the sizes."""
        path, texts = self.record.file.path, self.record.texts
        if texts["metadata.float"] not in FLOATS:
            kind = texts["metadata.float"][:40]
            raise WeightsError(f"{path} is of type {kind!r}, expected one of {', '.join(FLOATS)}")
        blocks, layers = self.record.lengths["item.blocks"], self.sizes["n_layers"]
        if blocks != layers:
            raise WeightsError(f"{path} has {blocks} blocks, expected {layers} by its config.json")
        C, V, M = self.sizes["d_model"], self.sizes["vocab_size"], self.sizes["d_hidden"]
        shapes = {
            "token_embedding.weight": (V, C),
            "positional_embedding.weight": (self.sizes["context_length"], C),
            "linear.weight": (C, V),
            "linear.bias": (V,),
            "pwff.linear_1.weight": (C, M),
            "pwff.linear_1.bias": (M,),
            "pwff.linear_2.weight": (M, C),
        }
        for name, tensor in self.record.tensors.items():
            last = RECORD_PREFIX.sub("", name)
            vector = last.endswith(("gamma", "beta", "bias"))
            shape = shapes.get(last, (C,) if vector else (C, C))
            if tensor.shape != shape:
                raise WeightsError(
                    f"{path}: {name} has shape {list(tensor.shape)}, expected {list(shape)} by its "
                    "config.json"
                )
            if NUMBER_LAYOUTS[tensor.marker]["value"].itemsize != self.dtype.itemsize:
                raise WeightsError(
                    f"{path}: {name} is not of type {self.dtype}, the type in its metadata"
                )

    def fold_head_bias(self) -> Array | None:
        """Compute a bias of the last layer norm that includes the bias of the head.

        It is a solution b of `b @ head = beta @ head + bias`; None if no solution exists.
        """
        C, V = self.sizes["d_model"], self.sizes["vocab_size"]
        if V > C:
            return None
        head, bias, beta = (
            self._get(name).astype(np.float64)
            for name in ("linear.weight", "linear.bias", "norm.beta")
        )
        with np.errstate(all="ignore"):
            try:
                change, *_ = np.linalg.lstsq(head.T, bias, rcond=None)
            except np.linalg.LinAlgError:  # numbers that are not finite
                return None
            found = (beta + change).astype(np.float32)
            wanted = beta @ head + bias
            error = np.abs(found @ head - wanted).max()
            return found if error <= 1e-6 * np.abs(wanted).max() else None

    def tensor(self, name: str) -> Array:
        """Read a tensor of the unchanged model, without the bias of its head."""
        block, last = _record_path(name)
        if last == "attn.c_attn.weight":
            parts = [f"{block}multi_head.{part}.weight" for part in ("query", "key", "value")]
            return np.concatenate([self._get(part) for part in parts], axis=1)
        C = self.sizes["d_model"]
        if last == "attn.c_attn.bias":
            return np.zeros(3 * C, self.dtype)
        if last == "attn.c_proj.bias":
            return np.zeros(C, self.dtype)
        array = self._get(block + NAMES[last])
        return array.T if last == "lm_head.weight" else array

    def doubled_tensor(self, name: str) -> Array:
        """Read a tensor of the model of twice the width, see the module's docstring."""
        C = self.sizes["d_model"]
        _, last = _record_path(name)
        x = self.tensor(name)
        if last == "attn.c_attn.weight":  # [C, 3C] -> [2C, 3·2C]
            return np.pad(x.reshape(C, 3, C), ((0, C), (0, 0), (0, C))).reshape(2 * C, 6 * C)
        if last == "mlp.c_fc.weight":  # [C, M] -> [2C, M]
            return np.pad(x, ((0, C), (0, 0)))
        if last == "mlp.c_fc.bias":
            return x
        if last.startswith("ln_"):  # [C] -> [2C]
            x = np.pad(x, (0, C))
            x[C] = 1 if last == "ln_f.bias" else 0
            return x
        if last == "lm_head.weight":  # [V, C] -> [V, 2C]
            x = np.pad(x, ((0, 0), (0, C)))
            x[:, C] = self._get("linear.bias")
            return x
        if last == "attn.c_proj.weight":  # [C, C] -> [2C, C], then as the others
            x = np.pad(x, ((0, C), (0, 0)))
        return np.concatenate([x, x], axis=-1)  # [..., C] -> [..., 2C]

    def _get(self, name: str) -> Array:
        return self.record.read(self.record.tensors[f"item.{name}"])


def _record_path(name: str) -> tuple[str, str]:
    """Split `h.3.ln_1.bias` into the block `blocks.3.` of the record and `ln_1.bias`."""
    if not name.startswith("h."):
        return "", name
    _, layer, last = name.split(".", 2)
    return f"blocks.{layer}.", last
