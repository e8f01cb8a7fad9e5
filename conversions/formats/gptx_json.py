"""The JSON files of the gptx that is written in Rust and C++, `model_weights.json`.

One object: each tensor's name, without `transformer.`, and its shape and numbers in the order of
PyTorch's `named_parameters`, as Python's `json.dump` writes them: every float32 as the shortest
decimal of the float64 that it is (https://github.com/arunpatro/gptx, python/get_gpt_weights.py). A
file of 124M parameters has 2.7 GB. Nothing says how many heads there are, and there is no
tokenizer; that program itself takes 12 heads of 64 and 12 layers whatever the file says.

Read and written some hundred thousand numbers at a time: a first pass finds where the tensors lie.
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
    Stored,
    config_of_shapes,
    float_array,
    require_openai,
)
from gptx.conversions.containers.binary import BinaryFile, cast
from gptx.errors import GptxError, WeightsError
from gptx.files import create

BLOCK = 2**22  # bytes that are read at a time
NUMBERS = 2**18  # that are written at a time
LONGEST = 256  # bytes of a name or a shape

BEGINNING = re.compile(rb'\s*\{\s*"[^"\\]*"\s*:\s*\{\s*"(shape|data)"\s*:\s*\[')
# Of JSON's numbers, and of NaN, Infinity and -Infinity, which Python's JSON has too.
IN_NUMBERS = b"0123456789+-.eE, \t\r\nNaInfity"
SPACE = re.compile(rb"[ \t\r\n]+")
# Layers as the first, of which `_Scanner` takes 10,000: a hostile file makes no more entries.
NAMES = set(GPT2Config(n_layer=1, tie_word_embeddings=False).tensor_shapes())
LAYER = re.compile(r"h\.\d{1,4}\.")


def detect(path: Path) -> bool:
    """Whether a file begins with an object of objects with a shape or data."""
    try:
        if not path.is_file():
            return False
        file = BinaryFile(path)
        return BEGINNING.match(file.read(0, min(file.size, 1024), "its beginning")) is not None
    except GptxError:
        return False


def read(path: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open a file, with the config.json beside it, if there is one.

    Its whole length is gone through, to find the tensors and to count their numbers; what the
    numbers are, is seen when they are read.

    Raises
    ------
    WeightsError, ConfigError
        It is truncated or no such JSON, or its tensors are not those of a GPT-2.
    StorageError
        It cannot be read.
    """
    beside = path.with_name("config.json")
    if config is None and beside.is_file():
        config = GPT2Config.from_file(beside)
    file = BinaryFile(path)
    stored = {
        name: Stored(tensor.shape, np.dtype(np.float32), tensor.read)
        for name, tensor in _Scanner(file).tensors()
    }
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    config, notes = config_of_shapes(shapes, config)
    return Checkpoint(config, stored, notes=notes)


@dataclass(frozen=True)
class _Tensor:
    """The numbers of a tensor: bytes `begin` to `end` of the file, commas between them."""

    file: BinaryFile
    name: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> Array:
        array = np.empty(math.prod(self.shape), np.float32)
        done = 0
        for text in self._pieces():
            numbers = self._parse(text)
            if done + len(numbers) > len(array):  # there were as many: somebody is writing it
                raise self._damaged("more numbers than its shape says")
            array[done : done + len(numbers)] = numbers
            done += len(numbers)
        if done < len(array):
            raise self._damaged("fewer numbers than its shape says")
        return array.reshape(self.shape)

    def _pieces(self) -> Iterator[bytes]:
        """The text in pieces that begin and end with whole numbers."""
        at, rest = self.begin, b""
        while at < self.end:
            size = min(BLOCK, self.end - at)
            block = rest + self.file.read(at, size, f"tensor {self.name}")
            at += size
            cut = len(block) if at == self.end else block.rfind(b",")
            if cut < 0:
                raise self._damaged(f"a number of more than {BLOCK} bytes")
            yield block[:cut]
            rest = block[cut + 1 :]

    def _parse(self, text: bytes) -> Array:
        """Numbers as Python reads JSON, each rounded to float32."""
        if strange := text.translate(None, IN_NUMBERS):
            raise self._damaged(f"{strange[:1]!r} among its numbers")
        try:
            wide = np.array(json.loads(b"[%b]" % text, parse_int=float), np.float64)
        except ValueError as error:
            raise self._damaged(f"something that is no number ({error})") from None
        narrow = cast(wide, "float32", f"tensor {self.name}")
        if np.isinf(narrow).sum() != text.count(b"Infinity"):
            raise self._damaged("a number that is too large for float32")
        return narrow

    def _damaged(self, what: str) -> WeightsError:
        return WeightsError(f"{self.file.path}: tensor {self.name} holds {what}: write it again")


