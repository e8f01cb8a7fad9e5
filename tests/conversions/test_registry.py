"""gptx.conversions.registry: the table of formats, and their detection."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptx.conversions import FORMATS, detect
from gptx.conversions.registry import DTYPES, QUANTIZED_TYPES
from gptx.errors import ConfigError, WeightsError
from tests.support.conversions import read_all


def test_rows_name_known_types_and_modules() -> None:
    for name, row in FORMATS.items():
        module = row.load_module()
        assert hasattr(module, "read") or not row.reads, name
        assert hasattr(module, "write") or not row.writes, name
        assert set(row.dtypes) <= set(DTYPES)
        assert set(row.quantize) <= set(QUANTIZED_TYPES)
        if row.suffix == "/" and row.writes:
            assert row.files, "an existing folder is replaced only if all its files have such names"


def test_the_table_of_formats_needs_no_package() -> None:
    code = (
        "import sys; from gptx.conversions import FORMATS; "
        "print({'numpy', 'tokenizers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("data", [b"", b"\0", b"hello", b"{}", b"[1]", bytes(5000)])
def test_a_file_of_no_format_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises((WeightsError, ConfigError), match="file"):
        read_all(tmp_path / "file")()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="in no supported format"):
        detect(tmp_path)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="neither a file nor a folder"):
        detect(tmp_path / "pipe")
