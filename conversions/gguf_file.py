"""GGUF, the format of llama.cpp: a GPT-2 and its tokenizer in one file. The writer, so far.

A file is a header (metadata, and a list of the tensors) and the tensors' data, each at a multiple
of 32 bytes (version 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The names of
tensors and metadata are those that llama.cpp's own converter gives them, and the numbers of a block
are those of llama.cpp's quantizer, bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.errors import ConfigError, ParameterError, TokenizerError, WeightsError
from gptx.files import atomic_file, widened
from gptx.tokenizer import BytePairTokenizer

Array = np.ndarray

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
QUANTIZATION_VERSION = 2  # of ggml's block formats
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9  # types of metadata
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
CHUNK = 2**20  # numbers that are converted at a time

# Our names -> llama.cpp's; those of a layer have `h.3.` before them here, and `blk.3.` there.
NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(
    path: str | Path,
    config: GPT2Config,
    tensors: Mapping[str, Array],
    tokenizer: BytePairTokenizer | None = None,
    *,
    dtype: str = "F32",
    name: str = "gpt2",
) -> None:
    """Write a model as llama.cpp reads it, a million numbers at a time.

    Parameters
    ----------
    tensors
        Those of `config.tensor_shapes()`, of any float type.
    tokenizer
        Without one the file is good for token ids alone.
    dtype
        Type of the matrices, one of `TYPES`. As in llama.cpp, biases, norms and positions are F32
        whatever it is, and a matrix whose rows are not whole blocks is F16. In a Q4_0 file the
        token embedding is Q4_0, too: `llama-quantize --pure` does that, and without `--pure` makes
        it Q6_K, which is larger.
    name
        The model's name, which llama.cpp shows.

    Raises
    ------
    ParameterError
        There is no such `dtype`, or the weights are quantized already.
    ConfigError, TokenizerError
        llama.cpp would compute something else, or split text in another way.
    WeightsError
        A number is too large for `dtype`, or is none.
    StorageError
        The file cannot be written; `path` is as it was.
    """
    if dtype not in TYPES:
        raise ParameterError(f"dtype is {dtype!r}, expected one of {', '.join(TYPES)}")
    if config.quantization is not None:
        raise ParameterError(
            f"the weights are {config.quantization}, which GGUF has no type for: "
            "give the model's float weights"
        )
    metadata = _model_metadata(config, dtype, name) | _tokenizer_metadata(config, tokenizer)
    layout = {our: Layout.of(our, shape, dtype) for our, shape in config.tensor_shapes().items()}
    with atomic_file(path) as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(layout), len(metadata)))
        file.writelines(_string(key) + _value(value) for key, value in metadata.items())
        offset = 0
        for entry in layout.values():
            file.write(entry.info(offset))
            offset += entry.n_bytes + -entry.n_bytes % ALIGNMENT
        file.write(bytes(-file.tell() % ALIGNMENT))
        for our, entry in layout.items():
            for rows in _chunks(tensors[our].T if entry.transposed else tensors[our]):
                try:
                    file.write(entry.type.encode(rows).data)
                except OverflowError:
                    raise WeightsError(
                        f"tensor {our} holds a number that is not finite in {dtype}: write F32"
                    ) from None
            file.write(bytes(-file.tell() % ALIGNMENT))


# What is where in the file


@dataclass(frozen=True)
class Type:
    """A type of tensors: its numbers in ggml and as `general.file_type`, and its blocks."""

    id: int
    file_type: int
    block: int  # numbers in a block
    size: int  # bytes of a block
    encode: Callable[[Array], Array]  # rows of float32 -> an array with the bytes


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in the file: rows are what a matrix-vector product reads, `[out, in]`."""

    name: str
    shape: tuple[int, ...]
    type: Type
    transposed: bool

    @classmethod
    def of(cls, our: str, shape: tuple[int, ...], dtype: str) -> Layout:
        """The layout of the tensor that gptx calls `our`, where matrices are of `dtype`."""
        transposed = our.startswith("h.") and len(shape) == 2
        shape = shape[::-1] if transposed else shape
        if len(shape) == 1 or our == "wpe.weight":
            dtype = "F32"
        elif shape[-1] % TYPES[dtype].block:
            dtype = "F16"
        return cls(gguf_name(our), shape, TYPES[dtype], transposed)

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        return int(np.prod(self.shape)) // self.type.block * self.type.size

    def info(self, offset: int) -> bytes:
        """Its line in the header; ggml counts dimensions from the fastest one."""
        n = len(self.shape)
        sizes = struct.pack(f"<I{n}Q", n, *reversed(self.shape))
        return _string(self.name) + sizes + struct.pack("<IQ", self.type.id, offset)


