"""GGUF, the format of llama.cpp: a GPT-2 and its tokenizer in one file.

The names of tensors and metadata are those of llama.cpp's converter
(https://github.com/ggml-org/llama.cpp, conversion/gpt2.py, gguf-py/gguf/constants.py).
`containers/gguf.py` reads and writes the file, `containers/gguf_types.py` has its types of numbers,
and `gguf_tokenizer.py` has the metadata of the tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import (
    Checkpoint,
    StoredTensor,
    require_openai_settings,
    stored_array,
    unquantized,
)
from gptx.conversions.containers.binary import Array, cast, dtype_name, row_chunks
from gptx.conversions.containers.gguf import (
    LEGACY_MAGICS,
    MAGIC,
    GgufFile,
    TensorInfo,
    describe_value,
    encode_header,
    padding,
)
from gptx.conversions.containers.gguf_types import FLOAT_TYPES, QUANTIZED_TYPES, TensorType
from gptx.conversions.formats.gguf_tokenizer import (
    end_of_text_ids,
    read_tokenizer,
    tokenizer_metadata,
)
from gptx.errors import ConfigError, ParameterError, WeightsError, argument
from gptx.files import create
from gptx.quantization import GROUP_SIZE, Quantization
from gptx.stored_weights import HEAD, POSITIONS, TABLE, have_same_numbers, settle_head

QUANTIZATION_VERSION = 2  # of ggml's block types
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}  # llama.h, `enum llama_ftype`

# gptx's names -> llama.cpp's. Layer 3 has the prefix `h.3.` in gptx, `blk.3.` in llama.cpp.
GGUF_NAMES = {
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
GPTX_NAMES = {gguf: gptx for gptx, gguf in GGUF_NAMES.items()}


def detect(path: Path) -> bool:
    """Test for a GGUF of any content, or a file of ggml before GGUF."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) in (MAGIC, *LEGACY_MAGICS)
    except OSError:
        return False


def read(path: Path, config: GPT2Config | None = None, ignore_unknown: bool = False) -> Checkpoint:
    """Open a file with a GPT-2: tensors of floats, or of blocks of `gguf_types.BLOCK_TYPES`.

    Floats are mapped into memory, blocks are decoded to float32. A head that equals the token
    embedding is tied: llama.cpp's converter wrote it as a duplicate for a time.

    Parameters
    ----------
    config
        Settings that replace those of the file.

    Raises
    ------
    ConfigError, WeightsError, TokenizerError
        The file is damaged, or the model is not a GPT-2 that gptx supports.
    StorageError
        The file cannot be read.
    """
    file = GgufFile(path)
    _require_model(file)
    tensors = {_gptx_name(name): tensor for name, tensor in file.tensors.items()}
    if len(tensors) < len(file.tensors):
        raise WeightsError(f"{path} has a tensor under the names of llama.cpp and of the Hub")
    found, config, notes = settle_head(tensors, config, partial(_is_same, file))
    for name in (TABLE, POSITIONS):
        if name not in found or len(found[name].shape) != 2:
            raise WeightsError(
                f"{path} is not a complete GPT-2: the matrix {gguf_name(name)} is missing"
            )
    tokenizer = read_tokenizer(file, found[TABLE].shape[0])
    if config is None:
        config = _config(path, file.metadata, found)
    stored = {name: _stored(file, name, tensor) for name, tensor in found.items()}
    config = replace(config, quantization=None)
    return Checkpoint(config, stored, tokenizer, notes, ignore_unknown=ignore_unknown)


