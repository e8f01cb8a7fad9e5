"""gptx.conversions.containers.tensor_bundle, against an independent writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.conversions.containers import tensor_bundle
from gptx.conversions.containers.tensor_bundle import TensorBundle, is_bundle
from gptx.errors import NotFoundError, StorageError, WeightsError
from gptx.safetensors_file import BFLOAT16
from tests.support.files.tensor_bundle_bytes import MAGIC, message, table, write_bundle

TENSORS = {
    f"scope/{kind}{i}": np.arange(i * 7 + 1, dtype=dtype).reshape(1, -1)
    for i in range(9)
    for kind, dtype in [("f", "<f4"), ("h", "<f2"), ("d", "<f8"), ("b", "<u2")]
}


class TestReading:
    @pytest.mark.parametrize("shards", [1, 2, 5])
    @pytest.mark.parametrize("per_block", [1, 7, 100])
    def test_every_tensor_is_read(self, tmp_path: Path, shards: int, per_block: int) -> None:
        index = write_bundle(tmp_path / "x", TENSORS, shards=shards, per_block=per_block)
        bundle = TensorBundle(index)
        bundle.check_files()
        assert list(bundle.entries) == sorted(TENSORS)
        assert len(bundle.sizes) == shards
        for name, tensor in TENSORS.items():
            found = bundle.read(name)
            assert found.shape == tensor.shape
            assert found.tobytes() == tensor.tobytes()
            assert found.dtype == (BFLOAT16 if "/b" in name else tensor.dtype)

    def test_a_tensor_of_another_type_is_refused_on_request(self, tmp_path: Path) -> None:
        tensors = {"a": np.ones(3, "<f4"), "step": np.array(7, "<i8"), "z": np.ones((2, 0), "<f4")}
        bundle = TensorBundle(write_bundle(tmp_path / "x", tensors))
        bundle.check_files()
        assert (bundle.read("a") == 1).all()
        assert bundle.entries["step"].shape == ()
        with pytest.raises(WeightsError, match="step is of TensorFlow's type 9, expected float32"):
            bundle.read("step")

    def test_is_bundle(self, tmp_path: Path) -> None:
        index = write_bundle(tmp_path / "x", TENSORS)
        assert is_bundle(index)
        (tmp_path / "x.data-00000-of-00001").rename(tmp_path / "elsewhere")
        assert is_bundle(index)
        index.write_bytes(b"something else")
        assert not is_bundle(index)
        assert not is_bundle(tmp_path / "nothing.index")


def changed(name: str, **fields: Any) -> Callable[[str, dict[int, Any]], None]:
    def change(at: str, found: dict[int, Any]) -> None:
        if at == name:
            found.update({int(number[1:]): value for number, value in fields.items()})

    return change


A = "scope/f0"  # a tensor [1, 1] of float32


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "fields", "words"),
        [
            ("", {"_2": 1}, "big-endian"),
            ("", {"_3": message({2: 2})}, "has version 2, expected 1"),
            ("", {"_1": 0}, "is in file 0 of 0"),
            ("", {"_1": -1}, "is in file 0 of -1"),
            ("", {"_3": 1}, "field 3 of a message has another type"),
            (A, {"_3": 1}, "is in file 1 of 1"),
            (A, {"_3": -1}, "is in file -1 of 1"),
            (A, {"_4": -1}, "offset and size"),
            (A, {"_5": -4}, "offset and size"),
            (A, {"_5": 8}, r"shape \[1, 1\] has 8 bytes"),
            (A, {"_2": message({2: [message({1: 2**62})] * 2})}, "has 4 bytes"),
            (A, {"_2": message({2: [message({1: -1})]})}, "has shape"),
            (A, {"_2": message({2: [message({1: 1})] * 9})}, "has shape"),
            (A, {"_2": b"\xff"}, "a number is truncated"),
            (A, {"_2": b"\xff" * 11}, "more than 64 bits"),
            (A, {"_2": b"\x12\x05a"}, "a message is truncated"),
            (A, {"_2": b"\x13"}, "a field of wire type 3"),
            (A, {"_6": (1,)}, "checksum of scope/f0 differs"),
            (A, {"_7": b""}, "is stored in slices"),
            (A, {"_1": 3}, "type 3"),
        ],
    )
    def test_invalid_fields(
        self, tmp_path: Path, name: str, fields: dict[str, Any], words: str
    ) -> None:
        index = write_bundle(tmp_path / "x", TENSORS, change=changed(name, **fields))
        with pytest.raises(WeightsError, match=words):
            TensorBundle(index).read(A)

    def test_data_beyond_the_end(self, tmp_path: Path) -> None:
        index = write_bundle(tmp_path / "x", TENSORS, change=changed(A, _4=10**6))
        with pytest.raises(WeightsError, match="truncated"):
            TensorBundle(index).check_files()
        with pytest.raises(WeightsError, match="truncated"):
            TensorBundle(index).read(A)

    def test_blocks_that_are_listed_more_than_once(self, tmp_path: Path) -> None:
        assert list(TensorBundle(write_bundle(tmp_path / "x", TENSORS, again=1)).entries)
        with pytest.raises(WeightsError, match="its blocks are not in order"):
            TensorBundle(write_bundle(tmp_path / "x", TENSORS, again=2))

    def test_compressed(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"compressed \(method 1\), which is not supported"):
            TensorBundle(write_bundle(tmp_path / "x", TENSORS, compression=1))

    def test_slices_are_not_tensors(self, tmp_path: Path) -> None:
        slices = {"\0\x7f": np.ones(2, "<f4"), "\0\x80": np.ones(2, "<f4")}
        index = write_bundle(tmp_path / "x", slices | TENSORS, change=changed(A, _7=b""))
        bundle = TensorBundle(index)
        bundle.check_files()
        assert len(bundle.entries) == len(TENSORS) + 2
        with pytest.raises(WeightsError, match=f"{A} is stored in slices"):
            bundle.read(A)

    def test_names_out_of_order(self, tmp_path: Path) -> None:
        damage = {"scope/f1": b"scope/f0", "scope/f3": b"scope/f4"}
        for old, new in damage.items():
            index = write_bundle(
                tmp_path / "x",
                TENSORS,
                per_block=1,
                damage=lambda block, old=old, new=new: block.replace(old.encode(), new),
            )
            with pytest.raises(WeightsError, match="not in order"):
                TensorBundle(index)

    @pytest.mark.parametrize("name", [b"a\nb", b"n" * 251])
    def test_invalid_names(self, tmp_path: Path, name: bytes) -> None:
        tensors = {"n" * len(name): np.ones(1, "<f4")}
        index = write_bundle(
            tmp_path / "x", tensors, damage=lambda block: block.replace(b"n" * len(name), name)
        )
        with pytest.raises(WeightsError, match=r"a name is|an entry of a block is invalid"):
            TensorBundle(index)

    def test_too_long_an_index(self, tmp_path: Path) -> None:
        index = write_bundle(tmp_path / "x", TENSORS)
        index.write_bytes(bytes(2**20) + index.read_bytes())
        with pytest.raises(WeightsError, match="expected at most 1048576"):
            TensorBundle(index)

    def test_no_header(self, tmp_path: Path) -> None:
        index = tmp_path / "x.index"
        for entries in ([], [(b"name", b"")]):
            index.write_bytes(table(entries))
            with pytest.raises(WeightsError, match="its header is missing"):
                TensorBundle(index)

    def test_files_missing_or_of_another_length(self, tmp_path: Path) -> None:
        bundle = TensorBundle(write_bundle(tmp_path / "x", TENSORS, shards=2))
        bundle.check_files()
        second = tmp_path / "x.data-00001-of-00002"
        data = second.read_bytes()
        for wrong, words in ((data[:-1], "truncated"), (data + b"\0", "too long")):
            second.write_bytes(wrong)
            with pytest.raises(
                WeightsError, match=f"{second.name} is {words}.* expected {len(data)} by its index"
            ):
                bundle.check_files()
        second.unlink()
        with pytest.raises(NotFoundError, match=f"{second.name} is missing"):
            bundle.check_files()
        (tmp_path / "x.data-00000-of-00002").rename(tmp_path / "x.data-00000-of-00001")
        with pytest.raises(WeightsError, match=r"but found x\.data-00000-of-00001"):
            bundle.check_files()

    def test_index_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError):
            TensorBundle(tmp_path / "x.index")

    def test_damaged_numbers(self, tmp_path: Path) -> None:
        bundle = TensorBundle(write_bundle(tmp_path / "x", TENSORS))
        (path,) = bundle.sizes
        data = bytearray(path.read_bytes())
        entry = bundle.entries["scope/d3"]
        data[entry.offset] ^= 1
        path.write_bytes(data)
        bundle.check_files()
        with pytest.raises(WeightsError, match=r"checksum of scope/d3 differs.: fetch it again"):
            bundle.read("scope/d3")
        assert bundle.read("scope/d4").size == 29


class TestLimits:
    """The last value that is accepted, and the first that is not."""

    def test_the_size_of_an_index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        index = write_bundle(tmp_path / "x", TENSORS)
        size = index.stat().st_size
        monkeypatch.setattr(tensor_bundle, "MAX_INDEX_BYTES", size)
        assert TensorBundle(index).entries
        monkeypatch.setattr(tensor_bundle, "MAX_INDEX_BYTES", size - 1)
        with pytest.raises(WeightsError, match=f"it has {size} bytes, expected at most {size - 1}"):
            TensorBundle(index)

    def test_the_length_of_a_name(self, tmp_path: Path) -> None:
        name = "n" * 249  # the key of its block is longer by one
        assert list(TensorBundle(write_bundle(tmp_path / "x", {name: np.ones(1, "<f4")})).entries)
        tensors = {"n" * 200: np.ones(1, "<f4"), "n" * 250: np.ones(1, "<f4")}
        with pytest.raises(WeightsError, match="an entry of a block is invalid"):
            TensorBundle(write_bundle(tmp_path / "x", tensors))

    def test_the_number_of_dimensions(self, tmp_path: Path) -> None:
        tensors = {"a": np.ones((1,) * 8, "<f4")}
        bundle = TensorBundle(write_bundle(tmp_path / "x", tensors))
        assert bundle.read("a").shape == (1,) * 8

    def test_an_index_of_the_smallest_size(self, tmp_path: Path) -> None:
        index = tmp_path / "x.index"
        index.write_bytes(bytes(40) + MAGIC)
        assert is_bundle(index)
        index.write_bytes(bytes(39) + MAGIC)
        assert not is_bundle(index)
        with pytest.raises(WeightsError, match="its end is invalid: perhaps it is truncated"):
            TensorBundle(index)

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        assert not is_bundle(tmp_path / "no" / "x.index")

    def test_data_beside_something_else(self, tmp_path: Path) -> None:
        index = write_bundle(tmp_path / "x", TENSORS)
        index.write_bytes(b"damaged")
        assert is_bundle(index)


SHAPE = message({2: [message({1: 1})] * 2})  # [1, 1]


class TestMessages:
    @pytest.mark.parametrize(
        "fields",
        [
            {"_2": SHAPE + bytes([15 << 3 | 1]) + bytes(8)},  # unknown fields of each wire type
            {"_2": SHAPE + bytes([15 << 3 | 5]) + bytes(4)},
            {"_2": SHAPE + bytes([15 << 3 | 2, 3]) + b"abc"},
            {"_2": SHAPE + bytes([15 << 3, 0x80, 1])},
            {"_2": [message({2: [message({1: 9})]}), SHAPE]},  # the last one counts
            {"_1": [9, 1]},
            {"_2": message({2: [message({1: [9, 1]})] * 2})},
        ],
    )
    def test_the_same_tensor(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        index = write_bundle(tmp_path / "x", TENSORS, change=changed(A, **fields))
        np.testing.assert_array_equal(TensorBundle(index).read(A), TENSORS[A])

    @pytest.mark.parametrize(
        ("shape", "words"),
        [
            (bytes([15 << 3 | 1]) + bytes(7), "a message is truncated"),
            (bytes([15 << 3 | 5]) + bytes(3), "a message is truncated"),
            (bytes([15 << 3 | 2, 3]) + b"ab", "a message is truncated"),
            (bytes([15 << 3, 0x80]), "a number is truncated"),
            (b"\xff" * 10 + b"\x01", "a number has more than 64 bits"),
            (bytes([15 << 3 | 4]), "a field of wire type 4"),
            (bytes([15 << 3 | 7]), "a field of wire type 7"),
            (bytes([2 << 3, 1]), "field 2 of a message has another type"),
        ],
    )
    def test_invalid_fields(self, tmp_path: Path, shape: bytes, words: str) -> None:
        index = write_bundle(tmp_path / "x", TENSORS, change=changed(A, _2=shape))
        with pytest.raises(WeightsError, match=words):
            TensorBundle(index)

    def test_a_number_has_64_bits(self, tmp_path: Path) -> None:
        dim = bytes([1 << 3]) + b"\x81" + b"\x80" * 8 + b"\x7e"  # 1, and bits beyond the 64th
        shape = message({2: [dim, message({1: 1})]})
        index = write_bundle(tmp_path / "x", TENSORS, change=changed(A, _2=shape))
        assert TensorBundle(index).entries[A].shape == (1, 1)

    def test_the_version(self, tmp_path: Path) -> None:
        for version in ({2: 1}, {1: 7}):
            header = changed("", _3=message(version))
            assert TensorBundle(write_bundle(tmp_path / "x", TENSORS, change=header)).entries


class TestBlocks:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "a block is too short"),
            (b"\0\0\0", "a block is too short"),
            (b"\1\0\0\0", "a block is too short"),
            (b"\1\0\0" + bytes(8), "an entry of a block is invalid"),  # shares before the first
            (b"\0\7\0abc" + bytes(4), "an entry of a block is invalid"),  # a key beyond the end
            (b"\0\1\7a" + bytes(4), "an entry of a block is invalid"),  # a value beyond it
            (b"\0" + bytes(4), "an entry of a block is invalid|its header is missing"),
        ],
    )
    def test_invalid_blocks(self, tmp_path: Path, content: bytes, words: str) -> None:
        data = table([(b"", b"x")], damage=lambda block: content if b"x" in block else block)
        (tmp_path / "x.index").write_bytes(data)
        with pytest.raises(WeightsError, match=words):
            TensorBundle(tmp_path / "x.index")

    def test_a_block_of_another_checksum(self, tmp_path: Path) -> None:
        index = write_bundle(tmp_path / "x", TENSORS)
        data = bytearray(index.read_bytes())
        data[9] ^= 1
        index.write_bytes(data)
        with pytest.raises(WeightsError, match="the checksum of a block differs"):
            TensorBundle(index)

    def test_an_empty_block(self, tmp_path: Path) -> None:
        (tmp_path / "x.index").write_bytes(table([(b"", message({1: 1}))], again=1))
        bundle = TensorBundle(tmp_path / "x.index")
        assert (bundle.entries, bundle.sizes, bundle.n_shards) == ({}, {}, 1)
