"""gptx.conversions.containers.zip_archive: archives that PyTorch does not write.

The tests of formats that use archives have valid and damaged ones.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from gptx.conversions.containers.binary import BinaryFile
from gptx.conversions.containers.zip_archive import zip_entries
from gptx.errors import WeightsError


def test_truncated_field_of_64_bit_numbers_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a/data.pkl")
        info.extra = b"\1\0\xff\0abc"  # its length is 255 bytes
        archive.writestr(info, b"text")
    assert zip_entries(BinaryFile(path))["a/data.pkl"].n_bytes == 4
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2") + 24
    data[at : at + 4] = b"\xff" * 4  # the size is in that field
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="duplicate or invalid entry"):
        zip_entries(BinaryFile(path))
