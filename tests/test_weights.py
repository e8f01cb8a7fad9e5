"""Weights and the files under them: what is read, what is refused, and files written whole."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from conftest import make_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import CASES, random_weights, to_bfloat16, write_model

from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.errors import DataError, StorageError, WeightsError
from gptx.files import DTYPES, atomic_write, read_safetensors, widened
from gptx.weights import check_weights, read_weights, to_backend

# The smallest model there can be: its file is little more than a header.
MICRO = GPT2Config(vocab_size=3, n_positions=2, n_embd=2, n_layer=1, n_head=1)
DATA = np.array([1.5, -2.0], "<f4").tobytes()


def entry(dtype: str = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of any header (an object, or its bytes), said to be `length` bytes long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], dict[str, np.ndarray]]:
    """Read a file of the given bytes."""
    path = tmp_path / "file.safetensors"

    def read(data: bytes) -> dict[str, np.ndarray]:
        path.unlink(missing_ok=True)  # an earlier one may still be mapped
        path.write_bytes(data)
        return read_safetensors(path)[0]

    return read


@pytest.fixture
def refuse(read: Any, tmp_path: Path) -> Callable[..., None]:
    """Expect such a file to be refused, in one line that names it."""

    def refuse(data: bytes, says: str = "") -> None:
        with pytest.raises(WeightsError) as caught:
            read(data)
        message = str(caught.value)
        assert str(tmp_path / "file.safetensors") in message
        assert says in message
        assert "\n" not in message

    return refuse


def weights_path(folder: Path, weights: Any = None, config: Any = MICRO, **options: Any) -> Path:
    found = random_weights(config) if weights is None else weights
    return write_model(folder, config, found, **options) / "model.safetensors"


# Reading what is right


def test_float32_is_mapped_and_not_copied(tmp_path: Path) -> None:
    expected = random_weights(MICRO)
    found = read_weights([weights_path(tmp_path)], MICRO)
    assert list(found) == list(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.dtype == np.float32
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_float32_reaches_numpy_without_a_copy(tmp_path: Path) -> None:
    found = read_weights([weights_path(tmp_path)], MICRO)
    tree = to_backend(found, make_backend("numpy"))
    assert np.shares_memory(tree.wte.weight, found["wte.weight"])


def test_float16_is_kept(tmp_path: Path) -> None:
    expected = random_weights(MICRO)
    for name, array in read_weights([weights_path(tmp_path, dtype="float16")], MICRO).items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, expected[name].astype(np.float16))
        assert not array.flags.owndata


BFLOAT16 = {
    0x0000: 0.0,
    0x8000: -0.0,
    0x3F80: 1.0,
    0xC000: -2.0,
    0x3EAB: 0.333984375,
    0x4049: 3.140625,
    0x7F7F: 2.0**127 * (2 - 2**-7),
    0x0080: 2.0**-126,
    0x0001: 2.0**-133,
    0x7F80: np.inf,
    0xFF80: -np.inf,
    0x7FC0: np.nan,
}


def test_bfloat16_becomes_float32_exactly(read: Any) -> None:
    data = struct.pack(f"<{len(BFLOAT16)}H", *BFLOAT16)
    mapped = read(safetensors({"a": entry("BF16", [3, 4], 0, 24)}, data))["a"]
    assert mapped.nbytes == 24
    array = widened(mapped)
    expected = np.array(list(BFLOAT16.values()), np.float32).reshape(3, 4)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(np.signbit(array), np.signbit(expected))


def test_bfloat16_model(tmp_path: Path) -> None:
    found = read_weights([weights_path(tmp_path, dtype="bfloat16")], MICRO)
    for name, array in random_weights(MICRO).items():
        wide = widened(found[name])
        np.testing.assert_array_equal(to_bfloat16(wide), to_bfloat16(array))
        np.testing.assert_allclose(wide, array, rtol=2**-8)
        assert not found[name].flags.owndata


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "BF16"])
def test_types_come_as_they_are(read: Any, dtype: str) -> None:
    kind = np.dtype(DTYPES[dtype])
    expected = np.array([[0, 1], [1, 0], [1, 1]], kind)
    header = {"a": entry(dtype, [3, 2], 0, expected.nbytes)}
    array = read(safetensors(header, expected.tobytes()))["a"]
    assert array.dtype == kind
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("pad", range(8))
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_data_may_lie_anywhere(read: Any, dtype: str, pad: int) -> None:
    """The header's length decides where the data begins, and it need not be a multiple of 8."""
    bits = {"F64": [1.5, -2.0], "F32": [1.5, -2.0], "F16": [1.5, -2.0], "BF16": [0x3FC0, 0xC000]}
    data = np.array(bits[dtype], DTYPES[dtype]).tobytes()
    header = json.dumps({"a": entry(dtype, [2], 0, len(data))}).encode() + b" " * pad
    assert widened(read(safetensors(header, data))["a"]).tolist() == [1.5, -2.0]


