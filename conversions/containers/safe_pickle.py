"""Pickles of tensors, read without running what they ask for.

A pickle is a program for a small machine with a stack, and that machine can call anything in
Python. The one here knows the same instructions (https://github.com/python/cpython,
Lib/pickletools.py, protocols 2 to 5) and builds dicts, lists, tuples, strings, numbers and
descriptions of tensors. It imports nothing and calls nothing that a file names: the names that
`torch.save` writes for tensors stand in a table, beside functions of ours (`torch_names.py`), and
any other name is refused. What no model needs leaves `NOTHING` behind.

An instruction costs no more than the bytes that it is written in, or that earlier ones were: what
is there once is never copied, so a list of lists of lists does not grow.
"""

from __future__ import annotations

import struct
from typing import Any

from gptx.conversions.containers.torch_names import MAX_NAME, NOTHING, Storage, known, storage
from gptx.errors import WeightsError

# 1558M with the state of its optimizer takes a tenth of either.
MAX_BYTES = 2**24
MAX_INSTRUCTIONS = 2**20
MAX_NUMBER = 16  # bytes of a whole number: PyTorch's magic number has ten


class Unpickled:
    """What a pickle describes.

    Parameters
    ----------
    data, start
        Where it begins in which bytes.

    Attributes
    ----------
    value
        Dicts (of what has a string of at most `MAX_NAME` letters for its key), lists, tuples,
        strings, numbers, None, `Tensor`, `NOTHING`. It may be nested so deeply, and hold one thing
        so often, that nothing but a look at a few known places is safe: no `repr`, no `==`, no walk
        through all of it.
    storages
        Those that were named, by key.
    end
        Where the pickle ends in the bytes.

    Raises
    ------
    WeightsError
        It is damaged, too long, or asks for more than tensors need.
    """

    value: Any

    def __init__(self, data: bytes, start: int = 0) -> None:
        self.storages: dict[str, Storage] = {}
        self.end = start
        self._data = data
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks as they were at each mark
        self._memo: dict[int, Any] = {}
        try:
            self._run()
        except (IndexError, KeyError, UnicodeDecodeError):  # no such item, no such memo
            raise WeightsError(f"its pickle is damaged before byte {self.end}") from None
        del self._data, self._stack, self._below, self._memo

    def _run(self) -> None:
        for _ in range(MAX_INSTRUCTIONS):
            code = self._number("B")
            if code not in INSTRUCTIONS:
                raise WeightsError(
                    f"its pickle has the instruction {code:#04x} before byte {self.end}, which "
                    "no tensor needs"
                )
            name, number, content = INSTRUCTIONS[code]
            if name == "STOP":
                self.value = self._stack.pop()
                return
            self._do(name, self._argument(number, content))
        raise WeightsError(f"its pickle has more than {MAX_INSTRUCTIONS} instructions")

    # What instructions read

    def _take(self, n_bytes: int) -> bytes:
        first, self.end = self.end, self.end + n_bytes
        if n_bytes < 0 or self.end > min(len(self._data), MAX_BYTES):
            raise WeightsError(f"its pickle does not end within {len(self._data)} bytes")
        return self._data[first : self.end]

    def _number(self, kind: str) -> Any:
        return struct.unpack(ORDER.get(kind, "<") + kind, self._take(struct.calcsize(kind)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self.end, self.end + 200)
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
        if content == "letters":
            return data.decode("latin-1")
        if content == "number" and len(data) <= MAX_NUMBER:
            return int.from_bytes(data, "little", signed=True)
        return NOTHING

    # What they do

    def _do(self, name: str, argument: Any) -> None:
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
                stack.append(NOTHING)
            case "FROZENSET":
                self._to_mark()
                self._stack.append(NOTHING)
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
                stack.append(known(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not (isinstance(module, str) and isinstance(name, str)):
                    raise WeightsError("its pickle asks for something that has no name")
                stack.append(known(f"{module} {name}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_build(function, arguments))
            case "NEWOBJ_EX":
                _, arguments, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(_build(function, arguments))
            case "STORAGE":
                stack.append(self._storage(stack.pop()))

    def _to_mark(self) -> list[Any]:
        """The items above the last mark, which goes with them."""
        items, self._stack = self._stack, self._below.pop()
        return items

    def _storage(self, id: Any) -> Storage:
        found = storage(id)
        if self.storages.setdefault(found.key, found) != found:
            raise WeightsError("its pickle has two storages of one name")
        return found


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif target is not NOTHING:
        raise WeightsError("its pickle appends to what is no list")


def _update(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise WeightsError("its pickle sets items of what is no dict")
    # Names alone: other keys, and long strings, too, can be as slow to hash and to compare as a
    # file wants them to be.
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str) and len(key) <= MAX_NAME:
            target[key] = value


def _build(function: Any, arguments: Any) -> Any:
    if not callable(function) or not isinstance(arguments, tuple):
        raise WeightsError("its pickle calls what cannot be called")
    return function(arguments)


ORDER = {"d": ">"}  # whole numbers are little endian, a float is not

# Code -> what it does, the number that follows it in the letters of struct, and what follows that:
# so many bytes of text or of a number. Those that protocol 2 replaced are not here, nor are the
# registered extensions of protocol 2 and the buffers outside of the file of protocol 5.
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
    0x8A: ("PUSH", "B", "number"),
    0x8B: ("PUSH", "i", "number"),
    0x8C: ("PUSH", "B", "text"),
    ord("X"): ("PUSH", "I", "text"),
    0x8D: ("PUSH", "Q", "text"),
    ord("U"): ("PUSH", "B", "letters"),
    ord("T"): ("PUSH", "i", "letters"),
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
    ord("b"): ("POP", "", ""),  # a state to set, such as the _metadata of a state_dict
    ord("Q"): ("STORAGE", "", ""),
}
