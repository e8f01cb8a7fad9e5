"""Pickles that run code when Python loads them, with seeds.

Each makes a file or folder of a given name, in one of many ways: other functions, other
instructions that call them, other positions in the file.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from tests.support.files.torch_files import MACHINE, MAGIC, VERSION, Pickle, Raw, zip_of

EXTENSION = 201  # the code of os.mkdir in copyreg


def text(value: str) -> bytes:
    """Return instructions that push a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str, rng: random.Random) -> bytes:
    """Return instructions that push a global."""
    kind = rng.randrange(4)
    if kind == 0 and "." not in attribute:
        return f"c{module}\n{attribute}\n".encode()
    if kind == 1:  # through the memo
        code = text(attribute) + b"q\xf00" + text(module) + b"q\xf10"
        return code + b"h\xf1h\xf0\x93"
    return text(module) + text(attribute) + b"\x93"


def called(function: bytes, arguments: list[bytes], rng: random.Random) -> bytes:
    """Return instructions that call a function, in one of several ways."""
    group = b"(" + b"".join(arguments) + b"t"
    kind = rng.randrange(4)
    if kind == 0 and len(arguments) < 4:
        return function + b"".join(arguments) + b")\x85\x86\x87"[len(arguments) :][:1] + b"R"
    if kind == 1:
        return b"(" + function + b"".join(arguments) + b"o"
    return function + group + b"R"


def payloads(marker: str, rng: random.Random) -> list[Callable[[], bytes]]:
    """Return functions of instructions that make a file `marker` and leave one value."""

    def call(module: str, attribute: str, *arguments: bytes) -> bytes:
        return called(name(module, attribute, rng), list(arguments), rng)

    python = f"__import__('os').mkdir({marker!r})"
    here, command = text(marker), text(f"mkdir {marker}")
    shell = b"(" + b"".join(map(text, ["mkdir", marker])) + b"l"
    state = b"}" + text("__setstate__") + name("os", "mkdir", rng) + b"s"
    thing = name("argparse", "Namespace", rng) + b")\x81"
    inner = b"\x80\x04" + call("os", "mkdir", here) + b"."
    as_bytes = b"B" + struct.pack("<I", len(inner)) + inner
    popen = name("subprocess", "Popen", rng)
    return [
        lambda: call("os", "system", command),
        lambda: call("posix", "system", command),
        lambda: call("os", "popen", command),
        lambda: call("os", "mkdir", here),
        lambda: call("posix", "mkdir", here),
        lambda: call("os", "makedirs", here),
        lambda: call("os", "path.os.mkdir", here),
        lambda: call("shutil", "os.mkdir", here),
        lambda: call("os", "symlink", text("nowhere"), here),
        lambda: call("builtins", "eval", text(python)),
        lambda: call("builtins", "exec", text(python)),
        lambda: call("builtins", "open", here, text("w")),
        lambda: call("io", "open", here, text("x")),
        lambda: call("_io", "FileIO", here, text("w")),
        lambda: call("codecs", "open", here, text("w")),
        lambda: call("logging", "FileHandler", here),
        lambda: call("sqlite3", "connect", here),
        lambda: call("dbm.dumb", "open", here),
        lambda: call("zipfile", "ZipFile", here, text("w")),
        lambda: call("timeit", "timeit", text(python), text(""), name("time", "time", rng), b"K\1"),
        lambda: call("subprocess", "call", shell),
        lambda: call("subprocess", "Popen", shell),
        lambda: call("subprocess", "getoutput", command),
        lambda: called(
            call("operator", "methodcaller", text("mkdir"), here),
            [call("importlib", "import_module", text("os"))],
            rng,
        ),
        lambda: called(
            call("builtins", "getattr", call("builtins", "__import__", text("os")), text("mkdir")),
            [here],
            rng,
        ),
        lambda: called(call("functools", "partial", name("os", "mkdir", rng), here), [], rng),
        lambda: called(
            name("pathlib", "Path.touch", rng), [call("pathlib", "PosixPath", here)], rng
        ),
        lambda: call("pickle", "loads", as_bytes),
        lambda: call("_pickle", "loads", as_bytes),
        lambda: call(
            "builtins",
            "list",
            call("builtins", "map", name("os", "mkdir", rng), b"(" + here + b"l"),
        ),
        lambda: thing + state + b"b" + here + b"b",  # its __setstate__ is mkdir
        lambda: popen + b"(" + shell + b"t\x81",
        lambda: popen + b")}" + text("args") + shell + b"s\x92",
        lambda: f"(S'{marker}'\nios\nmkdir\n".encode(),  # INST, of protocol 0
        lambda: f"(S'mkdir {marker}'\niposix\nsystem\n".encode(),
        lambda: b"\x82" + bytes([EXTENSION]) + b"(" + here + b"tR",
        lambda: b"\x83" + struct.pack("<H", EXTENSION) + here + b"\x85R",
        lambda: b"\x84" + struct.pack("<i", EXTENSION) + here + b"\x85R",
    ]


def program(marker: str, rng: random.Random) -> bytes:
    """Return instructions that leave one value and, if run, make a file `marker`."""
    code = rng.choice(payloads(marker, rng))()
    kind = rng.randrange(5)
    if kind == 0:
        return b"](" + code + b"e"
    if kind == 1:
        return b"}" + text("k") + code + b"s"
    if kind == 2:
        return code + b"0" + text("text")  # the result is dropped
    return code


def plain(marker: str, rng: random.Random) -> bytes:
    """Return a complete pickle, for Python's own loader."""
    return b"\x80\x04" + program(marker, rng) + b"."


def file(marker: str, rng: random.Random) -> bytes:
    """Return a file in PyTorch's form with such instructions at one of many positions."""
    code = program(marker, rng)
    evil = Raw(code)
    storage = ("storage", Raw(b"ctorch\nFloatStorage\n"), "0", "cpu", evil)
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n"
    value = rng.choice(
        [
            {"wte.weight": evil},
            {"wte.weight": 1, "extra": [evil, evil]},
            {evil: 1},
            {"model": {}, "model_args": {"n_layer": evil}, "optimizer": None},
            {"model": {"wte.weight": evil}, "model_args": {}},
            {"model": {}, "model_args": {}, "config": evil},
            Raw(b"ccollections\nOrderedDict\n(" + code + b"tR"),
            Raw(b"ccollections\nOrderedDict\n)R" + code + b"b"),
            Raw(rebuilt + b"(" + code + b"tR"),
            Raw(b"(" + b"".join(Pickle(part).code[2:-1] for part in storage) + b"tQ"),
            Raw(code + b"Q"),
            evil,
        ]
    )
    pickled = b"\x80" + bytes([rng.choice([2, 4])]) + Pickle(value).code[2:]
    bad = b"\x80\x02" + code + b"."
    kind = rng.randrange(7)
    if kind < 3:
        return zip_of(pickled, {})
    if kind == 3:
        return pickled
    parts = [MAGIC, VERSION, MACHINE, pickled, Pickle([]).code]
    if kind > 4:
        parts[rng.choice([1, 2, 4])] = bad
    return b"".join(parts)
