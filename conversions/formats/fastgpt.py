"""fastGPT (https://github.com/certik/fastGPT), GPT-2 in Fortran: its model.gguf.

Twelve integers, then every kind of a layer's tensors in one piece, all layers of it, as they are in
the Hub's files; and then the tokenizer: tokens, merges, and the letter of each byte, strings with
the places where each begins (`create_model.py` writes it, `load_model` in `driver.f90` reads it).

Since March 2024 (version 2) all of this is the tensors of a GGUF. Its one key says where the data
begin; it has nothing that llama.cpp knows, and the program goes through the data without looking at
the list of tensors. What was before, see `fastgpt_dat.py`.
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
    Stored,
    end_of_text,
    float_array,
    require_openai,
)
from gptx.conversions.containers.binary import Array, BinaryFile, write_array
from gptx.conversions.containers.gguf import MAGIC, Container, Tensor, head, padding
from gptx.conversions.containers.gguf_types import FLOATS, INTEGERS
from gptx.conversions.vocabularies.token_lists import lists_of, tokenizer_of
from gptx.errors import ConfigError, TokenizerError, WeightsError
from gptx.files import create
from gptx.tokenization.bpe import BytePairTokenizer, byte_of_letter

MARK = 0xFA51697  # reads "fastGPT"
KEY = "general.data_offset"
N_BYTES = 256  # letters of the bytes

# Their names -> ours, of every layer where that has a {}; in the order of the file.
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
    """The integers at the beginning, after the mark and the version.

    `n_tokens` and `n_merges` are one more than there are: the places of the end, too.
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
    n_bytes: int

    def is_plausible(self) -> bool:
        """Whether these can be a model's sizes."""
        sizes = self.n_vocab, self.n_ctx, self.n_embd, self.n_layer, self.n_head
        texts = self.n_tokens, self.n_token_text, self.n_merges, self.n_merge_text
        return min(sizes) > 0 and min(texts) >= 0 and self.n_bytes == N_BYTES

    def integers(self, *first: int) -> Array:
        """As they lie in the file, after the mark and the version."""
        return np.array([*first, *astuple(self)], "<i4")

    def parts(self) -> list[Tensor]:
        """Everything behind the header, in order."""
        V, S, C, L = self.n_vocab, self.n_ctx, self.n_embd, self.n_layer
        # The model's tensors of one layer are those of any.
        shapes = GPT2Config(V, S, C, n_layer=1, n_head=1).tensor_shapes()
        parts = []
        for theirs, ours in NAMES.items():
            shape = shapes[ours.format(0)]
            shape = (L, *shape) if "{}" in ours else shape
            parts.append(Tensor(theirs, shape, FLOATS["float32"]))
        int8, int32 = INTEGERS["int8"], INTEGERS["int32"]
        return [
            *parts,
            Tensor("idx", (self.n_tokens,), int32),
            Tensor("decoder_txt", (self.n_token_text,), int8),
            Tensor("vocab_idx", (self.n_merges,), int32),
            Tensor("vocab_txt", (self.n_merge_text,), int8),
            Tensor("byte_decoder", (self.n_bytes,), int32),
        ]


def detect(path: Path) -> bool:
    """Whether this is a GGUF of fastGPT's and not one of llama.cpp's."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:
        return False
    return start.startswith(MAGIC) and start[32:].startswith(KEY.encode())


def read(path: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open a file of version 2.

    Parameters
    ----------
    config
        In the place of what the file says.

    Raises
    ------
    ConfigError, WeightsError, TokenizerError
        The file is damaged.
    StorageError
        It cannot be read.
    """
    container = Container(path)
    found = dict(container.tensors)
    line = found.pop("header", None)
    if line is None or (line.shape, line.type) != ((12,), INTEGERS["int32"]):
        raise WeightsError(f"{path} has no header of 12 integers: it is damaged")
    mark, version, *numbers = container.read(line).tolist()
    check_version(path, mark, version, 2)
    place = container.scalar(KEY) if set(container.metadata) == {KEY} else None
    if place != line.offset or next(iter(container.tensors)) != "header":
        raise WeightsError(f"{path} is damaged: {KEY} is not where the header lies")
    header = checked(path, numbers)
    for part in header.parts():
        tensor = found.pop(part.name, None)
        if tensor is None or replace(tensor, offset=0) != part:
            raise WeightsError(f"{path}: tensor {part.name} is missing or does not fit the header")
    if found:
        raise WeightsError(f"{path}: tensor {next(iter(found))} is unknown")
    return checkpoint_of(container.file, header, container.tensors, config)


def check_version(path: Path, mark: int, version: int, expected: int) -> None:
    """Raise WeightsError unless the mark is fastGPT's and the version is the one of the format."""
    if (mark, version) != (MARK, expected):
        raise WeightsError(
            f"{path} has the mark {mark:#x} and version {version}, expected fastGPT's {MARK:#x} "
            f"and {expected}: fetch it again"
        )


def checked(path: Path, numbers: Sequence[int]) -> Header:
    """The header that these integers are; raises ConfigError if they are none."""
    header = Header(*numbers)
    if not header.is_plausible():
        raise ConfigError(f"{path} is damaged: its header is {list(numbers)}")
    return header


def checkpoint_of(
    file: BinaryFile, header: Header, parts: Mapping[str, Tensor], config: GPT2Config | None
) -> Checkpoint:
    """The model of a file whose parts are known to lie in it."""
    tokenizer = _tokenizer(file, header, parts)
    if config is None:
        config = GPT2Config(
            vocab_size=header.n_vocab,
            n_positions=header.n_ctx,
            n_embd=header.n_embd,
            n_layer=header.n_layer,
            n_head=header.n_head,
            **end_of_text(header.n_vocab, tokenizer),
        )
    stored = dict(_stored(file, header, parts))
    return Checkpoint(replace(config, quantization=None), stored, tokenizer)


