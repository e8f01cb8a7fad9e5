"""GGUF, the format of llama.cpp: a GPT-2 and its tokenizer in one file.

The names of tensors and metadata are those that llama.cpp's own converter gives them
(https://github.com/ggml-org/llama.cpp, conversion/gpt2.py, gguf-py/gguf/constants.py). What a file
is made of, see `gguf_container.py`; its types of numbers, `gguf_types.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Checkpoint, Stored, require_openai
from gptx.conversions.containers.binary import Array, cast, chunks, dtype_name
from gptx.conversions.containers.gguf import MAGIC, Container, Tensor, head, padding, shown
from gptx.conversions.containers.gguf_types import BLOCKS, FLOATS, Type
from gptx.conversions.vocabularies.token_lists import lists_of, tokenizer_of
from gptx.errors import ConfigError, ParameterError, TokenizerError, WeightsError
from gptx.files import create
from gptx.quantization import GROUP_SIZE, Quantization, QuantizedTensor
from gptx.tokenization.bpe import BytePairTokenizer

QUANTIZATION_VERSION = 2  # of ggml's block formats
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}  # llama.h, `enum llama_ftype`

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
OURS = {theirs: ours for ours, theirs in NAMES.items()}


def detect(path: Path) -> bool:
    """Whether this is a GGUF, whatever is in it."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(path: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open a file with a GPT-2: tensors of F32, F16, BF16, Q8_0 and Q4_0.

    Blocks come as the floats that they stand for. A head that is there and the same as the token
    embedding is tied: llama.cpp's converter wrote it twice for a time.

    Parameters
    ----------
    config
        In the place of what the file says.

    Raises
    ------
    ConfigError, WeightsError, TokenizerError
        The file is damaged, or holds no GPT-2 that gptx can run.
    StorageError
        It cannot be read.
    """
    container = Container(path)
    metadata = container.metadata
    architecture = container.scalar("general.architecture")
    if architecture != "gpt2":
        raise ConfigError(
            f"{path} holds a model of the architecture {shown(architecture)}, gptx reads 'gpt2'"
        )
    if container.scalar("split.count", 1) not in (0, 1):
        raise WeightsError(
            f"{path} is one of several files of a model: merge them with llama-gguf-split"
        )
    found = {_our_name(name): tensor for name, tensor in container.tensors.items()}
    for name in ("wte.weight", "wpe.weight"):
        if name not in found or len(found[name].shape) != 2:
            raise WeightsError(f"{path} has no matrix {gguf_name(name)}: this is no whole GPT-2")
    if "lm_head.weight" in found and _same(container, found["lm_head.weight"], found["wte.weight"]):
        del found["lm_head.weight"]
    tokenizer = _tokenizer(path, container, found["wte.weight"].shape[0])
    if config is None:
        config = _config(path, metadata, found)
    stored = {name: _stored(container, name, tensor) for name, tensor in found.items()}
    return Checkpoint(replace(config, quantization=None), stored, tokenizer)


def _our_name(theirs: str) -> str:
    """gptx's name of a tensor; llama.cpp's, if it is none of a GPT-2."""
    match = re.fullmatch(r"(?:blk\.(\d{1,5})\.)?(\w+)\.(weight|bias)", theirs)
    if match is None or match[2] not in OURS:
        return theirs
    stem = OURS[match[2]]
    return f"h.{match[1]}.{stem}.{match[3]}" if match[1] else f"{stem}.{match[3]}"


def _config(path: Path, metadata: Mapping[str, Any], found: Mapping[str, Tensor]) -> GPT2Config:
    def number(key: str, kind: type = int) -> Any:
        value = metadata.get(f"gpt2.{key}")
        if not isinstance(value, kind):
            raise ConfigError(f"{path}: gpt2.{key} is {shown(value)}, expected a number")
        return value

    L, C, M = map(number, ("block_count", "embedding_length", "feed_forward_length"))
    if len(found) < 12 * L:  # before names are made of that number
        raise WeightsError(
            f"{path}: gpt2.block_count is {L}, expected {len(found) // 12} by the tensors there"
        )
    try:
        return GPT2Config(
            vocab_size=found["wte.weight"].shape[0],
            n_positions=number("context_length"),
            n_embd=C,
            n_layer=L,
            n_head=number("attention.head_count"),
            n_inner=None if M == 4 * C else M,
            layer_norm_epsilon=number("attention.layer_norm_epsilon", float),
            tie_word_embeddings="lm_head.weight" not in found,
            bos_token_id=_id(metadata, "bos"),
            eos_token_id=_id(metadata, "eos"),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _id(metadata: Mapping[str, Any], which: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{which}_token_id")
    return value if isinstance(value, int) else None


def _tokenizer(path: Path, container: Container, V: int) -> BytePairTokenizer | None:
    model, split = (container.scalar(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model in (None, "none", "no_vocab"):
        return None
    if model != "gpt2" or split not in (None, "gpt-2"):
        raise TokenizerError(
            f"{path} has a tokenizer of the kind {shown(model)}, {shown(split)}, gptx reads "
            "'gpt2', 'gpt-2'"
        )
    metadata = container.metadata
    tokens, merges = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    kinds = metadata.get("tokenizer.ggml.token_type", np.empty(0, np.int32))
    if not (
        isinstance(tokens, list) and isinstance(merges, list) and isinstance(kinds, np.ndarray)
    ):
        raise TokenizerError(f"{path} has a tokenizer without its lists of tokens and merges")
    if len(tokens) != V:
        raise TokenizerError(f"{path} has {len(tokens)} tokens, but an embedding of {V}")
    return tokenizer_of(tokens, merges, kinds.tolist(), str(path))


def _same(container: Container, a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, byte by byte."""
    if (a.type, a.shape) != (b.type, b.shape):
        return False
    step = 2**20
    for first in range(0, a.n_bytes, step):
        n = min(step, a.n_bytes - first)
        one, other = (container.file.read(x.offset + first, n, x.name) for x in (a, b))
        if one != other:
            return False
    return True


