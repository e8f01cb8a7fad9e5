"""Records of Burn: nested structs of a Rust program in MessagePack, read without being held.

What a record has to be is said by a schema, so a file decides neither how deep the reader goes nor
how much it keeps: it keeps where the numbers of each tensor lie. They are a list with a marker
before each number, 0xca before float32 and 0xcb before float64. The bits of float16 are written
as whole numbers, those under 128 in one byte, under 256 in two, others in three: where such a list
ends is known once all of its markers were looked at.

The format is https://github.com/msgpack/msgpack/blob/master/spec.md, what Burn makes of it
https://github.com/tracel-ai/burn at v0.13.2, crates/burn-core/src/record.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn, TypeAlias

import numpy as np

from gptx.conversions.containers.binary import CHUNK, Array, BinaryFile
from gptx.errors import WeightsError

WINDOW = 2**16  # bytes of structure that are read at a time
MAX_TEXT = 2**10  # bytes of a string
MAX_LIST = 10_000  # structs in a list
MAX_DIMENSIONS = 8
MANY = 2**12  # whole numbers that are decoded at once, if all of them take three bytes
FEW = 64  # that are decoded one by one where such do not come one after the other

# Burn's names of the types, and NumPy's.
FLOATS: dict[str, np.dtype] = {
    "half::binary16::f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}

UINT8, UINT16, UINT32, UINT64, FLOAT32, FLOAT64 = 0xCC, 0xCD, 0xCE, 0xCF, 0xCA, 0xCB
NIL = 0xC0

# A number with its marker, as it lies in the file.
TOKENS = {
    UINT16: np.dtype([("marker", "u1"), ("value", ">u2")]),
    FLOAT32: np.dtype([("marker", "u1"), ("value", ">f4")]),
    FLOAT64: np.dtype([("marker", "u1"), ("value", ">f8")]),
}


class Kind(Enum):
    """What a field can be that is neither a struct nor a list."""

    NOTHING = "nothing (constants are not recorded)"
    TEXT = "text"
    TENSOR = "a tensor"


# A struct by its fields; a list by a schema of its items, or none if it is always empty.
Schema: TypeAlias = "Kind | dict[str, Schema] | list[Schema]"


@dataclass(frozen=True)
class Numbers:
    """A tensor in a record."""

    name: str
    shape: tuple[int, ...]
    offset: int  # of the first number's marker
    marker: int  # of TOKENS; UINT16 stands for all whole numbers


class Record:
    """A file that was found to be what a schema says.

    Parameters
    ----------
    file
        The file.
    schema
        Of all of it.

    Attributes
    ----------
    texts, lengths, tensors
        What the file has, by its path: fields and positions, with dots between them.

    Raises
    ------
    WeightsError
        It is truncated, or something else.
    """

    def __init__(self, file: BinaryFile, schema: Schema) -> None:
        self.file = file
        self.texts: dict[str, str] = {}
        self.lengths: dict[str, int] = {}
        self.tensors: dict[str, Numbers] = {}
        self._at = self._start = 0
        self._window = b""
        self._parse(schema, "")
        if self._at != file.size:
            raise WeightsError(
                f"{file.path} has {file.size} bytes, but its record ends after {self._at}: "
                "fetch it again"
            )

    def read(self, tensor: Numbers) -> Array:
        """The numbers of a tensor, in the byte order of this machine.

        Raises
        ------
        WeightsError
            Not all of them are of one type.
        """
        count = math.prod(tensor.shape)
        if tensor.marker == UINT16:
            bits = np.empty(count, np.uint16)
            self._whole_numbers(tensor.name, tensor.offset, count, bits)
            return bits.view(np.float16).reshape(tensor.shape)
        token = TOKENS[tensor.marker]
        numbers = np.empty(count, token["value"].newbyteorder("="))
        for first in range(0, count, CHUNK):
            n = min(CHUNK, count - first)
            offset = tensor.offset + first * token.itemsize
            found = self.file.array(offset, (n,), token, tensor.name)
            if (found["marker"] != tensor.marker).any():
                self._refuse(tensor.name, "a list of numbers of one type", offset)
            numbers[first : first + n] = found["value"]
        return numbers.reshape(tensor.shape)

    def _parse(self, schema: Schema, name: str) -> None:
        if isinstance(schema, dict):
            for field in self._fields(schema, name):
                self._parse(schema[field], f"{name}.{field}".lstrip("."))
        elif isinstance(schema, list):
            self.lengths[name] = length = self._length(name, 0x90, 0xDC, "a list")
            if length > (MAX_LIST if schema else 0):
                self._refuse(name, f"a list of at most {MAX_LIST if schema else 0}")
            for i in range(length):
                self._parse(schema[0], f"{name}.{i}")
        elif schema is Kind.NOTHING:
            if self._take(1, name)[0] != NIL:
                self._refuse(name, schema.value)
        elif schema is Kind.TEXT:
            self.texts[name] = self._text(name)
        else:
            self.tensors[name] = self._tensor(name)

    def _fields(self, names: Collection[str], struct: str) -> Iterator[str]:
        """The fields of a struct, each when it is there to be read."""
        left = list(names)
        length = self._length(struct, 0x80, 0xDE, "a struct")
        if length != len(left):
            self._refuse(struct, f"a struct of {', '.join(left)}")
        for _ in range(length):
            name = self._text(f"the name of a field of {struct or 'the record'}")
            if name not in left:
                self._refuse(struct, f"a struct of {', '.join(names)} alone, each once")
            left.remove(name)
            yield name

    def _tensor(self, name: str) -> Numbers:
        """Pass over `{id, param: {value: [numbers], shape: [sizes]}}`."""
        found: Numbers | None = None
        shape: tuple[int, ...] = ()
        count = 0
        for field in self._fields(("id", "param"), name):
            if field == "id":
                self._text(f"{name}.id")
                continue
            for part in self._fields(("value", "shape"), f"{name}.param"):
                length = self._length(f"{name}.{part}", 0x90, 0xDC, "a list")
                if part == "value":
                    count, offset = length, self._at
                    marker = self._pass_numbers(name, count)
                elif length > MAX_DIMENSIONS:
                    self._refuse(f"{name}.shape", f"a list of at most {MAX_DIMENSIONS} sizes")
                else:
                    shape = tuple(self._size(name) for _ in range(length))
            found = Numbers(name, shape, offset, marker)
        assert found is not None  # `_fields` gave both
        if math.prod(shape) != count:
            self._refuse(name, f"of as many numbers as its shape {list(shape)} says ({count})")
        return found

    def _pass_numbers(self, name: str, count: int) -> int:
        """Go to the end of a list of numbers; the marker that they have."""
        if count == 0:
            self._refuse(name, "a tensor with numbers in it")
        offset = self._at
        marker = self._take(1, name)[0]
        if marker in (FLOAT32, FLOAT64):
            end = offset + count * TOKENS[marker].itemsize
            if end > self.file.size:
                self._refuse(name, "there to its end", offset)
        else:
            marker = UINT16
            end = self._whole_numbers(name, offset, count, None)
        self._at = end
        return marker

    def _whole_numbers(self, name: str, offset: int, count: int, out: Array | None) -> int:
        """Where a list of numbers below 65536 ends; `out` gets them."""
        done = 0
        while done < count:
            data = self.file.read(offset, min(CHUNK, self.file.size - offset), name)
            n, used = _whole_numbers(data, count - done, None if out is None else out[done:])
            if n == 0:
                self._refuse(name, "a list of numbers to its end", offset)
            done, offset = done + n, offset + used
        return offset

    def _length(self, name: str, fixed: int, marker: int, expected: str) -> int:
        """How long a struct or list is: in its marker from `fixed` on, or after `marker`."""
        found = self._take(1, name)[0]
        if fixed <= found < fixed + 16:
            return found - fixed
        if found not in (marker, marker + 1):
            self._refuse(name, expected)
        return int.from_bytes(self._take(2 if found == marker else 4, name), "big")

    def _text(self, name: str) -> str:
        marker = self._take(1, name)[0]
        if 0xA0 <= marker < 0xC0:
            length = marker - 0xA0
        elif 0xD9 <= marker <= 0xDB:
            length = int.from_bytes(self._take(1 << (marker - 0xD9), name), "big")
        else:
            self._refuse(name, Kind.TEXT.value)
        if length > MAX_TEXT:
            self._refuse(name, f"a text of at most {MAX_TEXT} bytes")
        return self._take(length, name).decode(errors="replace")

    def _size(self, name: str) -> int:
        marker = self._take(1, name)[0]
        if marker < 0x80:
            return marker
        if not UINT8 <= marker <= UINT64:
            self._refuse(f"{name}.shape", "a list of sizes")
        return int.from_bytes(self._take(1 << (marker - UINT8), name), "big")

    def _take(self, n_bytes: int, name: str) -> bytes:
        """The next bytes."""
        first = self._at - self._start
        if first < 0 or first + n_bytes > len(self._window):
            size = max(n_bytes, min(WINDOW, self.file.size - self._at))
            self._window = self.file.read(self._at, size, name or "the record")
            self._start, first = self._at, 0
        self._at += n_bytes
        return self._window[first : first + n_bytes]

    def _refuse(self, name: str, expected: str, offset: int | None = None) -> NoReturn:
        raise WeightsError(
            f"{self.file.path} is damaged, or no record of Burn 0.13: {name or 'the record'} "
            f"is not {expected} (near byte {self._at if offset is None else offset})"
        )


def _whole_numbers(data: bytes, count: int, out: Array | None) -> tuple[int, int]:
    """Decode up to `count` numbers that are whole in `data`; how many, and how many bytes."""
    raw = np.frombuffer(data, np.uint8)
    token = TOKENS[UINT16]
    n = at = 0
    while n < count:
        # Most numbers take three bytes: pass them many at a time, as far as that goes.
        tried = min(count - n, (len(data) - at) // token.itemsize, MANY)
        tokens = raw[at : at + tried * token.itemsize].view(token)
        other = (tokens["marker"] != UINT16).nonzero()[0]
        run = int(other[0]) if other.size else tried
        if out is not None:
            out[n : n + run] = tokens["value"][:run]
        n, at = n + run, at + run * token.itemsize
        if 0 < run == tried:
            continue
        for _ in range(min(1 if run else FEW, count - n)):
            marker = data[at] if at < len(data) else NIL
            size = {UINT8: 2, UINT16: 3}.get(marker, 1)
            if (size == 1 and marker >= 0x80) or at + size > len(data):
                return n, at
            if out is not None:
                out[n] = marker if size == 1 else int.from_bytes(data[at + 1 : at + size], "big")
            n, at = n + 1, at + size
    return n, at
