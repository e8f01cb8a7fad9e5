"""gptx.conversions.containers.binary: reads within a file, casts, chunks of rows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gptx.conversions.containers import binary
from gptx.conversions.containers.binary import (
    BinaryFile,
    cast,
    dtype_name,
    row_chunks,
    write_array,
)
from gptx.errors import StorageError, WeightsError
from gptx.safetensors_file import BFLOAT16

DATA = bytes(range(100))


@pytest.fixture
def file(tmp_path: Path) -> BinaryFile:
    (tmp_path / "x").write_bytes(DATA)
    return BinaryFile(tmp_path / "x")


@pytest.mark.parametrize(("offset", "n"), [(0, 0), (0, 100), (99, 1), (100, 0), (40, 7)])
def test_reads_within_the_file(file: BinaryFile, offset: int, n: int) -> None:
    expected = DATA[offset : offset + n]
    assert file.read(offset, n, "x") == expected
    assert file.array(offset, (n,), np.uint8, "x").tobytes() == expected
    assert file.map(offset, (n,), np.uint8, "x").tobytes() == expected


@pytest.mark.parametrize(("offset", "n"), [(0, 101), (100, 1), (-1, 1), (50, -1), (0, 2**70)])
def test_reads_beyond_the_file(file: BinaryFile, offset: int, n: int) -> None:
    message = f"expected part 7 in bytes {offset} to {offset + n}, the file has 100"
    for read in (file.read, lambda *place: file.array(*place[:1], (n,), "u1", place[-1])):
        with pytest.raises(WeightsError, match=message):
            read(offset, n, "part 7")
    with pytest.raises(WeightsError, match=message):
        file.map(offset, (n,), np.uint8, "part 7")


@pytest.mark.parametrize("dtype", ["<u2", "<f4", "<f8", BFLOAT16])
def test_arrays_at_any_offset(file: BinaryFile, dtype: str) -> None:
    for offset in range(9):
        expected = np.frombuffer(DATA, dtype, 6, offset).reshape(2, 3)
        aligned = offset % expected.itemsize == 0
        for found in (file.array(offset, (2, 3), dtype, "x"), file.map(offset, (2, 3), dtype, "x")):
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert found.tobytes() == expected.tobytes()
        assert found.flags.writeable != aligned  # only data that are not aligned are copied


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    file = BinaryFile(tmp_path / "x")
    assert file.read(0, 0, "x") == b""
    assert file.map(0, (0, 4), "<f4", "x").shape == (0, 4)


def test_the_size_of_an_array_is_in_bytes(file: BinaryFile) -> None:
    assert file.array(0, (5, 5), "<f4", "x").shape == (5, 5)
    for read in (file.array, file.map):
        with pytest.raises(WeightsError, match="expected x in bytes 1 to 101"):
            read(1, (5, 5), "<f4", "x")


def test_a_file_that_became_shorter(file: BinaryFile) -> None:
    file.path.write_bytes(DATA[:50])
    for read in (lambda: file.read(40, 11, "x"), lambda: file.array(40, (11,), "u1", "x")):
        with pytest.raises(WeightsError, match="ended while x was read"):
            read()
    with pytest.raises(WeightsError, match="became shorter while it was read"):
        file.map(0, (1,), "u1", "x")


def test_a_file_that_disappeared(file: BinaryFile) -> None:
    file.path.unlink()
    for read in (
        lambda: file.read(0, 1, "x"),
        lambda: file.array(0, (1,), "u1", "x"),
        lambda: file.map(0, (1,), "u1", "x"),
        lambda: BinaryFile(file.path),
    ):
        with pytest.raises(StorageError, match=r"cannot be read \(No such file"):
            read()


# Casts

singles = arrays.arrays(np.float32, 5, elements=st.floats(width=32))


def bits_of_bfloat16(x: np.float32) -> int:
    """Round a finite number to bfloat16: to the nearest, of two equally near ones to the even."""
    bits = int(x.view(np.uint32))
    low, high = bits >> 16, (bits >> 16) + 1
    rest = bits & 0xFFFF
    return high if rest > 0x8000 or (rest == 0x8000 and low % 2) else low


@given(singles)
def test_bfloat16_is_rounded_to_the_nearest(x: np.ndarray) -> None:
    x = np.where(np.abs(x) > 3e38, np.float32(1), x)
    x = np.where(np.isfinite(x), x, np.float32(-2))
    assert cast(x, "bfloat16", "x").tolist() == [bits_of_bfloat16(number) for number in x]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0x3F808000, 0x3F80),
        (0x3F818000, 0x3F82),
        (0x7F7F7FFF, 0x7F7F),
        (0x7F800000, 0x7F80),
        (0xFF800000, 0xFF80),
        (0x7F800001, 0x7FC0),
        (0xFFC12345, 0xFFC1),
    ],
    ids=hex,
)
def test_bfloat16_of_one_number(number: int, expected: int) -> None:
    x = np.array([number, 0x3F800000], np.uint32).view(np.float32)
    assert cast(x, "bfloat16", "x").tolist() == [expected, 0x3F80]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bfloat16_is_the_source_of_every_type(dtype: str) -> None:
    bits = np.array([[0x3F80, 0xC000, 0x7F80], [0x3FC0, 0x0000, 0x8000]], np.uint16)
    found = cast(bits.view(BFLOAT16), dtype, "x")
    if dtype == "bfloat16":
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, bits)
        signaling_nan = np.array([0x7F81], np.uint16)
        assert cast(signaling_nan.view(BFLOAT16), dtype, "x") == signaling_nan
    else:
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, [[1, -2, np.inf], [1.5, 0, -0.0]])


LARGEST = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}


@pytest.mark.parametrize(
    ("source", "target"),
    [(np.float32, "float16"), (np.float64, "float32"), (np.float32, "bfloat16")],
)
def test_numbers_that_are_too_large(source: type, target: str) -> None:
    largest = LARGEST[target]
    cast(np.array([largest, -largest, np.inf, -np.inf, np.nan], source), target, "x")
    for number in (largest * 1.005, -largest * 1.005):
        for others in ([0.0], [np.inf]):
            with pytest.raises(WeightsError, match=f"^x has .* too large for {target}"):
                cast(np.array([*others, number], source), target, "x")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_infinity_keeps_its_type(dtype: str) -> None:
    x = np.array([np.inf, 1], dtype)
    assert cast(x, dtype, "x").tolist() == [np.inf, 1]
    assert cast(x, "float32", "x").tolist() == [np.inf, 1]


@pytest.mark.parametrize("shape", [(3, 200), (200, 3), (1, 1), (64, 65), (0, 4)])
def test_transposed_arrays_are_in_c_order(shape: tuple[int, int]) -> None:
    x = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    for array in (x, x.T, x[::2], x[:, ::-1]):
        found = cast(array, "float32", "x")
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, array)


def test_an_array_in_c_order_is_not_copied() -> None:
    x = np.zeros((4, 5), np.float32)
    assert np.shares_memory(cast(x, "float32", "x"), x)


def test_transposed_arrays_are_copied_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "COPY_COLUMNS", 3)
    x = np.arange(35, dtype=np.float32).reshape(7, 5).T
    np.testing.assert_array_equal(cast(x, "float32", "x"), x)


def test_names_of_types() -> None:
    names = {np.float16: "float16", np.float32: "float32", np.float64: "float32"}
    assert {dtype: dtype_name(np.dtype(dtype)) for dtype in names} == names
    assert dtype_name(BFLOAT16) == "bfloat16"


# Chunks


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((10, 4), [2, 2, 2, 2, 2]),
        ((5, 4), [2, 2, 1]),
        ((3, 9), [1, 1, 1]),  # a row is longer than a chunk
        ((7, 8), [1] * 7),
        ((10, 1), [8, 2]),
        ((5, 2, 2), [2, 2, 1]),
        ((20,), [1]),
        ((), [1]),
        ((3, 0), [3]),
    ],
)
def test_chunks_of_rows(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], rows: list[int]
) -> None:
    monkeypatch.setattr(binary, "CHUNK_NUMBERS", 8)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    chunks = list(row_chunks(x))
    assert [len(chunk) for chunk in chunks] == rows
    assert np.concatenate(chunks).tobytes() == x.tobytes()


def test_arrays_are_written_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "CHUNK_NUMBERS", 8)
    x = np.arange(30, dtype=np.float32).reshape(6, 5)
    for array in (x, x.T):
        file = io.BytesIO()
        write_array(file, array, "float16", "x")
        assert file.getvalue() == array.astype("<f2").tobytes()
    with pytest.raises(WeightsError, match=r"^x has a number"):
        write_array(io.BytesIO(), x * 1e5, "float16", "x")
