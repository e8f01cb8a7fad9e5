"""fastGPT (https://github.com/certik/fastGPT), GPT-2 in Fortran: its model.gguf.

The data are twelve integers; the tensors, those of one kind together for all layers, in the Hub's
layout; and the tokenizer: tokens, merges, and the letter of each byte, as strings with their
offsets (`create_model.py` writes them, `load_model` in `driver.f90` reads them).

Since March 2024 (version 2) these are the tensors of a GGUF. Its only key is the offset of the
data; it has none of llama.cpp's names, and the program skips the list of tensors.
`fastgpt_dat.py` has the format before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import (
    Checkpoint,
    StoredTensor,
    end_of_text_ids,
    float_array,
    require_openai_settings,
)
from gptx.conversions.containers.binary import Array, BinaryFile, write_array
from gptx.conversions.containers.gguf import (
    MAGIC,
    GgufFile,
    TensorInfo,
    encode_header,
    padding,
)
from gptx.conversions.containers.gguf_types import FLOAT_TYPES, INTEGER_TYPES
from gptx.conversions.vocabularies.token_lists import token_lists, tokenizer_from_lists
from gptx.errors import ConfigError, TokenizerError, WeightsError
from gptx.files import create
from gptx.tokenization.byte_level import byte_of_letter
from gptx.tokenization.pipeline import PipelineTokenizer

MARK = 0xFA51697  # looks like "fastGPT"
OFFSET_KEY = "general.data_offset"
N_BYTE_LETTERS = 256

# fastGPT's names -> gptx's, in the order of the file. A name with {} is one tensor of all layers.
NAMES = {
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "mlp_fc_w": "h.{}.mlp.c_fc.weight",
    "mlp_fc_b": "h.{}.mlp.c_fc.bias",
    "mlp_proj_w": "h.{}.mlp.c_proj.weight",
    "mlp_proj_b": "h.{}.mlp.c_proj.bias",
    "attn_w": "h.{}.attn.c_attn.weight",
    "attn_b": "h.{}.attn.c_attn.bias",
    "attn_proj_w": "h.{}.attn.c_proj.weight",
    "attn_proj_b": "h.{}.attn.c_proj.bias",
    "ln1_b": "h.{}.ln_1.bias",
    "ln1_g": "h.{}.ln_1.weight",
    "ln2_b": "h.{}.ln_2.bias",
    "ln2_g": "h.{}.ln_2.weight",
    "lnf_b": "ln_f.bias",
    "lnf_g": "ln_f.weight",
}


@dataclass(frozen=True)
class Header:
    """The integers at the start of the data, after the mark and the version.

    `n_tokens` and `n_merges` count offsets, one more than strings. The last offset is the end.
    `n_token_text` and `n_merge_text` are sizes in bytes.
    """

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_layer: int
    n_head: int
    n_tokens: int
    n_token_text: int
    n_merges: int
    n_merge_text: int
    n_byte_letters: int

    def is_plausible(self) -> bool:
        """Test for sizes that a model can have."""
        sizes = self.n_vocab, self.n_ctx, self.n_embd, self.n_layer, self.n_head
        texts = self.n_tokens, self.n_token_text, self.n_merges, self.n_merge_text
        return min(sizes) > 0 and min(texts) >= 0 and self.n_byte_letters == N_BYTE_LETTERS

    def integers(self, *first: int) -> Array:
        """Return the header as in the file, after `first`: the mark and the version."""
        return np.array([*first, *astuple(self)], "<i4")

    def parts(self) -> list[TensorInfo]:
        """Return everything after the header, in order."""
        V, S, C, L = self.n_vocab, self.n_ctx, self.n_embd, self.n_layer
        shapes = GPT2Config(V, S, C, n_layer=1, n_head=1).tensor_shapes()
        parts = []
        for name, gptx_name in NAMES.items():
            shape = shapes[gptx_name.format(0)]
            shape = (L, *shape) if "{}" in gptx_name else shape
            parts.append(TensorInfo(name, shape, FLOAT_TYPES["float32"]))
        int8, int32 = INTEGER_TYPES["int8"], INTEGER_TYPES["int32"]
        return [
            *parts,
            TensorInfo("idx", (self.n_tokens,), int32),
            TensorInfo("decoder_txt", (self.n_token_text,), int8),
            TensorInfo("vocab_idx", (self.n_merges,), int32),
            TensorInfo("vocab_txt", (self.n_merge_text,), int8),
            TensorInfo("byte_decoder", (self.n_byte_letters,), int32),
        ]


def detect(path: Path) -> bool:
    """Test for a GGUF of fastGPT, not of llama.cpp."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:
        return False
    return start.startswith(MAGIC) and start[32:].startswith(OFFSET_KEY.encode())


