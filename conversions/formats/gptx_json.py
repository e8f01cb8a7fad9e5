"""The JSON files of the gptx that is written in Rust and C++, `model_weights.json`.

One object: each tensor's name, without `transformer.`, with its shape and numbers, in the order of
PyTorch's `named_parameters`. The numbers are those of Python's `json.dump`: each float32 as the
shortest decimal of the equal float64 (https://github.com/arunpatro/gptx,
python/get_gpt_weights.py). A file of 124M parameters has 2.7 GB. It has no number of heads and no
tokenizer; that program itself assumes 12 layers and 12 heads of width 64.

A first pass finds the positions of the tensors. Numbers are read and written in chunks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import (
    Array,
    Checkpoint,
    StoredTensor,
    float_array,
    infer_config,
    require_openai_settings,
)
from gptx.conversions.containers.binary import BinaryFile, cast
from gptx.errors import GptxError, WeightsError
from gptx.files import create
from gptx.stored_weights import settle_head

READ_BYTES = 2**22  # at a time
WRITE_NUMBERS = 2**18  # at a time
MAX_TEXT_BYTES = 256  # of a name or a shape

START = re.compile(rb'\s*\{\s*"[^"\\]*"\s*:\s*\{\s*"(shape|data)"\s*:\s*\[')
# The characters of numbers, and of NaN, Infinity and -Infinity, which Python's JSON has.
NUMBER_CHARACTERS = b"0123456789+-.eE, \t\r\nNaInfity"
SPACE = re.compile(rb"[ \t\r\n]+")
# Names of layer 0. `_Scanner` accepts 10,000 layers: a hostile file makes no more entries.
NAMES = set(GPT2Config(n_layer=1, tie_word_embeddings=False).tensor_shapes())
LAYER = re.compile(r"h\.\d{1,4}\.")


def detect(path: Path) -> bool:
    """Test for an object of objects with a shape or data at the start of a file."""
    try:
        if not path.is_file():
            return False
        file = BinaryFile(path)
        return START.match(file.read(0, min(file.size, 1024), "its start")) is not None
    except GptxError:
        return False


def read(path: Path, config: GPT2Config | None = None, ignore_unknown: bool = False) -> Checkpoint:
    """Open a file, with the config.json beside it if it exists.

    This scans all of the file for the tensors and the count of their numbers. The numbers are
    parsed when a tensor is read.

    Raises
    ------
    WeightsError, ConfigError
        The file is truncated or invalid, or its tensors are not those of a GPT-2.
    StorageError
        The file cannot be read.
    """
    beside = path.with_name("config.json")
    if config is None and beside.is_file():
        config = GPT2Config.from_file(beside)
    file = BinaryFile(path)
    stored = {
        name: StoredTensor(tensor.shape, np.dtype(np.float32), tensor.read)
        for name, tensor in _Scanner(file).tensors()
    }
    stored, config, head_notes = settle_head(stored, config, StoredTensor.is_same)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    config, notes = infer_config(shapes, config)
    return Checkpoint(config, stored, None, head_notes + notes, ignore_unknown=ignore_unknown)


@dataclass(frozen=True)
class _JsonNumbers:
    """The numbers of a tensor: bytes `begin` to `end` of the file, separated by commas."""

    file: BinaryFile
    name: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> Array:
        array = np.empty(math.prod(self.shape), np.float32)
        done = 0
        for text in self._chunks():
            numbers = self._parse(text)
            if done + len(numbers) > len(array):  # the file was changed after the scan
                raise self._damaged("more numbers than its shape")
            array[done : done + len(numbers)] = numbers
            done += len(numbers)
        if done < len(array):
            raise self._damaged("fewer numbers than its shape")
        return array.reshape(self.shape)

    def _chunks(self) -> Iterator[bytes]:
        """Yield the text in chunks of complete numbers."""
        at, rest = self.begin, b""
        while at < self.end:
            size = min(READ_BYTES, self.end - at)
            block = rest + self.file.read(at, size, f"tensor {self.name}")
            at += size
            comma = len(block) if at == self.end else block.rfind(b",")
            if comma < 0:
                raise self._damaged(f"a number of more than {READ_BYTES} bytes")
            yield block[:comma]
            rest = block[comma + 1 :]

    def _parse(self, text: bytes) -> Array:
        """Parse numbers as Python does, rounded to float32."""
        if invalid := text.translate(None, NUMBER_CHARACTERS):
            raise self._damaged(f"{invalid[:1]!r} among its numbers")
        try:
            wide = np.array(json.loads(b"[%b]" % text, parse_int=float), np.float64)
        except ValueError as error:
            raise self._damaged(f"an invalid number ({error})") from None
        narrow = cast(wide, "float32", f"tensor {self.name}")
        if np.isinf(narrow).sum() != text.count(b"Infinity"):
            raise self._damaged("a number that is too large for float32")
        return narrow

    def _damaged(self, fault: str) -> WeightsError:
        return WeightsError(f"{self.file.path}: tensor {self.name} has {fault}: write it again")


class _Scanner:
    """A scanner that finds the positions of the tensors in one pass, block by block."""

    def __init__(self, file: BinaryFile) -> None:
        self.file = file
        self.block = b""
        self.start = 0  # position of the block in the file
        self.at = 0  # position in the block

    def tensors(self) -> Iterator[tuple[str, _JsonNumbers]]:
        """Yield the tensors in the order of the file."""
        seen = set()
        self._take(b"{")
        while True:
            name = self._string()
            if LAYER.sub("h.0.", name, count=1) not in NAMES:
                raise self._damaged(f"tensor {name} is unknown")
            if name in seen:
                raise self._damaged(f"duplicate tensor {name}")
            seen.add(name)
            self._take(b":")
            yield name, self._tensor(name)
            if self._take(b",}") == b"}":
                break
        if self._next():
            raise self._damaged("expected the end of the file")

    def _tensor(self, name: str) -> _JsonNumbers:
        extents: dict[str, tuple[int, int, int]] = {}
        self._take(b"{")
        while True:
            key = self._string()
            if key not in ("shape", "data") or key in extents:
                raise self._damaged(f'tensor {name} has {key!r}, expected "shape" and "data" once')
            self._take(b":")
            self._take(b"[")
            extents[key] = self._list()
            if self._take(b",}") == b"}":
                break
        for key in ("shape", "data"):
            if key not in extents:
                raise self._damaged(f'tensor {name} has no "{key}"')
        shape = self._shape(name, *extents["shape"][:2])
        begin, end, n_numbers = extents["data"]
        if n_numbers != math.prod(shape):
            raise self._damaged(
                f"tensor {name} has {n_numbers} numbers, expected {math.prod(shape)} by its shape "
                f"{list(shape)}"
            )
        return _JsonNumbers(self.file, name, shape, begin, end)

    def _shape(self, name: str, begin: int, end: int) -> tuple[int, ...]:
        text = self.file.read(
            begin, min(end - begin, MAX_TEXT_BYTES), f"the shape of tensor {name}"
        )
        if end - begin > MAX_TEXT_BYTES or not re.fullmatch(
            rb"\s*[1-9]\d{0,17}\s*(,\s*[1-9]\d{0,17}\s*)?", text
        ):
            raise self._damaged(f"the shape of tensor {name} is not one or two positive integers")
        return tuple(map(int, text.split(b",")))

    def _list(self) -> tuple[int, int, int]:
        """Skip a list after its "["; return its begin, its end, and its commas plus one."""
        begin, n_commas = self.start + self.at, 0
        while self._more():
            end = self.block.find(b"]", self.at)
            n_commas += self.block.count(b",", self.at, end if end >= 0 else len(self.block))
            if end >= 0:
                self.at = end + 1
                return begin, self.start + end, n_commas + 1
            self.at = len(self.block)
        raise self._damaged("expected ]")

    def _string(self) -> str:
        """Read a name; no tensor has one with an escape."""
        self._take(b'"')
        found = b""
        while self._more() and len(found) < MAX_TEXT_BYTES:
            byte = self.block[self.at : self.at + 1]
            self.at += 1
            if byte == b'"':
                return " ".join(found.decode(errors="replace").split())
            found += byte
        raise self._damaged("expected a short name")

    def _take(self, expected: bytes) -> bytes:
        """Read the next byte after spaces, which must be one of `expected`."""
        byte = self._next()
        if not byte or byte not in expected:
            raise self._damaged(f"expected {' or '.join(map(chr, expected))}")
        self.at += 1
        return byte

    def _next(self) -> bytes:
        """Skip spaces; return the byte after them, or nothing at the end."""
        while self._more():
            if spaces := SPACE.match(self.block, self.at):
                self.at = spaces.end()
            if self.at < len(self.block):
                return self.block[self.at : self.at + 1]
        return b""

    def _more(self) -> bool:
        """Read the next block if this one is used up; return False at the end of the file."""
        if self.at == len(self.block):
            self.start += len(self.block)
            size = min(READ_BYTES, self.file.size - self.start)
            self.block, self.at = self.file.read(self.start, size, "the JSON"), 0
        return bool(self.block)

    def _damaged(self, fault: str) -> WeightsError:
        position = self.start + self.at
        return WeightsError(
            f"{self.file.path} is truncated or damaged: {fault} at byte {position}: write it again"
        )


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write the same bytes as that project's script.

    Raises
    ------
    ConfigError
        Its programs would compute something else.
    """
    require_openai_settings(checkpoint.config, "gptx of Rust and C++", "n_inner")
    with create(path) as file:
        before = "{"
        for name, shape in checkpoint.config.tensor_shapes().items():
            file.write(f'{before}"{name}": {{"shape": {list(shape)}, "data": ['.encode())
            array = float_array(checkpoint.tensors[name]).reshape(-1)
            for first in range(0, array.size, WRITE_NUMBERS):
                rows = cast(array[first : first + WRITE_NUMBERS], "float32", f"tensor {name}")
                # JSON differs from Python's list only in these names; json.dumps takes 25% longer.
                text = repr(rows.tolist()).replace("nan", "NaN").replace("inf", "Infinity")
                file.write((", " if first else "").encode() + text[1:-1].encode())
            file.write(b"]}")
            before = ", "
        file.write(b"}")
