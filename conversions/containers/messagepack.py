"""Records of Burn: nested structs of a Rust program in MessagePack, checked against a schema.

The schema bounds the depth and the memory of the reader, which keeps only the position of a tensor.
The numbers of a tensor are a list with a marker before each: 0xca before float32, 0xcb before
float64. float16 is stored as its bits in integers of one byte (below 128), two bytes (below 256)
or three bytes. The end of such a list is found from all of its markers.

The format is https://github.com/msgpack/msgpack/blob/master/spec.md; Burn's use of it is
https://github.com/tracel-ai/burn at v0.13.2, crates/burn-core/src/record.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn, TypeAlias

import numpy as np

from gptx.conversions.containers.binary import CHUNK_NUMBERS, Array, BinaryFile
from gptx.errors import WeightsError

WINDOW_BYTES = 2**16  # of the structure, read at a time
MAX_TEXT_BYTES = 2**10
MAX_LIST_LENGTH = 10_000  # structs in a list
MAX_DIMENSIONS = 8
MAX_RUN = 2**12  # integers of three bytes that are decoded as one array
SCALAR_RUN = 64  # integers that are decoded one by one if the first has not three bytes

# Burn's names of the types.
FLOATS: dict[str, np.dtype] = {
    "half::binary16::f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}

UINT8, UINT16, UINT32, UINT64, FLOAT32, FLOAT64 = 0xCC, 0xCD, 0xCE, 0xCF, 0xCA, 0xCB
NIL = 0xC0

# Marker -> layout of a number in the file, with its marker.
NUMBER_LAYOUTS = {
    UINT16: np.dtype([("marker", "u1"), ("value", ">u2")]),
    FLOAT32: np.dtype([("marker", "u1"), ("value", ">f4")]),
    FLOAT64: np.dtype([("marker", "u1"), ("value", ">f8")]),
}


class Kind(Enum):
    """The kinds of fields that are neither structs nor lists; the values are for errors."""

    NIL = "nil, which Burn stores for a constant"
    TEXT = "text"
    TENSOR = "a tensor"


# A dict is a struct: field -> schema. A list has the schema of its items; [] is an empty list.
Schema: TypeAlias = "Kind | dict[str, Schema] | list[Schema]"


@dataclass(frozen=True)
class RecordTensor:
    """A tensor in a record.

    Attributes
    ----------
    name, shape
        Its path in the record, and its shape.
    offset
        Position of the first number's marker in the file.
    marker
        Marker of its numbers, one of `NUMBER_LAYOUTS`; UINT16 for integers of any length.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    marker: int


