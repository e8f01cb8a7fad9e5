"""An unpickler for tensors that runs no code of the file.

A pickle is a program for a stack machine, and Python's unpickler lets it call any function. This
one has the same instructions (https://github.com/python/cpython, Lib/pickletools.py, protocols 2 to
5), but builds only dicts, lists, tuples, strings, numbers and descriptions of tensors. It imports
nothing and calls nothing that a file names: a global is replaced from a table of those that
`torch.save` writes for tensors (`torch_globals.py`). Any other one is an error, except a class of
which the file has an object, such as the config of a training script. A value that no model needs,
such as that object, becomes `IGNORED`.

The cost of an instruction is bounded by its bytes in the file: no instruction copies a value but a
name, whose length is limited, so nested lists do not grow exponentially.
"""

from __future__ import annotations

import struct
from typing import Any

from gptx.conversions.containers.torch_globals import (
    IGNORED,
    MAX_NAME_LENGTH,
    TorchStorage,
    UnknownGlobal,
    resolve_global,
    storage_of_id,
)
from gptx.errors import WeightsError

# 1558M with the state of its optimizer needs 75,000 instructions, in 0.3 MB.
MAX_PICKLE_BYTES = 2**24
MAX_INSTRUCTIONS = 2**18
MAX_INTEGER_BYTES = 16  # PyTorch's magic number has ten