def read(path: Path, config: GPT2Config | None = None, ignore_unknown: bool = False) -> Checkpoint:
    """Open a file of version 2.

    Parameters
    ----------
    config
        Settings that replace those of the file.

    Raises
    ------
    ConfigError, WeightsError, TokenizerError
        The file is damaged.
    StorageError
        The file cannot be read.
    """
    file = GgufFile(path)
    found = dict(file.tensors)
    info = found.pop("header", None)
    if info is None or (info.shape, info.type) != ((12,), INTEGER_TYPES["int32"]):
        raise WeightsError(
            f"{path} is damaged: its header of 12 integers is missing: fetch it again"
        )
    mark, version, *numbers = file.read(info).tolist()
    check_version(path, mark, version, 2)
    offset = file.scalar(OFFSET_KEY) if set(file.metadata) == {OFFSET_KEY} else None
    if offset != info.offset or next(iter(file.tensors)) != "header":
        raise WeightsError(
            f"{path} is damaged: {OFFSET_KEY} is not the offset of the header: fetch it again"
        )
    header = check_header(path, numbers)
    for part in header.parts():
        tensor = found.pop(part.name, None)
        if tensor is None or replace(tensor, offset=0) != part:
            raise WeightsError(f"{path}: tensor {part.name} is missing or does not fit the header")
    if found:
        raise WeightsError(f"{path}: tensor {next(iter(found))} is unknown")
    return make_checkpoint(file.file, header, file.tensors, config, ignore_unknown)


def check_version(path: Path, mark: int, version: int, expected: int) -> None:
    """Raise WeightsError for another mark than fastGPT's, or another version than `expected`."""
    if (mark, version) != (MARK, expected):
        raise WeightsError(
            f"{path} has the mark {mark:#x} and version {version}, expected {MARK:#x} (fastGPT's) "
            f"and {expected}: fetch it again"
        )


def check_header(path: Path, numbers: Sequence[int]) -> Header:
    """Make a header of integers; raise ConfigError if they are implausible."""
    header = Header(*numbers)
    if not header.is_plausible():
        raise ConfigError(f"{path} is damaged: its header is {list(numbers)}: fetch it again")
    return header


def make_checkpoint(
    file: BinaryFile,
    header: Header,
    parts: Mapping[str, TensorInfo],
    config: GPT2Config | None,
    ignore_unknown: bool,
) -> Checkpoint:
    """Make the model of a file after a check of the positions of its parts."""
    tokenizer = _tokenizer(file, header, parts)
    if config is None:
        config = GPT2Config(
            vocab_size=header.n_vocab,
            n_positions=header.n_ctx,
            n_embd=header.n_embd,
            n_layer=header.n_layer,
            n_head=header.n_head,
            **end_of_text_ids(header.n_vocab, tokenizer),
        )
    stored = dict(_stored(file, header, parts))
    config = replace(config, quantization=None)
    return Checkpoint(config, stored, tokenizer, ignore_unknown=ignore_unknown)


