"""gptx.conversions.containers.messagepack: the numbers of tensors in records of Burn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.conversions.containers import messagepack
from gptx.conversions.containers.binary import BinaryFile
from gptx.conversions.containers.messagepack import Kind, Record
from gptx.errors import WeightsError
from tests.support.burn_bytes import pack


@settings(max_examples=40)
@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 65535)), min_size=1), st.data())
def test_numbers_of_any_length_are_found_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], data: Any
) -> None:
    """The bits of float16 are stored in one, two or three bytes."""
    path = tmp_path_factory.getbasetemp() / "numbers.mpk"
    path.write_bytes(pack(np.array(values, np.uint16).view(np.float16)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messagepack, "CHUNK_NUMBERS", data.draw(st.integers(3, 40)))
        patch.setattr(messagepack, "SCALAR_RUN", data.draw(st.integers(1, 8)))
        found = Record(BinaryFile(path), Kind.TENSOR)
        bits = found.read(found.tensors[""]).view(np.uint16)
    assert bits.tolist() == values


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_of_more_than_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    values = np.arange(35, dtype=dtype).reshape(5, 7) - 17.25
    (tmp_path / "x").write_bytes(pack(values))
    monkeypatch.setattr(messagepack, "CHUNK_NUMBERS", 8)
    found = Record(BinaryFile(tmp_path / "x"), Kind.TENSOR)
    np.testing.assert_array_equal(found.read(found.tensors[""]), values)


def test_numbers_of_another_type_among_them_are_refused(tmp_path: Path) -> None:
    data = bytearray(pack(np.ones(40, np.float32)))
    data[data.index(b"\xca", 100)] = 0xCE  # an integer of as many bytes
    (tmp_path / "x").write_bytes(data)
    found = Record(BinaryFile(tmp_path / "x"), Kind.TENSOR)
    with pytest.raises(WeightsError, match="not a list of numbers of one type"):
        found.read(found.tensors[""])