@pytest.mark.parametrize(("dtype", "shape"), [("F32", [2]), ("F16", [4]), ("BF16", [4])])
@pytest.mark.parametrize("pad", [0, 1])
def test_arrays_are_read_only(read: Any, dtype: str, shape: list[int], pad: int) -> None:
    """So is what had to be copied, so that nobody writes to weights where it happens to work."""
    header = json.dumps({"a": entry(dtype, shape)}).encode()
    aligned = header + b" " * (-len(header) % 8)
    assert not read(safetensors(aligned + b" " * pad, DATA))["a"].flags.writeable


def test_shapes_without_numbers(read: Any) -> None:
    header = {"scalar": entry(shape=[], end=4), "none": entry(shape=[0, 3], begin=4, end=4)}
    found = read(safetensors(header, DATA[:4]))
    assert (found["scalar"].shape, found["scalar"].item()) == ((), 1.5)
    assert found["none"].shape == (0, 3)


def test_tensors_in_another_order_than_their_data(read: Any) -> None:
    header = {"a": entry(shape=[1], begin=4, end=8), "b": entry(shape=[1], begin=0, end=4)}
    found = read(safetensors(header, DATA))
    assert (found["a"].item(), found["b"].item()) == (-2.0, 1.5)


@pytest.mark.parametrize(
    ("text", "expected"), [('{"k": "v"}', {"k": "v"}), ("{}", {}), ("null", {})]
)
def test_metadata(tmp_path: Path, text: str, expected: dict[str, str]) -> None:
    path = tmp_path / "a.safetensors"
    header = f'{{"__metadata__": {text}, "a": {json.dumps(entry())}}}'
    path.write_bytes(safetensors(header.encode(), DATA))
    tensors, metadata = read_safetensors(path)
    assert list(tensors) == ["a"]
    assert metadata == expected


# Damaged files


def test_every_truncation_is_refused(tmp_path: Path, refuse: Any) -> None:
    whole = weights_path(tmp_path / "micro").read_bytes()
    assert len(whole) < 3000
    for length in range(len(whole)):
        refuse(whole[:length])


def test_anything_after_the_data_is_refused(read: Any, refuse: Any) -> None:
    good = safetensors({"a": entry()}, DATA)
    assert list(read(good)) == ["a"]
    refuse(good + b"\0")