def _require_model(file: GgufFile) -> None:
    """Raise an error for a GGUF with something else than all of a GPT-2."""
    path = file.file.path
    if (n_parts := file.scalar("split.count", 1)) not in (0, 1):
        raise WeightsError(
            f"{path} is one of {describe_value(n_parts)} parts of a split model: merge them with "
            "llama-gguf-split --merge"
        )
    architecture, kind = (file.scalar(f"general.{key}") for key in ("architecture", "type"))
    if kind == "adapter":
        raise WeightsError(
            f"{path} is an adapter ({describe_value(file.scalar('adapter.type'))}), not a model: "
            "merge it into its model with llama-export-lora"
        )
    if kind not in (None, "model"):
        raise WeightsError(
            f"{path} is a GGUF of the type {describe_value(kind)}, expected 'model': give the GGUF "
            "of the language model"
        )
    if architecture != "gpt2":
        raise ConfigError(
            f"{path} has the architecture {describe_value(architecture)}, expected 'gpt2'"
        )
    if not file.tensors:
        content = "a vocabulary" if "tokenizer.ggml.tokens" in file.metadata else "metadata"
        raise WeightsError(
            f"{path} has {content} and no tensors: it is no model, give a GGUF with weights"
        )


def _gptx_name(name: str) -> str:
    """Return gptx's name of a tensor, or `name` if a GPT-2 has no such tensor."""
    match = re.fullmatch(r"(?:blk\.(\d{1,5})\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in GPTX_NAMES:
        return name
    stem = GPTX_NAMES[match[2]]
    return f"h.{match[1]}.{stem}.{match[3]}" if match[1] else f"{stem}.{match[3]}"


def _config(path: Path, metadata: Mapping[str, Any], found: Mapping[str, TensorInfo]) -> GPT2Config:
    def number(key: str, kind: type = int) -> Any:
        value = metadata.get(f"gpt2.{key}")
        if not isinstance(value, kind):
            raise ConfigError(f"{path}: gpt2.{key} is {describe_value(value)}, expected a number")
        return value

    L, C, M = map(number, ("block_count", "embedding_length", "feed_forward_length"))
    if len(found) < 12 * L:  # limits the list of names that follows from it
        raise WeightsError(
            f"{path}: gpt2.block_count is {L}, expected {len(found) // 12} by its tensors"
        )
    try:
        return GPT2Config(
            vocab_size=found[TABLE].shape[0],
            n_positions=number("context_length"),
            n_embd=C,
            n_layer=L,
            n_head=number("attention.head_count"),
            n_inner=None if M == 4 * C else M,
            layer_norm_epsilon=number("attention.layer_norm_epsilon", float),
            tie_word_embeddings=HEAD not in found,
            **end_of_text_ids(metadata, found[TABLE].shape[0]),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _is_same(file: GgufFile, a: TensorInfo, b: TensorInfo) -> bool:
    """Return True if two tensors have the same shape and numbers."""
    read = file.read_raw if a.type == b.type else file.read
    return a.shape == b.shape and have_same_numbers(read(a), read(b))


def _is_transposed(name: str, shape: tuple[int, ...]) -> bool:
    """Test for a matrix that the file stores as `[out, in]`."""
    return name.startswith("h.") and len(shape) == 2


def _stored(file: GgufFile, name: str, tensor: TensorInfo) -> StoredTensor:
    stored = stored_array(
        partial(file.read, tensor),
        tensor.shape,
        tensor.type.dtype,
        transposed=_is_transposed(name, tensor.shape),
    )
    return replace(stored, file_type=tensor.type.name if tensor.type.decoder else None)


# Writing


def write(
    checkpoint: Checkpoint,
    path: Path,
    *,
    dtype: str | None = None,
    quantization: Quantization | None = None,
) -> tuple[str, ...]:
    """Write a model for llama.cpp, in chunks of a million numbers.

    Parameters
    ----------
    dtype
        Type of the matrices, "float32", "float16" or "bfloat16"; None keeps the type of each. As
        in llama.cpp, biases, norms and positions are F32.
    quantization
        Q8_0 for int8, Q4_0 for int4. A matrix whose rows do not divide into blocks of 32 gets
        `dtype` or F16. A Q4_0 file also has a Q4_0 token embedding, as from `llama-quantize
        --pure`; without `--pure`, llama-quantize makes it Q6_K, which is larger.

    Returns
    -------
    tuple
        Differences of the model in llama.cpp, one sentence each.

    Raises
    ------
    ParameterError
        The group size is neither GGUF's 32 nor the default.
    ConfigError, TokenizerError
        llama.cpp would compute something else, or split text differently.
    WeightsError
        A number is too large for the type, or not finite.
    """
    require_openai_settings(
        checkpoint.config, "llama.cpp", "n_inner", "layer_norm_epsilon", "tie_word_embeddings"
    )
    block_type = _block_type(quantization)
    layout = {
        name: _Layout.of(name, tensor, dtype, block_type)
        for name, tensor in checkpoint.stored.items()
    }
    table_type = layout[TABLE].info.type.name
    metadata = _model_metadata(checkpoint.config, FILE_TYPES[table_type])
    tokenizer, notes = tokenizer_metadata(checkpoint.config, checkpoint.tokenizer)
    metadata |= tokenizer
    with create(path) as file:
        file.write(encode_header(metadata, (entry.info for entry in layout.values())))
        for name, entry in layout.items():
            array = unquantized(checkpoint.tensors[name])
            for rows in row_chunks(array.T if entry.transposed else array):
                file.write(entry.encode(rows, f"tensor {name}").data)
            file.write(padding(entry.info.n_bytes))
    return notes


def _block_type(quantization: Quantization | None) -> TensorType | None:
    if quantization is None:
        return None
    kind = QUANTIZED_TYPES[quantization.bits]
    if quantization.group_size not in (kind.block_numbers, GROUP_SIZE):  # the default means any
        raise ParameterError(
            f"{argument('group_size')} is {quantization.group_size}, expected "
            f"{kind.block_numbers}, GGUF's: leave it out"
        )
    return kind


@dataclass(frozen=True)
class _Layout:
    """The form of a tensor in the file to be written."""

    info: TensorInfo
    transposed: bool

    @classmethod
    def of(
        cls, name: str, tensor: StoredTensor, dtype: str | None, block_type: TensorType | None
    ) -> _Layout:
        transposed = _is_transposed(name, tensor.shape)
        shape = tensor.shape[::-1] if transposed else tensor.shape
        if len(shape) == 1 or name == POSITIONS:
            kind = FLOAT_TYPES["float32"]
        elif block_type is None:
            kind = FLOAT_TYPES[dtype or dtype_name(tensor.dtype)]
        elif shape[-1] % block_type.block_numbers:
            kind = FLOAT_TYPES[dtype or "float16"]
        else:
            kind = block_type
        return cls(TensorInfo(gguf_name(name), shape, kind), transposed)

    def encode(self, rows: Array, label: str) -> Array:
        """Encode rows of any float type to the data of the file."""
        kind = self.info.type
        assert kind.encode is not None, "a type of floats or blocks"
        return kind.encode(rows if kind.decoder is None else cast(rows, "float32", label), label)


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor: `blk.3.attn_norm.bias` for `h.3.ln_1.bias`."""
    stem, _, leaf = name.rpartition(".")
    if not stem.startswith("h."):
        return f"{GGUF_NAMES[stem]}.{leaf}"
    _, layer, stem = stem.split(".", 2)
    return f"blk.{layer}.{GGUF_NAMES[stem]}.{leaf}"


def _model_metadata(config: GPT2Config, file_type: int) -> dict[str, Any]:
    return {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": "gpt2",
        "gpt2.block_count": config.n_layer,
        "gpt2.context_length": config.n_positions,
        "gpt2.embedding_length": config.n_embd,
        "gpt2.feed_forward_length": config.mlp_dim,
        "gpt2.attention.head_count": config.n_head,
        "gpt2.attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "gpt2.vocab_size": config.vocab_size,
        "general.file_type": file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
    }