def gguf_name(our: str) -> str:
    """llama.cpp's name of a tensor: `h.3.ln_1.bias` is its `blk.3.attn_norm.bias`."""
    stem, _, leaf = our.rpartition(".")
    if not stem.startswith("h."):
        return f"{NAMES[stem]}.{leaf}"
    _, layer, stem = stem.split(".", 2)
    return f"blk.{layer}.{NAMES[stem]}.{leaf}"


def _chunks(tensor: Array) -> Iterator[Array]:
    """A tensor's rows in float32, so many at a time that they take little memory."""
    rows = np.atleast_2d(tensor)
    step = max(1, CHUNK // rows.shape[1])
    for first in range(0, len(rows), step):
        with np.errstate(over="ignore"):  # a float64 can become an infinity
            chunk = widened(np.ascontiguousarray(rows[first : first + step]))
            yield chunk.astype(np.float32, copy=False)


# Metadata


def _model_metadata(config: GPT2Config, dtype: str, name: str) -> dict[str, Any]:
    fixed = {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    for setting, value in fixed.items():
        if getattr(config, setting) != value:
            raise ConfigError(
                f"{setting} is {getattr(config, setting)!r}, llama.cpp's GPT-2 has {value!r} alone"
            )
    return {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": name,
        "gpt2.block_count": config.n_layer,
        "gpt2.context_length": config.n_positions,
        "gpt2.embedding_length": config.n_embd,
        "gpt2.feed_forward_length": config.mlp_dim,
        "gpt2.attention.head_count": config.n_head,
        "gpt2.attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "gpt2.vocab_size": config.vocab_size,
        "general.file_type": TYPES[dtype].file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
    }


def _tokenizer_metadata(config: GPT2Config, tokenizer: BytePairTokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    definition = tokenizer.definition()
    model, split = definition["model"], definition["pre_tokenizer"] or {}
    as_gpt2 = (
        model["type"] == "BPE"
        and not model.get("ignore_merges")
        and definition["normalizer"] is None
        and split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not split.get("add_prefix_space")
    )
    if not as_gpt2:
        raise TokenizerError("the tokenizer splits text otherwise than GPT-2's, which GGUF names")
    V = config.vocab_size
    found = {id: (token, NORMAL) for token, id in model["vocab"].items()}
    for added in definition["added_tokens"]:
        kind = CONTROL if added["special"] else USER_DEFINED
        found[added["id"]] = (added["content"], kind)
    if max(found) >= V:
        raise TokenizerError(f"the tokenizer has token {max(found)}, the model {V} tokens")
    entries = [found.get(id, (f"[PAD{id}]", UNUSED)) for id in range(V)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in entries],
        "tokenizer.ggml.token_type": [kind for _, kind in entries],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    }
    return {key: value for key, value in metadata.items() if value is not None}


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float | list[str] | list[int]) -> bytes:
    """A typed value of the metadata."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    kind = STRING if value and isinstance(value[0], str) else INT32
    items = (_string(x) if isinstance(x, str) else struct.pack("<i", x) for x in value)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(items)


# Types of tensors, in float32 arithmetic as in ggml-quants.c


def _f32(x: Array) -> Array:
    return x.astype("<f4", copy=False)


def _f16(x: Array) -> Array:
    with np.errstate(over="ignore"):
        y = x.astype("<f2")
    if not np.isfinite(y).all():
        raise OverflowError
    return y


def _q8_0(x: Array) -> Array:
    """32 numbers: a float16 scale, the largest magnitude / 127, and 32 signed bytes."""
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    out = np.empty((len(blocks), 34), np.uint8)
    out[:, :2] = _f16(scale).view(np.uint8)
    y = blocks * _inverse(scale)
    whole = np.trunc(y)
    whole += np.trunc((y - whole) * 2)  # halves away from zero, where NumPy's round is to even
    out[:, 2:] = whole.astype(np.int8).view(np.uint8)
    return out


def _q4_0(x: Array) -> Array:
    """32 numbers: a float16 scale and 16 bytes, byte i with number i below and i + 16 above.

    The number of the largest magnitude becomes -8, so the scale can be negative.
    """
    blocks = x.reshape(-1, 32)
    largest = np.abs(blocks).argmax(axis=1, keepdims=True)
    scale = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
    out = np.empty((len(blocks), 18), np.uint8)
    out[:, :2] = _f16(scale).view(np.uint8)
    y = (blocks * _inverse(scale) + np.float32(8.5)).astype(np.uint8)
    y = np.minimum(y, 15)
    out[:, 2:] = y[:, :16] | y[:, 16:] << 4
    return out


def _inverse(scale: Array) -> Array:
    """1 / scale, and 0 where that is too large: such a scale is 0 in float16."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


TYPES = {
    "F32": Type(id=0, file_type=0, block=1, size=4, encode=_f32),
    "F16": Type(id=1, file_type=1, block=1, size=2, encode=_f16),
    "Q8_0": Type(id=8, file_type=7, block=32, size=34, encode=_q8_0),
    "Q4_0": Type(id=2, file_type=2, block=32, size=18, encode=_q4_0),
}