def _is_transposed(our: str, shape: tuple[int, ...]) -> bool:
    """Whether a matrix lies `[out, in]` in the file, whose rows are what a product reads."""
    return our.startswith("h.") and len(shape) == 2


def _stored(container: Container, our: str, tensor: Tensor) -> Stored:
    transposed = _is_transposed(our, tensor.shape)

    def read() -> Array:
        array = container.read(tensor)
        return array.T if transposed else array

    shape = tensor.shape[::-1] if transposed else tensor.shape
    return Stored(shape, tensor.type.dtype, read)


# Writing


def write(
    checkpoint: Checkpoint,
    path: Path,
    *,
    dtype: str | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Write a model as llama.cpp reads it, a million numbers at a time.

    Parameters
    ----------
    dtype
        Type of the matrices, "float32", "float16" or "bfloat16"; None leaves each as it is. As in
        llama.cpp, biases, norms and positions are F32 whatever it is.
    quantization
        Q8_0 for int8, Q4_0 for int4. A matrix whose rows are not whole blocks of 32 is of `dtype`
        or F16. In a Q4_0 file the token embedding is Q4_0, too: `llama-quantize --pure` does that,
        and without `--pure` makes it Q6_K, which is larger.

    Raises
    ------
    ParameterError
        The weights that share a scale are 32 in GGUF, and another number was asked for.
    ConfigError, TokenizerError
        llama.cpp would compute something else, or split text in another way.
    WeightsError
        A number is too large for the type, or is none.
    """
    require_openai(
        checkpoint.config, "llama.cpp", "n_inner", "layer_norm_epsilon", "tie_word_embeddings"
    )
    blocks = _blocks(quantization)
    layout = {
        our: _Layout.of(our, tensor, dtype, blocks) for our, tensor in checkpoint.stored.items()
    }
    tables = layout["wte.weight"].line.type.name
    metadata = _model_metadata(checkpoint.config, FILE_TYPES[tables])
    metadata |= _tokenizer_metadata(checkpoint.config, checkpoint.tokenizer)
    with create(path) as file:
        file.write(head(metadata, (entry.line for entry in layout.values())))
        for our, entry in layout.items():
            tensor = checkpoint.stored[our].read()
            assert not isinstance(tensor, QuantizedTensor), "as_floats() comes first"
            for rows in chunks(tensor.T if entry.transposed else tensor):
                file.write(entry.encode(rows, f"tensor {our}").data)
            file.write(padding(entry.line.n_bytes))


def _blocks(quantization: Quantization | None) -> Type | None:
    if quantization is None:
        return None
    kind = BLOCKS[quantization.bits]
    if quantization.group_size not in (kind.block, GROUP_SIZE):  # which is what stands for "any"
        raise ParameterError(
            f"group_size is {quantization.group_size}, but in GGUF {kind.block} weights share a "
            "scale: leave it out"
        )
    return kind


@dataclass(frozen=True)
class _Layout:
    """How a tensor lies in the file."""

    line: Tensor
    transposed: bool

    @classmethod
    def of(cls, our: str, tensor: Stored, dtype: str | None, blocks: Type | None) -> _Layout:
        transposed = _is_transposed(our, tensor.shape)
        shape = tensor.shape[::-1] if transposed else tensor.shape
        if len(shape) == 1 or our == "wpe.weight":
            kind = FLOATS["float32"]
        elif blocks is None:
            kind = FLOATS[dtype or dtype_name(tensor.dtype)]
        else:
            kind = FLOATS[dtype or "float16"] if shape[-1] % blocks.block else blocks
        return cls(Tensor(gguf_name(our), shape, kind), transposed)

    def encode(self, rows: Array, what: str) -> Array:
        """Rows of any float type as the bytes of the file."""
        kind = self.line.type
        assert kind.encode is not None, "a type of floats or blocks"
        return kind.encode(rows if kind.decode is None else cast(rows, "float32", what), what)


def gguf_name(our: str) -> str:
    """llama.cpp's name of a tensor: `h.3.ln_1.bias` is its `blk.3.attn_norm.bias`."""
    stem, _, leaf = our.rpartition(".")
    if not stem.startswith("h."):
        return f"{NAMES[stem]}.{leaf}"
    _, layer, stem = stem.split(".", 2)
    return f"blk.{layer}.{NAMES[stem]}.{leaf}"


def _model_metadata(config: GPT2Config, file_type: int) -> dict[str, Any]:
    ids = {"bos": config.bos_token_id, "eos": config.eos_token_id}
    for which, id in ids.items():
        if id is not None and not 0 <= id < 2**32:
            raise ConfigError(f"{which}_token_id is {id}, expected a token id or null")
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
    } | {f"tokenizer.ggml.{key}_token_id": id for key, id in ids.items() if id is not None}


def _tokenizer_metadata(config: GPT2Config, tokenizer: BytePairTokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}  # good for token ids alone
    tokens, kinds, merges = lists_of(tokenizer, config.vocab_size, "llama.cpp")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }
