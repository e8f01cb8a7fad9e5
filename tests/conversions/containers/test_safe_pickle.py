"""gptx.conversions.containers.safe_pickle: pickles of tensors, and hostile ones."""

from __future__ import annotations

import json
import pickle
import random as rnd
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter, OrderedDict, deque
from contextlib import nullcontext
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.conversions.containers import safe_pickle, torch_file, torch_globals
from gptx.conversions.containers.safe_pickle import INSTRUCTIONS, Unpickled
from gptx.conversions.containers.torch_globals import (
    IGNORED,
    MAX_NAME_LENGTH,
    TorchStorage,
    TorchTensor,
    storage_of_id,
)
from gptx.errors import WeightsError
from tests.support.files import hostile_pickles
from tests.support.files.torch_files import Pickle, view, zip_of

FILES = 100
SEED = 20
ROOT = Path(__file__).parents[3]


def child(*arguments: object) -> str:
    """Run pickle_child.py; return its output."""
    command = [sys.executable, "-m", "tests.support.pickle_child", *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hostile_files_run_nothing(tmp_path: Path) -> None:
    rng = rnd.Random(SEED)
    for i in range(FILES):
        (tmp_path / f"{i:03d}.bin").write_bytes(hostile_pickles.file(f"m{i}", rng))
    before = sorted(path.name for path in tmp_path.iterdir())
    found = json.loads(child("read", tmp_path))
    assert found["events"] == []
    assert found["left"] == before
    assert found["refused"] == found["files"] == FILES


def test_hostile_files_are_dangerous_for_python(tmp_path: Path) -> None:
    """Python's own loader runs the same programs, so the test above is not vacuous."""
    assert int(child("load", tmp_path, FILES, SEED)) > 0.9 * FILES


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_equals_that_of_python(protocol: int) -> None:
    value: Any = {
        "numbers": [0, 1, 255, 256, 65536, -1, 2**31, -(2**40), 2**100, 1.5, -0.0, float("inf")],
        "others": (True, False, None, "", "ä€𝄞", "x" * 300, (), (1,), (1, 2), (1, 2, 3)),
        "deep": {"list": [[[]]], "dict": {"a": {}}, "long": list(range(3000))},
        "ordered": OrderedDict(b=1, a=2),
    }
    value["again"] = value["numbers"]
    found = Unpickled(pickle.dumps(value, protocol)).value
    assert found == value
    assert found["again"] is found["numbers"]
    assert list(found["ordered"]) == ["b", "a"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_unneeded_values_are_ignored(protocol: int) -> None:
    value = {"set": {1}, "frozen": frozenset([2]), "bytes": b"x" * 300, "number": 2**2000, 3: "x"}
    value["scalar"] = np.float64(1.5)
    value["array"] = bytearray(b"x")
    if protocol < 5:
        del value["array"]
    value |= {"date": date(2020, 1, 1), "time": datetime.now(UTC), "complex": 1j, "root": Path()}
    value |= {"range": range(3), "slice": slice(2), "count": Counter("ab"), "queue": deque([1])}
    found = Unpickled(pickle.dumps(value, protocol)).value
    assert list(found) == [key for key in value if key != 3]
    assert all(item is IGNORED for item in found.values())


def test_tensors_are_described() -> None:
    code = Pickle({"w": view(np.ones((2, 3), np.float32))}).code
    found = Unpickled(code)
    storage = TorchStorage("0", np.dtype("<f4"), 6)
    assert found.value == {"w": TorchTensor(storage, 0, (2, 3), (3, 1))}
    assert found.storages == {"0": storage}
    assert found.end == len(code)


def deep(count: int) -> bytes:
    """Nest lists."""
    return b"]" * (count + 1) + b"a" * count


def laughs(count: int) -> bytes:
    """Make lists that contain the one before two times: 2 ** count items."""
    return b"]q\0" + b"0](h\0h\0eq\0" * count


def keys(count: int) -> bytes:
    """Make integers of one hash."""
    step = sys.hash_info.modulus
    numbers = (b"\x8a\x10" + (i * step).to_bytes(16, "little") + b"N" for i in range(count))
    return b"}(" + b"".join(numbers) + b"u"


def long_names(count: int) -> bytes:
    """Make many keys that are distinct strings of the same characters."""
    name = b"X" + struct.pack("<I", 2**20) + b"n" * 2**20
    return b"}(" + name + b"q\0N" + name + b"q\1N" + b"h\1N" * count + b"u"


BOMBS = {
    "deep list": deep(5_000),
    "deep tuple": b")" + b"\x85" * 5_000,
    "deep tuple as a key": b"})" + b"\x85" * 5_000 + b"Ns",
    "billion laughs": laughs(2_000),
    "billion laughs as a key": b"})" + b"2\x86" * 2_000 + b"Ns",
    "a list in itself": b"]2a",
    "keys of one hash": keys(3_000),
    "long names": long_names(5_000),
    "a large memo": b"N" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i) for i in range(5_000)),
}


REFUSED = ("tensor", "storage")  # these need other values


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("place", ["value", "tensor", "storage", "function"])
def test_bombs_are_harmless(bomb: str, place: str) -> None:
    """They are read or refused at once, in memory proportional to the length of the pickle."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    before, after = {
        "value": (b"", b""),
        "tensor": (rebuild + b"(K\0", b"K\0tR"),
        "storage": (b"(", b"tQ"),
        "function": (b"ctorch\ndevice\n(", b"tR"),
    }[place]
    code = b"\x80\x02" + before + BOMBS[bomb] + after + b"."
    tracemalloc.start()
    with pytest.raises(WeightsError) if place in REFUSED else nullcontext():
        Unpickled(code)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 200 * len(code) + 10_000


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "is_valid"),
    [
        (0, (1,), (2**48,), True),
        (0, (1,), (2**48 + 1,), False),  # NumPy cannot convert all strides
        (0, (0, 2**48), (1, 1), True),
        (0, (0, 2**48 + 1), (1, 1), False),
        (0, (0, 2**40, 2**40), (1, 1, 1), False),
        (0, (3, 2), (2, 1), True),
        (1, (3, 2), (2, 1), False),
        (5, (), (), True),
        (6, (), (), False),
        (6, (0,), (1,), True),
        (7, (0,), (1,), False),
        (0, (1,) * 8, (1,) * 8, True),
        (0, (1,) * 9, (1,) * 9, False),
        (0, (1,), (1, 1), False),
        (-1, (1,), (1,), False),
        (0, (-1,), (1,), False),
        (0, (True,), (1,), False),
    ],
)
def test_bounds_of_a_tensor(
    offset: int, shape: tuple[int, ...], strides: tuple[int, ...], is_valid: bool
) -> None:
    start = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0aX\3\0\0\0cpuK\6tQ"
    rest = [pickle.dumps(part, 2)[2:-1] for part in (offset, shape, strides)]
    code = start + storage + b"".join(rest) + b"tR."
    expected = "a tensor that is not within its storage"
    with nullcontext() if is_valid else pytest.raises(WeightsError, match=expected):
        assert Unpickled(code).value.shape == shape


@pytest.mark.parametrize(
    ("id_", "is_valid"),
    [
        (("storage", np.dtype("<f4"), "a", "cpu", 0), True),
        (("storage", np.dtype("<f4"), "a", "cuda:1", 3), True),
        (("storage", np.dtype("<f4"), "a", "cpu", 3, None), True),
        (("storage", np.dtype("<f4"), "a", "cpu", 3, ("b", 0, 3)), False),  # a view of PyTorch 0.x
        (("storage", np.dtype("<f4"), "a", "cpu", 3, None, None), False),
        (("storage", np.dtype("<f4"), "a", "cpu", -1), False),
        (("storage", np.dtype("<f4"), "a", "cpu", 1.5), False),
        (("storage", np.dtype("<f4"), 7, "cpu", 3), False),
        (("storage", np.dtype("<f4"), "a", "cpu"), False),
        (("storage", "torch FloatStorage", "a", "cpu", 3), False),
        (("module", np.dtype("<f4"), "a", "cpu", 3), False),
        ("storage", False),
        (None, False),
    ],
)
def test_ids_of_storages(id_: Any, is_valid: bool) -> None:
    with nullcontext() if is_valid else pytest.raises(WeightsError, match="a storage of a form"):
        assert storage_of_id(id_) == TorchStorage("a", np.dtype("<f4"), id_[4])


@pytest.mark.parametrize("length", [MAX_NAME_LENGTH, MAX_NAME_LENGTH + 1])
def test_long_names_are_no_keys(length: int) -> None:
    """A dict drops such a key; a storage with one is refused."""
    known = length <= MAX_NAME_LENGTH
    name = b"X" + struct.pack("<I", length) + b"n" * length
    assert len(Unpickled(b"\x80\x02}" + name + b"Ns.").value) == known
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\n" + name + b"NK\1tQ."
    with nullcontext() if known else pytest.raises(WeightsError, match="has a storage of a form"):
        assert list(Unpickled(b"\x80\x02" + storage).storages) == ["n" * length]


@pytest.mark.parametrize(
    "length",
    [b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"B\xff\xff\xff\x7f", b"\x8e" + b"\x7f" * 8,
     b"T\xff\xff\xff\xff", b"T\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"\x8b\0\0\0\x80",
     b"\x96" + b"\x7f" * 8, b"U\xff", b"\x8a\xff", b"c" + b"x" * 300, b"cx\n"],
)  # fmt: skip
def test_lengths_beyond_the_end_are_refused(length: bytes) -> None:
    with pytest.raises(WeightsError, match="is truncated: it has no end"):
        Unpickled(b"\x80\x04" + length + b"ab.")


def test_a_pickle_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 1000
    monkeypatch.setattr(safe_pickle, "MAX_PICKLE_BYTES", n)
    monkeypatch.setattr(safe_pickle, "MAX_INSTRUCTIONS", n // 10)
    with pytest.raises(WeightsError, match="is truncated: it has no end"):
        Unpickled(b"\x80\x02B" + struct.pack("<I", n) + bytes(n) + b".")
    with pytest.raises(WeightsError, match=r"more than \d+ instructions"):
        Unpickled(b"\x80\x02" + b"N0" * 60 + b"N.")


def test_strings_of_python_2_are_latin_1() -> None:
    assert Unpickled(b"U\1\xe4.").value == "ä"
    assert Unpickled(b"T\1\0\0\0\xe4.").value == "ä"


def test_limits_of_a_pickle() -> None:
    with pytest.raises(WeightsError, match="more than 262144 instructions"):
        Unpickled(b"N0" * 2**17 + b"N.")
    with pytest.raises(WeightsError, match="is truncated: it has no end"):
        Unpickled(b"B" + struct.pack("<I", 2**24) + bytes(2**24) + b".")
    assert Unpickled(b"\x8a\x10" + bytes(15) + b"\1.").value == 2**120
    assert Unpickled(b"\x8a\x11" + bytes(16) + b"\1.").value is IGNORED


@pytest.mark.parametrize(
    "code",
    [b"", b".", b"0.", b"a.", b"N", b"Na.", b"h\0.", b"t.", b"1.", b"u.", b"(u.", b"](Nu.",
     b"}(Nu.", b"2.", b"q\0.", b"R.", b"NNR.", b"N)R.", b"\x93.", b"NN\x93.", b"Q.", b"NQ.",
     b")Q.", b"\x86.",
     b"\xff.", b"\0.", b"X\1\0\0\0\xff.", b"ca\xff\nb\n.", b"ctorch\nFloatStorage\n)R.", b"NNs.",
     b"}NNNs.", b"I1\n.", b"L1L\n.", b"S'a'\n.", b"Va\n.", b"F1\n.", b"(l.", b"(d.", b"g0\n.",
     b"Np0\n.", b"P0\n.", b"\x97.", b"\x98.", b"ccollections\nOrderedDict\n(]tR."],
)  # fmt: skip
def test_nonsense_is_refused(code: bytes) -> None:
    with pytest.raises(WeightsError):
        Unpickled(code)


def test_a_random_program_has_a_value_or_is_refused(random: np.random.Generator) -> None:
    codes = list(INSTRUCTIONS)
    refused = 0
    for _ in range(1000):
        program = bytes(random.choice(codes, 30).tolist()) + random.bytes(3) + b"."
        try:
            Unpickled(program)
        except WeightsError:
            refused += 1
    assert refused > 20


def test_a_global_is_shown_in_one_short_line() -> None:
    with pytest.raises(WeightsError, match=r"names posix\.system, which no tensor needs") as info:
        Unpickled(b"\x80\x02cposix\nsystem\n.")
    assert "\n" not in str(info.value)
    long = b"X\xc8\0\0\0" + b"\x1b\n" * 100
    with pytest.raises(WeightsError, match="which no tensor needs") as info:
        Unpickled(b"\x80\x04" + long + long + b"\x93.")
    assert str(info.value).isprintable()
    assert len(str(info.value)) < 600


@pytest.mark.parametrize("names", [(b"x", b"n" * 201), (b"n" * 201, b"x")])
def test_a_global_with_a_long_name_is_refused(names: tuple[bytes, bytes]) -> None:
    """A file could join one long string with many others, which takes any amount of memory."""
    code = b"".join(b"X" + struct.pack("<I", len(name)) + name for name in names)
    with pytest.raises(WeightsError, match="a global without a name of at most 200 characters"):
        Unpickled(b"\x80\x04" + code + b"\x93.")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("torch._utils\n_rebuild_sparse_tensor", "torch._utils._rebuild_sparse_tensor"),
        ("torch._utils\n_rebuild_meta_tensor_no_storage", "meta_tensor_no_storage"),
        ("torch.serialization\n_get_layout", "torch.serialization._get_layout"),
        ("torch._tensor\n_rebuild_from_type", "torch._tensor._rebuild_from_type"),
    ],
)
def test_tensors_of_other_kinds_are_named(name: str, shown: str) -> None:
    with pytest.raises(WeightsError, match=rf"a kind that gptx does not read \(.*{shown}\): save"):
        Unpickled(b"\x80\x02c" + name.encode() + b"\n)R.")


@pytest.mark.parametrize(
    "kind", ["torch\nComplexFloatStorage", "torch\nQInt8Storage", "torch.storage\nUntypedStorage"]
)
def test_storages_of_other_types_are_named(kind: str) -> None:
    """PyTorch writes an untyped storage for float8 and for unsigned integers."""
    id_ = b"(X\7\0\0\0storagec" + kind.encode() + b"\nX\1\0\0\0aX\3\0\0\0cpuK\1t"
    with pytest.raises(WeightsError, match=f"of the type {kind.replace(chr(10), '[.]')}, which"):
        Unpickled(b"\x80\x02" + id_ + b"Q.")
    other = id_.replace(kind.encode(), b"posix\nsystem")
    with pytest.raises(WeightsError, match="a storage of a form that PyTorch does not write"):
        Unpickled(b"\x80\x02" + other + b"Q.")


@pytest.mark.parametrize(
    ("function", "is_read"),
    [("_rebuild_tensor_v2", True), ("_rebuild_parameter", False), ("_rebuild_qtensor", False)],
)
def test_a_tensor_with_attributes(function: str, is_read: bool) -> None:
    """Only a tensor: another function could nest such calls."""
    plain = Pickle(view(np.ones((2, 3), np.float32))).code[2:-1]
    name, arguments = plain.split(b"\n_rebuild_tensor_v2\n")
    code = b"ctorch._tensor\n_rebuild_from_type_v2\n(" + name + b"\n" + function.encode()
    code += b"\nctorch\nTensor\n" + arguments.removesuffix(b"R") + b"}X\1\0\0\0aK\1stR"
    with nullcontext() if is_read else pytest.raises(WeightsError, match="of a class that gptx"):
        found = Unpickled(b"\x80\x02" + code + b".")
        assert found.value == TorchTensor(found.storages["0"], 0, (2, 3), (3, 1))


class Settings:
    """A class of a training script."""

    def __init__(self) -> None:
        self.width = 8


class Items(dict[str, int]):
    """Like Lightning's AttributeDict."""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_of_a_class_are_ignored(protocol: int) -> None:
    value = {"a": Settings(), "b": Items(x=1), "c": [Settings()], "d": 3}
    found = Unpickled(pickle.dumps(value, protocol)).value
    assert found == {"a": IGNORED, "b": IGNORED, "c": [IGNORED], "d": 3}


@pytest.mark.parametrize(
    "code",
    [
        b"cposix\nsystem\n)R",  # called as a function
        b"cposix\nsystem\n0N",  # named, then dropped
        b"cposix\nsystem\nX\1\0\0\0x\x85\x81",  # made with an argument
        b"cposix\nsystem\n)}\x92",
        b"ca\nB\n)\x81cposix\nsystem\n\x86",  # beside an object
        b"ca\nB\n)\x81}X\1\0\0\0xcposix\nsystem\nsb",  # in the state of an object
    ],
)
def test_other_uses_of_a_global_are_refused(code: bytes) -> None:
    with pytest.raises(WeightsError, match=r"names posix\.system, which no tensor needs"):
        Unpickled(b"\x80\x04" + code + b".")


def test_pickle_is_not_imported() -> None:
    """The modules of the reader have no reference to Python's own loader."""
    for module in (safe_pickle, torch_file, torch_globals):
        assert not hasattr(module, "pickle")


def test_an_archive_with_two_pickles_is_refused(tmp_path: Path) -> None:
    from gptx.conversions.containers.torch_file import TorchFile

    file = tmp_path / "m.bin"
    file.write_bytes(zip_of(Pickle({}).code, {"../b/data.pkl": np.zeros(1)}))
    with pytest.raises(WeightsError, match=r"the archive has 2 files data\.pkl"):
        TorchFile(file)