GOOD = json.dumps({"a": entry()}).encode()
BAD_FILES = {
    "empty": b"",
    "no JSON": safetensors(b"<html>404 Not Found</html>", DATA),
    "JSON that ends early": safetensors(GOOD[:-1], DATA),
    "not UTF-8": safetensors(GOOD.replace(b"a", b"\xff", 1), DATA),
    "a list": safetensors([1, 2], DATA),
    "null": safetensors(None, DATA),
    "no header": safetensors(b"", DATA),
    "brackets without end": safetensors(b"[" * 100_000, DATA),
    "objects without end": safetensors(b'{"a":' * 20_000, DATA),
    "a header that is shorter than it says": safetensors(GOOD, DATA, len(GOOD) + 5),
    "a header that is longer than the file": safetensors(GOOD, DATA, 1_000_000),
    "a header of 2^63 bytes": safetensors(GOOD, DATA, 2**63),
    "a header of 2^64 - 1 bytes": safetensors(GOOD, DATA, 2**64 - 1),
    "a header that is longer than it says": safetensors(GOOD, DATA, len(GOOD) - 3),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a pickle": b"PK\x03\x04" + bytes(200),
    "an entry that is a number": safetensors({"a": 5}, DATA),
    "an entry without a shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA),
    "an entry without offsets": safetensors({"a": {"dtype": "F32", "shape": [2]}}, DATA),
    "offsets past the end": safetensors({"a": entry(shape=[4], end=16)}, DATA),
    "offsets that end before they begin": safetensors({"a": entry(begin=8, end=0)}, DATA),
    "negative offsets": safetensors({"a": entry(begin=-8, end=0)}, DATA),
    "offsets that are text": safetensors({"a": entry(begin="0", end="8")}, DATA),
    "huge offsets": safetensors({"a": entry(begin=0, end=2**64)}, DATA),
    "offsets that overlap": safetensors({"a": entry(), "b": entry(begin=4, end=12)}, DATA + DATA),
    "a gap": safetensors({"a": entry(), "b": entry(begin=12, end=20)}, DATA + DATA + DATA),
    "a gap at the start": safetensors({"a": entry(begin=8, end=16)}, DATA + DATA),
    "the same data twice": safetensors({"a": entry(), "b": entry()}, DATA),
    "data that nothing names": safetensors({"a": entry(shape=[1], end=4)}, DATA),
    "a shape that is too small": safetensors({"a": entry(shape=[1])}, DATA),
    "a shape that is too large": safetensors({"a": entry(shape=[3])}, DATA),
    "a negative shape": safetensors({"a": entry(shape=[-2])}, DATA),
    "two negative sizes": safetensors({"a": entry(shape=[-1, -2])}, DATA),
    "a fractional shape": safetensors({"a": entry(shape=[2.0])}, DATA),
    "a shape that overflows": safetensors({"a": entry(shape=[2**62, 2**62])}, DATA),
    "a shape that overflows to its size": safetensors({"a": entry(shape=[2**62 + 2, 4])}, DATA),
    "a shape that is no list": safetensors({"a": entry(shape=2)}, DATA),
    "nothing in a huge shape": safetensors({"a": entry(shape=[0, 2**62], end=0)}),
    "nothing in a larger shape": safetensors({"a": entry(shape=[0, 2**64 - 1], end=0)}),
    "too many dimensions": safetensors({"a": entry(shape=[1] * 70 + [2])}, DATA),
    "metadata that is no text": safetensors({"__metadata__": {"k": 1}, "a": entry()}, DATA),
    "metadata that is a list": safetensors({"__metadata__": ["k"], "a": entry()}, DATA),
    "a key twice in an entry": safetensors(
        GOOD.replace(b'"shape"', b'"shape":[1,2],"shape"'), DATA
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_files(refuse: Any, case: str) -> None:
    refuse(BAD_FILES[case])


@pytest.mark.parametrize("second", [entry(), entry("I32", [1, 2]), entry("F16", [4])])
def test_a_name_twice_is_refused(refuse: Any, second: dict[str, Any]) -> None:
    """The format forbids it, because readers differ in which of the two they take."""
    header = f'{{"a": {json.dumps(entry())}, "a": {json.dumps(second)}}}'
    refuse(safetensors(header.encode(), DATA))


@pytest.mark.parametrize(("dtype", "shape"), [("F8_E4M3", [8]), ("F8_E5M2", [8]), ("F8_E8M0", [8])])
def test_types_that_are_not_read(refuse: Any, dtype: str, shape: list[int]) -> None:
    refuse(safetensors({"wte.weight": entry(dtype, shape)}, DATA), f"wte.weight is of type {dtype}")


@pytest.mark.parametrize("dtype", ["F31", "float32", "f32", ""])
def test_types_that_do_not_exist(refuse: Any, dtype: str) -> None:
    refuse(safetensors({"a": entry(dtype)}, DATA))


def test_a_name_with_a_line_end_stays_in_one_line(refuse: Any) -> None:
    refuse(safetensors({"a\nb": entry("F8_E4M3", [8])}, DATA), "is of type F8_E4M3")


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        read_safetensors(tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.safetensors cannot be read"):
        read_safetensors(tmp_path / "none.safetensors")


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = weights_path(tmp_path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(StorageError, match="cannot be read"):
        read_safetensors(path)


def test_a_file_that_breaks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    path = weights_path(tmp_path)
    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(StorageError, match=r"cannot be read \(Input/output error\)"):
        read_safetensors(path)


WHOLE: list[bytes] = []


@pytest.fixture(scope="module")
def mutant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("mutants")
    WHOLE.append(weights_path(folder).read_bytes())
    yield folder / "mutant.safetensors"
    WHOLE.clear()


# Where, from 0 to 1 of the file; what comes in; how many bytes go, or None for as many.
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.one_of(
            st.sampled_from([b"0", b"1", b"2", b"3", b"12", b"6", b"I", b"B", b"a", b".", b" "]),
            st.sampled_from([b"9" * 20, b"-", b"[", b"]", b"null", b'"', b",", b"16", b"64"]),
            st.binary(max_size=4),
        ),
        st.one_of(st.none(), st.integers(0, 8)),
    ),
    min_size=1,
    max_size=2,
)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(edits=EDITS)
def test_a_mutant_is_read_or_refused(
    mutant: Path, edits: list[tuple[float, bytes, int | None]]
) -> None:
    data = WHOLE[0]
    for where, new, gone in edits:
        at = int(where * len(data))
        data = data[:at] + new + data[at + (len(new) if gone is None else gone) :]
    mutant.unlink(missing_ok=True)
    mutant.write_bytes(data)
    try:
        found = read_weights([mutant], MICRO)
    except (DataError, StorageError):
        return
    assert {name: array.shape for name, array in found.items()} == MICRO.tensor_shapes()
    assert sum(len(array.tobytes()) for array in found.values())  # each byte can be touched


# The tensors of a model


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_prefix_and_shards(tmp_path: Path, prefix: str, shards: int) -> None:
    config = CASES["untied"]
    expected = random_weights(config)
    write_model(tmp_path, config, expected, prefix=prefix, shards=shards)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == shards
    found = read_weights(paths, config)
    assert set(found) == set(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_mask_buffers_are_dropped(tmp_path: Path, prefix: str) -> None:
    masks = {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 2, 2), np.float32)),
        "h.0.attn.masked_bias": np.array(-1e4, np.float32),
    }
    path = weights_path(tmp_path, random_weights(MICRO) | masks, prefix=prefix)
    assert set(read_safetensors(path)[0]) > {prefix + name for name in masks}
    assert set(read_weights([path], MICRO)) == set(MICRO.tensor_shapes())