class Unpickled:
    """The value of a pickle.

    Parameters
    ----------
    data, start
        The bytes, and the position of the pickle in them.

    Attributes
    ----------
    value
        Dicts (only items whose key is a string of at most `MAX_NAME_LENGTH` characters), lists,
        tuples, strings, numbers, None, `TorchTensor`, `IGNORED`. It can be nested deeply and can
        contain one object many times: `repr`, `==` and a walk through it are not safe.
    storages
        Key -> storage that the pickle names.
    end
        Position after the pickle.

    Raises
    ------
    WeightsError
        The pickle is damaged, too long, or needs more than tensors need.
    """

    value: Any

    def __init__(self, data: bytes, start: int = 0) -> None:
        self.storages: dict[str, TorchStorage] = {}
        self.end = start
        self._data = data
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stack below each mark
        self._memo: dict[int, Any] = {}
        self._unused: dict[str, UnknownGlobal] = {}  # named, but not as the class of an object
        try:
            self._run()
        except (IndexError, KeyError, UnicodeDecodeError):  # missing item or memo
            raise WeightsError(f"its pickle is damaged before byte {self.end}") from None
        for unknown in self._unused.values():
            raise unknown.error()
        del self._data, self._stack, self._below, self._memo, self._unused

    def _run(self) -> None:
        for _ in range(MAX_INSTRUCTIONS):
            code = self._number("B")
            if code not in INSTRUCTIONS:
                raise WeightsError(
                    f"its pickle has the unsupported instruction {code:#04x} before byte {self.end}"
                )
            name, number, content = INSTRUCTIONS[code]
            if name == "STOP":
                self.value = self._stack.pop()
                return
            self._execute(name, self._argument(number, content))
        raise WeightsError(f"its pickle has more than {MAX_INSTRUCTIONS} instructions")

    # Arguments of instructions

    def _take(self, n_bytes: int) -> bytes:
        first, self.end = self.end, self.end + n_bytes
        if n_bytes < 0 or self.end > min(len(self._data), MAX_PICKLE_BYTES):
            raise WeightsError(
                f"its pickle is truncated: it has no end within {len(self._data)} bytes"
            )
        return self._data[first : self.end]

    def _number(self, kind: str) -> Any:
        return struct.unpack(BYTE_ORDER.get(kind, "<") + kind, self._take(struct.calcsize(kind)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self.end, self.end + MAX_NAME_LENGTH)
        line = self._take(end - self.end)
        self._take(1)
        return line.decode("ascii")

    def _argument(self, number: str, content: str) -> Any:
        if content == "lines":
            return f"{self._line()} {self._line()}"
        if not number:
            return None
        argument = self._number(number)
        if not content:
            return argument
        data = self._take(argument)
        if content == "text":
            return data.decode()
        if content == "latin-1":
            return data.decode("latin-1")
        if content == "integer" and len(data) <= MAX_INTEGER_BYTES:
            return int.from_bytes(data, "little", signed=True)
        return IGNORED

    # Effects of instructions

    def _execute(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PUSH":
                stack.append(argument)
            case "NONE" | "TRUE" | "FALSE":
                stack.append({"NONE": None, "TRUE": True, "FALSE": False}[name])
            case "LIST":
                stack.append([])
            case "DICT":
                stack.append({})
            case "SET":
                stack.append(IGNORED)
            case "FROZENSET":
                self._to_mark()
                self._stack.append(IGNORED)
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "TUPLE":
                group = tuple(self._to_mark())
                self._stack.append(group)
            case "TUPLE0":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                last = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(last)))
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET":
                stack.append(self._memo[argument])
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS":
                items = self._to_mark()
                _extend(self._stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [key, value])
            case "SETITEMS":
                items = self._to_mark()
                _update(self._stack[-1], items)
            case "GLOBAL":
                stack.append(self._resolve(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                for part in (name, module):
                    if not (isinstance(part, str) and len(part) <= MAX_NAME_LENGTH):
                        raise WeightsError(
                            "its pickle has a global without a name of at most "
                            f"{MAX_NAME_LENGTH} characters"
                        )
                stack.append(self._resolve(f"{module} {name}"))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                if isinstance(function, UnknownGlobal) and arguments == ():
                    self._unused.pop(function.name, None)
                    stack.append(IGNORED)
                else:
                    stack.append(_call(function, arguments))
            case "NEWOBJ_EX":
                _, arguments, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "STORAGE":
                stack.append(self._storage(stack.pop()))

    def _resolve(self, name: str) -> Any:
        found = resolve_global(name)
        if isinstance(found, UnknownGlobal):
            self._unused[name] = found
        return found

    def _to_mark(self) -> list[Any]:
        """Pop the items above the last mark, and the mark."""
        items, self._stack = self._stack, self._below.pop()
        return items

    def _storage(self, id: Any) -> TorchStorage:
        found = storage_of_id(id)
        if self.storages.setdefault(found.key, found) != found:
            raise WeightsError("its pickle has duplicate storages of one key")
        return found


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif target is not IGNORED:
        raise WeightsError("its pickle appends to a value that is not a list")


def _update(target: Any, items: list[Any]) -> None:
    if target is IGNORED:
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise WeightsError("its pickle sets items of a value that is not a dict")
    # Short strings only: a file can make other keys arbitrarily slow to hash and to compare.
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str) and len(key) <= MAX_NAME_LENGTH:
            target[key] = value


def _call(function: Any, arguments: Any) -> Any:
    if isinstance(function, UnknownGlobal):
        raise function.error()
    if not callable(function) or not isinstance(arguments, tuple):
        raise WeightsError("its pickle calls a value that is not a function")
    return function(arguments)


BYTE_ORDER = {"d": ">"}  # a float is big endian, integers are little endian

# Code -> effect, type of the number after the code (of `struct`), kind of the bytes after that.
# Missing: what protocol 2 replaced, extensions (protocol 2), buffers outside of the file (5).
INSTRUCTIONS: dict[int, tuple[str, str, str]] = {
    0x80: ("PROTOCOL", "B", ""),
    0x95: ("FRAME", "Q", ""),
    ord("."): ("STOP", "", ""),
    ord("N"): ("NONE", "", ""),
    0x88: ("TRUE", "", ""),
    0x89: ("FALSE", "", ""),
    ord("K"): ("PUSH", "B", ""),
    ord("M"): ("PUSH", "H", ""),
    ord("J"): ("PUSH", "i", ""),
    ord("G"): ("PUSH", "d", ""),
    0x8A: ("PUSH", "B", "integer"),
    0x8B: ("PUSH", "i", "integer"),
    0x8C: ("PUSH", "B", "text"),
    ord("X"): ("PUSH", "I", "text"),
    0x8D: ("PUSH", "Q", "text"),
    ord("U"): ("PUSH", "B", "latin-1"),
    ord("T"): ("PUSH", "i", "latin-1"),
    ord("C"): ("PUSH", "B", "bytes"),
    ord("B"): ("PUSH", "I", "bytes"),
    0x8E: ("PUSH", "Q", "bytes"),
    0x96: ("PUSH", "Q", "bytes"),
    ord("]"): ("LIST", "", ""),
    ord("}"): ("DICT", "", ""),
    0x8F: ("SET", "", ""),
    0x91: ("FROZENSET", "", ""),
    ord(")"): ("TUPLE0", "", ""),
    0x85: ("TUPLE1", "", ""),
    0x86: ("TUPLE2", "", ""),
    0x87: ("TUPLE3", "", ""),
    ord("t"): ("TUPLE", "", ""),
    ord("("): ("MARK", "", ""),
    ord("0"): ("POP", "", ""),
    ord("1"): ("POP_MARK", "", ""),
    ord("2"): ("DUP", "", ""),
    ord("q"): ("PUT", "B", ""),
    ord("r"): ("PUT", "I", ""),
    0x94: ("MEMOIZE", "", ""),
    ord("h"): ("GET", "B", ""),
    ord("j"): ("GET", "I", ""),
    ord("a"): ("APPEND", "", ""),
    ord("e"): ("APPENDS", "", ""),
    0x90: ("APPENDS", "", ""),
    ord("s"): ("SETITEM", "", ""),
    ord("u"): ("SETITEMS", "", ""),
    ord("c"): ("GLOBAL", "", "lines"),
    0x93: ("STACK_GLOBAL", "", ""),
    ord("R"): ("REDUCE", "", ""),
    0x81: ("NEWOBJ", "", ""),
    0x92: ("NEWOBJ_EX", "", ""),
    ord("b"): ("POP", "", ""),  # drops a state, such as _metadata of a state_dict
    ord("Q"): ("STORAGE", "", ""),
}