class Record:
    """A file that matches a schema.

    Parameters
    ----------
    file
        The file.
    schema
        Schema of all of it.

    Attributes
    ----------
    texts, lengths, tensors
        Path -> text, length of a list, tensor. A path is fields and positions, joined by dots.

    Raises
    ------
    WeightsError
        The file is truncated or does not match the schema.
    """

    def __init__(self, file: BinaryFile, schema: Schema) -> None:
        self.file = file
        self.texts: dict[str, str] = {}
        self.lengths: dict[str, int] = {}
        self.tensors: dict[str, RecordTensor] = {}
        self._at = self._start = 0
        self._window = b""
        self._parse(schema, "")
        if self._at != file.size:
            raise WeightsError(
                f"{file.path} has {file.size} bytes, expected {self._at} by its record: "
                "fetch it again"
            )

    def read(self, tensor: RecordTensor) -> Array:
        """Read a tensor, in the byte order of this machine.

        Raises
        ------
        WeightsError
            Its numbers are not all of one type.
        """
        count = math.prod(tensor.shape)
        if tensor.marker == UINT16:
            bits = np.empty(count, np.uint16)
            self._integers(tensor.name, tensor.offset, count, bits)
            return bits.view(np.float16).reshape(tensor.shape)
        layout = NUMBER_LAYOUTS[tensor.marker]
        numbers = np.empty(count, layout["value"].newbyteorder("="))
        for first in range(0, count, CHUNK_NUMBERS):
            n = min(CHUNK_NUMBERS, count - first)
            offset = tensor.offset + first * layout.itemsize
            found = self.file.array(offset, (n,), layout, tensor.name)
            if (found["marker"] != tensor.marker).any():
                self._fail(tensor.name, "a list of numbers of one type", offset)
            numbers[first : first + n] = found["value"]
        return numbers.reshape(tensor.shape)

    def _parse(self, schema: Schema, name: str) -> None:
        if isinstance(schema, dict):
            for field in self._fields(schema, name):
                self._parse(schema[field], f"{name}.{field}".lstrip("."))
        elif isinstance(schema, list):
            self.lengths[name] = length = self._length(name, 0x90, 0xDC, "a list")
            if length > (MAX_LIST_LENGTH if schema else 0):
                self._fail(name, f"a list of at most {MAX_LIST_LENGTH if schema else 0}")
            for i in range(length):
                self._parse(schema[0], f"{name}.{i}")
        elif schema is Kind.NIL:
            if self._take(1, name)[0] != NIL:
                self._fail(name, schema.value)
        elif schema is Kind.TEXT:
            self.texts[name] = self._text(name)
        else:
            self.tensors[name] = self._tensor(name)

    def _fields(self, names: Collection[str], struct: str) -> Iterator[str]:
        """Yield the names of a struct's fields, each when the position is at its value."""
        left = list(names)
        length = self._length(struct, 0x80, 0xDE, "a struct")
        if length != len(left):
            self._fail(struct, f"a struct of {', '.join(left)}")
        for _ in range(length):
            name = self._text(f"the name of a field of {struct or 'the record'}")
            if name not in left:
                self._fail(struct, f"a struct of {', '.join(names)}, each once and no others")
            left.remove(name)
            yield name

    def _tensor(self, name: str) -> RecordTensor:
        """Skip `{id, param: {value: [numbers], shape: [sizes]}}`; return its description."""
        found: RecordTensor | None = None
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
                    marker = self._skip_numbers(name, count)
                elif length > MAX_DIMENSIONS:
                    self._fail(f"{name}.shape", f"a list of at most {MAX_DIMENSIONS} sizes")
                else:
                    shape = tuple(self._size(name) for _ in range(length))
            found = RecordTensor(name, shape, offset, marker)
        assert found is not None  # `_fields` yielded both
        if math.prod(shape) != count:
            self._fail(
                name,
                f"a tensor of shape {list(shape)}: it has {count} numbers",
            )
        return found

    def _skip_numbers(self, name: str, count: int) -> int:
        """Skip a list of numbers; return their marker."""
        if count == 0:
            self._fail(name, "a tensor with numbers in it")
        offset = self._at
        marker = self._take(1, name)[0]
        if marker in (FLOAT32, FLOAT64):
            end = offset + count * NUMBER_LAYOUTS[marker].itemsize
            if end > self.file.size:
                self._fail(name, "complete: the file is truncated", offset)
        else:
            marker = UINT16
            end = self._integers(name, offset, count, None)
        self._at = end
        return marker

    def _integers(self, name: str, offset: int, count: int, out: Array | None) -> int:
        """Return the end of a list of integers below 65536; decode them into `out`, if given."""
        done = 0
        while done < count:
            data = self.file.read(offset, min(CHUNK_NUMBERS, self.file.size - offset), name)
            n, used = _decode_integers(data, count - done, None if out is None else out[done:])
            if n == 0:
                self._fail(name, "a complete list of numbers", offset)
            done, offset = done + n, offset + used
        return offset

    def _length(self, name: str, fixed: int, marker: int, expected: str) -> int:
        """Read the length of a struct or list: in its marker from `fixed` on, or after `marker`."""
        found = self._take(1, name)[0]
        if fixed <= found < fixed + 16:
            return found - fixed
        if found not in (marker, marker + 1):
            self._fail(name, expected)
        return int.from_bytes(self._take(2 if found == marker else 4, name), "big")

    def _text(self, name: str) -> str:
        marker = self._take(1, name)[0]
        if 0xA0 <= marker < 0xC0:
            length = marker - 0xA0
        elif 0xD9 <= marker <= 0xDB:
            length = int.from_bytes(self._take(1 << (marker - 0xD9), name), "big")
        else:
            self._fail(name, Kind.TEXT.value)
        if length > MAX_TEXT_BYTES:
            self._fail(name, f"a text of at most {MAX_TEXT_BYTES} bytes")
        return self._take(length, name).decode(errors="replace")

    def _size(self, name: str) -> int:
        marker = self._take(1, name)[0]
        if marker < 0x80:
            return marker
        if not UINT8 <= marker <= UINT64:
            self._fail(f"{name}.shape", "a list of sizes")
        return int.from_bytes(self._take(1 << (marker - UINT8), name), "big")

    def _take(self, n_bytes: int, name: str) -> bytes:
        """Read the next bytes."""
        first = self._at - self._start
        if first + n_bytes > len(self._window):
            size = max(n_bytes, min(WINDOW_BYTES, self.file.size - self._at))
            self._window = self.file.read(self._at, size, name or "the record")
            self._start, first = self._at, 0
        self._at += n_bytes
        return self._window[first : first + n_bytes]

    def _fail(self, name: str, expected: str, offset: int | None = None) -> NoReturn:
        raise WeightsError(
            f"{self.file.path} is damaged or not a record of Burn 0.13: {name or 'the record'} "
            f"is not {expected} (near byte {self._at if offset is None else offset})"
        )


def _decode_integers(data: bytes, count: int, out: Array | None) -> tuple[int, int]:
    """Decode up to `count` complete integers of `data`; return their count and their bytes."""
    raw = np.frombuffer(data, np.uint8)
    layout = NUMBER_LAYOUTS[UINT16]
    n = at = 0
    while n < count:
        # Most integers have three bytes: decode a run of them as one array.
        tried = min(count - n, (len(data) - at) // layout.itemsize, MAX_RUN)
        marked = raw[at : at + tried * layout.itemsize].view(layout)
        other = (marked["marker"] != UINT16).nonzero()[0]
        run = int(other[0]) if other.size else tried
        if out is not None:
            out[n : n + run] = marked["value"][:run]
        n, at = n + run, at + run * layout.itemsize
        if 0 < run == tried:
            continue
        for _ in range(min(1 if run else SCALAR_RUN, count - n)):
            marker = data[at] if at < len(data) else NIL
            size = {UINT8: 2, UINT16: 3}.get(marker, 1)
            if (size == 1 and marker >= 0x80) or at + size > len(data):
                return n, at
            if out is not None:
                out[n] = marker if size == 1 else int.from_bytes(data[at + 1 : at + size], "big")
            n, at = n + 1, at + size
    return n, at