def test_a_tied_head_that_is_stored_all_the_same_is_dropped(tmp_path: Path) -> None:
    weights = random_weights(MICRO)
    path = weights_path(tmp_path, weights | {"lm_head.weight": weights["wte.weight"]})
    assert "lm_head.weight" in read_safetensors(path)[0]
    assert "lm_head.weight" not in read_weights([path], MICRO)


def test_an_untied_head_is_required(tmp_path: Path) -> None:
    config = CASES["untied"]
    weights = random_weights(config)
    assert "lm_head.weight" in read_weights([weights_path(tmp_path, weights, config)], config)
    del weights["lm_head.weight"]
    path = weights_path(tmp_path, weights, config)
    with pytest.raises(WeightsError, match=r"^tensor lm_head\.weight is missing"):
        read_weights([path], config)


def test_missing_tensors_are_named() -> None:
    weights = random_weights(MICRO)
    del weights["h.0.mlp.c_fc.bias"]
    with pytest.raises(WeightsError, match=r"^tensor h\.0\.mlp\.c_fc\.bias is missing"):
        check_weights(weights, MICRO)
    del weights["ln_f.weight"]
    with pytest.raises(WeightsError, match=r"h\.0\.mlp\.c_fc\.bias, ln_f\.weight are missing"):
        check_weights(weights, MICRO)
    with pytest.raises(WeightsError, match=r"^tensors .*wte.* and 13 more are missing"):
        check_weights({}, MICRO)


def test_unknown_tensors_are_named() -> None:
    weights = random_weights(MICRO)
    extra = np.zeros(2, np.float32)
    with pytest.raises(WeightsError, match=r"^tensor h\.1\.ln_1\.bias is unknown"):
        check_weights(weights | {"h.1.ln_1.bias": extra}, MICRO)
    with pytest.raises(WeightsError, match=r"^tensors x, y are unknown"):
        check_weights(weights | {"x": extra, "y": extra}, MICRO)


@pytest.mark.parametrize("shape", [(2, 6, 1), (6, 2), (12,), (2, 5), ()])
def test_misshapen_tensors_are_named(shape: tuple[int, ...]) -> None:
    """(6, 2) is the layout of torch.nn.Linear, where the Hub has Conv1D."""
    weights = random_weights(MICRO) | {"h.0.attn.c_attn.weight": np.zeros(shape, np.float32)}
    with pytest.raises(WeightsError) as caught:
        check_weights(weights, MICRO)
    expected = f"h.0.attn.c_attn.weight has shape {list(shape)}, the config asks for [2, 6]"
    assert expected in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.bool_])