def _stored(
    file: BinaryFile, header: Header, parts: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield gptx's tensors, one for each layer of a part."""
    for part_name in NAMES:
        part = parts[part_name]
        names = _gptx_names(part_name, header.n_layer)
        shape = part.shape[1:] if "{}" in NAMES[part_name] else part.shape
        n_bytes = math.prod(shape) * part.type.block_bytes
        for i, name in enumerate(names):
            offset = part.offset + i * n_bytes
            read_tensor = partial(file.map, offset, shape, part.type.dtype, f"tensor {name}")
            yield name, StoredTensor(shape, part.type.dtype, read_tensor)


# The tokenizer


def _tokenizer(
    file: BinaryFile, header: Header, parts: Mapping[str, TensorInfo]
) -> PipelineTokenizer | None:
    """Make the tokenizer; None if the file has no tokens."""

    def array(name: str) -> Array:
        part = parts[name]
        return file.array(part.offset, part.shape, part.type.dtype, name)

    tokens = _split_strings(file, array("idx"), array("decoder_txt"))
    merges = _split_strings(file, array("vocab_idx"), array("vocab_txt"))
    if (array("byte_decoder") != _byte_letters()).any():
        raise TokenizerError(f"{file.path} is damaged: its byte_decoder is not GPT-2's")
    if not tokens:
        return None
    if len(tokens) > header.n_vocab:
        raise TokenizerError(
            f"{file.path} has {len(tokens)} tokens, expected {header.n_vocab} by its embedding"
        )
    return tokenizer_from_lists(tokens, merges, (), str(file.path))


def _split_strings(file: BinaryFile, offsets: Array, text: Array) -> list[str]:
    """Split a text into strings at these offsets; empty ones at the end are fillers."""
    data = text.tobytes()
    ends = offsets.tolist()
    if ends[:1] != [0] or ends[-1] != len(data) or any(a > b for a, b in pairwise(ends)):
        raise TokenizerError(f"{file.path} is damaged: the offsets of its strings are not in order")
    try:
        found = [data[first:end].decode() for first, end in pairwise(ends)]
    except UnicodeDecodeError:
        raise TokenizerError(f"{file.path} is damaged: a token is not UTF-8") from None
    while found and not found[-1]:
        found.pop()
    return found


def _join_strings(strings: Sequence[str]) -> tuple[Array, Array]:
    """Return the offsets of strings, with the end of the last one, and one text.

    The program skips 32 bytes of padding even if the offsets of version 2 need none (`align_i4`).
    One more empty string avoids that case.
    """
    data = [string.encode() for string in strings]
    if (len(data) + 1) % 8 == 0:
        data.append(b"")
    offsets = np.cumsum([0, *map(len, data)], dtype=np.int64).astype("<i4")
    return offsets, np.frombuffer(b"".join(data), np.int8)


def _byte_letters() -> Array:
    """Return the code point of the letter of each byte in GPT-2's tokenizer."""
    letters = np.zeros(N_BYTE_LETTERS, "<i4")
    for letter, byte in byte_of_letter().items():
        letters[byte] = ord(letter)
    return letters


# Writing


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write version 2; the program expects the file name model.gguf.

    Without a tokenizer in `checkpoint` the file has no tokens. gptx reads it, but the program
    cannot encode its prompt.

    Raises
    ------
    ConfigError, TokenizerError
        fastGPT would compute something else, or split text differently.
    """
    header, texts = make_header_and_texts(checkpoint)
    parts = header.parts()
    if odd := [part for part in parts if part.name in NAMES and padding(part.n_bytes)]:
        raise ConfigError(
            f"n_embd is {header.n_embd}, expected a multiple of 8: fastGPT does not skip the "
            f"padding that GGUF needs after {odd[0].name}"
        )
    infos = [TensorInfo("header", (12,), INTEGER_TYPES["int32"]), *parts]
    start = len(encode_header({OFFSET_KEY: np.int32(0)}, infos))
    with create(path) as file:
        file.write(encode_header({OFFSET_KEY: np.int32(start)}, infos))
        _write_padded(file, header.integers(MARK, 2))
        write_tensors(file, checkpoint)
        for text in texts:
            _write_padded(file, text)


def _write_padded(file: BinaryIO, array: Array) -> None:
    file.write(array.data)
    file.write(padding(array.nbytes))


def make_header_and_texts(checkpoint: Checkpoint) -> tuple[Header, list[Array]]:
    """Return the header of a model and the arrays after its tensors; see `write` for errors."""
    config = checkpoint.config
    require_openai_settings(config, "fastGPT")
    tokens: list[str] = []
    merges: list[str] = []
    if checkpoint.tokenizer is not None:
        tokens, _, merges = token_lists(checkpoint.tokenizer, config.vocab_size, "fastGPT")
        merges = [*merges, ""]  # create_model.py has it from the last newline of vocab.bpe
        letters = byte_of_letter().keys()
        if unsupported := [token for token in tokens if not letters >= set(token)]:
            raise TokenizerError(
                f"the tokenizer has the token {unsupported[0][:64]!r}, which is not byte-level "
                "BPE: fastGPT does not support it"
            )
    texts = [*_join_strings(tokens), *_join_strings(merges), _byte_letters()]
    sizes = config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_head
    return Header(*sizes, *map(len, texts)), texts


def write_tensors(file: BinaryIO, checkpoint: Checkpoint) -> None:
    """Append all tensors of the model; those of one kind together, layer by layer."""
    for part_name in NAMES:
        for name in _gptx_names(part_name, checkpoint.config.n_layer):
            write_array(file, float_array(checkpoint.tensors[name]), "float32", f"tensor {name}")


def _gptx_names(part_name: str, n_layer: int) -> list[str]:
    """Return gptx's names of the tensors in one part of the file."""
    name = NAMES[part_name]
    return [name.format(i) for i in range(n_layer)] if "{}" in name else [name]