class _Scanner:
    """Goes through a file once, in blocks, and finds where its tensors lie."""

    def __init__(self, file: BinaryFile) -> None:
        self.file = file
        self.block = b""
        self.start = 0  # of the block, in the file
        self.at = 0  # in the block

    def tensors(self) -> Iterator[tuple[str, _Tensor]]:
        """Each name and what it names, in the order of the file."""
        seen = set()
        self._take(b"{")
        while True:
            name = self._string()
            if LAYER.sub("h.0.", name, count=1) not in NAMES:
                raise self._damaged(f"tensor {name} is unknown")
            if name in seen:
                raise self._damaged(f"tensor {name} is there twice")
            seen.add(name)
            self._take(b":")
            yield name, self._tensor(name)
            if self._take(b",}") == b"}":
                break
        if self._next():
            raise self._damaged("expected its end")

    def _tensor(self, name: str) -> _Tensor:
        extents: dict[str, tuple[int, int, int]] = {}
        self._take(b"{")
        while True:
            key = self._string()
            if key not in ("shape", "data") or key in extents:
                raise self._damaged(f'tensor {name} has {key!r}, expected one "shape" and "data"')
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
                f"tensor {name} has {n_numbers} numbers, its shape {list(shape)} asks for "
                f"{math.prod(shape)}"
            )
        return _Tensor(self.file, name, shape, begin, end)

    def _shape(self, name: str, begin: int, end: int) -> tuple[int, ...]:
        text = self.file.read(begin, min(end - begin, LONGEST), f"the shape of tensor {name}")
        if end - begin > LONGEST or not re.fullmatch(
            rb"\s*[1-9]\d{0,17}\s*(,\s*[1-9]\d{0,17}\s*)?", text
        ):
            raise self._damaged(f"the shape of tensor {name} is not one or two positive sizes")
        return tuple(map(int, text.split(b",")))

    def _list(self) -> tuple[int, int, int]:
        """Behind a "[": where the list begins and ends, and one more than it has commas."""
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
        """A name; none that is meant here has an escape."""
        self._take(b'"')
        found = b""
        while self._more() and len(found) < LONGEST:
            byte = self.block[self.at : self.at + 1]
            self.at += 1
            if byte == b'"':
                return " ".join(found.decode(errors="replace").split())
            found += byte
        raise self._damaged("expected a short name")

    def _take(self, expected: bytes) -> bytes:
        """The next byte that is no space, which has to be one of `expected`."""
        byte = self._next()
        if not byte or byte not in expected:
            raise self._damaged(f"expected {' or '.join(map(chr, expected))}")
        self.at += 1
        return byte

    def _next(self) -> bytes:
        """What comes after spaces; nothing at the end."""
        while self._more():
            if spaces := SPACE.match(self.block, self.at):
                self.at = spaces.end()
            if self.at < len(self.block):
                return self.block[self.at : self.at + 1]
        return b""

    def _more(self) -> bool:
        """Whether there is more to read; if so, `block` has it."""
        if self.at == len(self.block):
            self.start += len(self.block)
            size = min(BLOCK, self.file.size - self.start)
            self.block, self.at = self.file.read(self.start, size, "the JSON"), 0
        return bool(self.block)

    def _damaged(self, what: str) -> WeightsError:
        where = self.start + self.at
        return WeightsError(
            f"{self.file.path} is truncated or damaged: {what} at byte {where}: write it again"
        )


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write what that project's script writes, to the byte.

    Raises
    ------
    ConfigError
        Its programs would compute something else.
    """
    require_openai(checkpoint.config, "gptx of Rust and C++", "n_inner")
    with create(path) as file:
        before = "{"
        for name, shape in checkpoint.config.tensor_shapes().items():
            file.write(f'{before}"{name}": {{"shape": {list(shape)}, "data": ['.encode())
            array = float_array(checkpoint.tensors[name]).reshape(-1)
            for first in range(0, array.size, NUMBERS):
                rows = cast(array[first : first + NUMBERS], "float32", f"tensor {name}")
                # Python's list and JSON's differ in this alone; json.dumps takes a quarter longer.
                text = repr(rows.tolist()).replace("nan", "NaN").replace("inf", "Infinity")
                file.write((", " if first else "").encode() + text[1:-1].encode())
            file.write(b"]}")
            before = ", "
        file.write(b"}")