def test_weights_are_floats(dtype: Any) -> None:
    weights: Any = random_weights(MICRO) | {"ln_f.bias": np.zeros(2, dtype)}
    with pytest.raises(WeightsError, match=r"tensor ln_f\.bias is of type \w+, expected a float"):
        check_weights(weights, MICRO)


def test_integers_in_a_file(tmp_path: Path) -> None:
    path = weights_path(tmp_path)
    data = path.read_bytes()
    assert data.count(b'"dtype": "F32"') == 16
    path.write_bytes(data.replace(b'"dtype": "F32"', b'"dtype": "I32"', 1))
    with pytest.raises(WeightsError, match=r"wte\.weight is of type int32, expected a float"):
        read_weights([path], MICRO)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    one = weights_path(tmp_path / "one")
    two = weights_path(tmp_path / "two", {"ln_f.bias": np.zeros(2, np.float32)})
    with pytest.raises(WeightsError) as caught:
        read_weights([one, two], MICRO)
    assert "tensor ln_f.bias is there twice" in str(caught.value)
    assert str(two) in str(caught.value)


def test_a_tensor_with_and_without_the_prefix(tmp_path: Path) -> None:
    weights = random_weights(MICRO)
    both = weights | {"transformer.ln_f.bias": weights["ln_f.bias"]}
    with pytest.raises(WeightsError, match=r"tensor ln_f\.bias is there twice"):
        read_weights([weights_path(tmp_path, both)], MICRO)


def test_a_missing_shard_is_missing_tensors(tmp_path: Path) -> None:
    write_model(tmp_path, MICRO, random_weights(MICRO), shards=2)
    first, _ = sorted(tmp_path.glob("*.safetensors"))
    with pytest.raises(WeightsError, match=r"ln_f\.bias|and \d+ more are missing"):
        read_weights([first], MICRO)


def test_the_tree_has_the_names_as_attributes(backend: Backend) -> None:
    weights = random_weights(CASES["untied"])
    with backend.scope():
        tree = to_backend(weights, backend)
        assert len(tree.h) == 3
        for name, expected in weights.items():
            node: Any = tree
            for part in name.split("."):
                node = node[int(part)] if part.isdigit() else getattr(node, part)
            np.testing.assert_array_equal(backend.to_numpy(node), expected)


def test_layers_are_in_order_beyond_nine() -> None:
    config = GPT2Config(vocab_size=3, n_positions=2, n_embd=2, n_layer=12, n_head=1)
    weights = random_weights(config)
    backwards = dict(reversed(weights.items()))
    tree = to_backend(backwards, make_backend("numpy"))
    for layer in range(12):
        assert np.shares_memory(tree.h[layer].ln_1.bias, weights[f"h.{layer}.ln_1.bias"])


# Writing


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "new"
    for data in (b"one", b"", bytes(range(256)) * 100):
        atomic_write(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_takes_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    atomic_write("new", b"data")
    assert (tmp_path / "new").read_bytes() == b"data"


@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "builtins.open"])
def test_a_failed_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, old: bytes | None
) -> None:
    def full(*args: Any, **options: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        with pytest.raises(StorageError) as caught:
            atomic_write(path, b"new")
    assert str(caught.value) == f"{path} cannot be written (No space left on device)"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"file": old} if old else {})


def test_an_interrupted_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> NoReturn:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_the_data_is_on_the_disk_before_it_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real: dict[str, Any] = {"fsync": os.fsync, "replace": os.replace}

    def called(name: str, *args: Any) -> None:
        calls.append(name)
        real[name](*args)

    for name in real:
        monkeypatch.setattr(os, name, partial(called, name))
    atomic_write(tmp_path / "file", b"data")
    assert calls == ["fsync", "replace"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "none" / "file", tmp_path / "file" / "file", tmp_path):
        with pytest.raises(StorageError, match="cannot be written"):
            atomic_write(path, b"data")
    for name in ("", ".", "/"):
        with pytest.raises(StorageError, match="it is a folder"):
            atomic_write(name, b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        atomic_write(tmp_path / "file", b"data")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