def _stored(
    file: BinaryFile, header: Header, parts: Mapping[str, Tensor]
) -> Iterator[tuple[str, Stored]]:
    """Our tensors, those of a layer each for itself."""
    for theirs in NAMES:
        part = parts[theirs]
        names = _ours(theirs, header.n_layer)
        shape = part.shape[1:] if "{}" in NAMES[theirs] else part.shape
        n_bytes = math.prod(shape) * part.type.size
        for i, name in enumerate(names):
            offset = part.offset + i * n_bytes
            read = partial(file.array, offset, shape, part.type.dtype, f"tensor {name}")
            yield name, Stored(shape, part.type.dtype, read)


# The tokenizer


def _tokenizer(
    file: BinaryFile, header: Header, parts: Mapping[str, Tensor]
) -> BytePairTokenizer | None:
    """The tokenizer; None if there are no tokens."""

    def array(name: str) -> Array:
        part = parts[name]
        return file.array(part.offset, part.shape, part.type.dtype, name)

    tokens = _split(file, array("idx"), array("decoder_txt"))
    merges = _split(file, array("vocab_idx"), array("vocab_txt"))
    if (array("byte_decoder") != _letters()).any():
        raise TokenizerError(f"{file.path} has other letters for bytes than GPT-2: it is damaged")
    if not tokens:
        return None
    if len(tokens) > header.n_vocab:
        raise TokenizerError(
            f"{file.path} has {len(tokens)} tokens, but an embedding of {header.n_vocab}"
        )
    return tokenizer_of(tokens, merges, (), str(file.path))


def _split(file: BinaryFile, places: Array, text: Array) -> list[str]:
    """The strings of a text that begin at these places; empty ones at the end are fillers."""
    data = text.tobytes()
    ends = places.tolist()
    if ends[:1] != [0] or ends[-1] != len(data) or any(a > b for a, b in pairwise(ends)):
        raise TokenizerError(f"{file.path} is damaged: its strings do not lie one after the other")
    try:
        found = [data[first:end].decode() for first, end in pairwise(ends)]
    except UnicodeDecodeError:
        raise TokenizerError(f"{file.path} is damaged: a token is not UTF-8") from None
    while found and not found[-1]:
        found.pop()
    return found


def _joined(strings: Sequence[str]) -> tuple[Array, Array]:
    """Strings as the places where they begin and end, and one text.

    After the places of version 2 the program skips 32 bytes too many if none have to be skipped
    (`align_i4`): one more empty string prevents that.
    """
    data = [string.encode() for string in strings]
    if (len(data) + 1) % 8 == 0:
        data.append(b"")
    places = np.cumsum([0, *map(len, data)], dtype=np.int64).astype("<i4")
    return places, np.frombuffer(b"".join(data), np.int8)


def _letters() -> Array:
    """The code point of the letter that stands for each byte."""
    letters = np.zeros(N_BYTES, "<i4")
    for letter, byte in byte_of_letter().items():
        letters[byte] = ord(letter)
    return letters


# Writing


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write version 2, which the program wants to be called model.gguf.

    Without a tokenizer in `checkpoint` the file has no tokens: good for other readers, but the
    program itself begins with text.

    Raises
    ------
    ConfigError, TokenizerError
        fastGPT would compute something else, or split text in another way.
    """
    header, texts = prepared(checkpoint)
    parts = header.parts()
    if odd := [part for part in parts if part.name in NAMES and padding(part.n_bytes)]:
        raise ConfigError(
            f"n_embd is {header.n_embd}, but fastGPT reads its tensors without the padding that "
            f"GGUF has after {odd[0].name}: widths that are multiples of 8 need none"
        )
    lines = [Tensor("header", (12,), INTEGERS["int32"]), *parts]
    start = len(head({KEY: np.int32(0)}, lines))
    with create(path) as file:
        file.write(head({KEY: np.int32(start)}, lines))
        _write_padded(file, header.integers(MARK, 2))
        write_tensors(file, checkpoint)
        for text in texts:
            _write_padded(file, text)


def _write_padded(file: BinaryIO, array: Array) -> None:
    file.write(array.data)
    file.write(padding(array.nbytes))


def prepared(checkpoint: Checkpoint) -> tuple[Header, list[Array]]:
    """The header of a model, and what comes after its tensors; see `write` for the errors."""
    config = checkpoint.config
    require_openai(config, "fastGPT")
    tokens: list[str] = []
    merges: list[str] = []
    if checkpoint.tokenizer is not None:
        tokens, _, merges = lists_of(checkpoint.tokenizer, config.vocab_size, "fastGPT")
        merges = [*merges, ""]  # as create_model.py, from the end of the last line of vocab.bpe
        letters = byte_of_letter().keys()
        if strange := [token for token in tokens if not letters >= set(token)]:
            raise TokenizerError(
                f"the tokenizer has the token {strange[0][:64]!r}, which is not byte-level BPE, "
                "and fastGPT knows no other"
            )
    texts = [*_joined(tokens), *_joined(merges), _letters()]
    sizes = config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_head
    return Header(*sizes, *map(len, texts)), texts


def write_tensors(file: BinaryIO, checkpoint: Checkpoint) -> None:
    """Append all tensors of the model, layer by layer of each kind."""
    for theirs in NAMES:
        for name in _ours(theirs, checkpoint.config.n_layer):
            write_array(file, float_array(checkpoint.tensors[name]), "float32", f"tensor {name}")


def _ours(theirs: str, n_layer: int) -> list[str]:
    """Our names of what is in one piece there."""
    ours = NAMES[theirs]
    return [ours.format(i) for i in range(n_layer)] if "{}" in ours else [ours]
