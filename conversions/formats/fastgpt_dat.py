"""The model.dat of fastGPT before March 2024: the parts of its model.gguf without padding.

Version 0 (March to July 2023) is ten integers and the data, without a mark. Version 1 (until March
2024) has a mark and its number before them. The file of the first two weeks, which had no merges,
is not supported. `fastgpt.py` has the parts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Checkpoint
from gptx.conversions.containers.binary import BinaryFile
from gptx.conversions.formats.fastgpt import (
    MARK,
    Header,
    check_header,
    check_version,
    make_checkpoint,
    make_header_and_texts,
    write_tensors,
)
from gptx.errors import WeightsError
from gptx.files import create


def detect(path: Path) -> bool:
    """Test for the mark, or for plausible sizes of a model, at the start of a file."""
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError:
        return False
    if len(start) < 40:
        return False
    numbers = np.frombuffer(start, "<i4").tolist()
    first = Header(*numbers)
    return numbers[0] == MARK or (first.is_plausible() and first.n_embd % first.n_head == 0)


def read(path: Path, config: GPT2Config | None = None, ignore_unknown: bool = False) -> Checkpoint:
    """Open a file of version 0 or 1.

    Parameters
    ----------
    config
        Settings that replace those of the file.

    Raises
    ------
    ConfigError, WeightsError, TokenizerError
        The file is damaged.
    StorageError
        The file cannot be read.
    """
    file = BinaryFile(path)
    offset = 0
    mark, version = file.array(0, (2,), "<i4", "the header").tolist()
    if mark == MARK:
        check_version(path, mark, version, 1)
        offset = 8
    header = check_header(path, file.array(offset, (10,), "<i4", "the header").tolist())
    offset += 40
    parts = {}
    for part in header.parts():
        parts[part.name] = replace(part, offset=offset)
        offset += part.n_bytes
    if offset != file.size:
        raise WeightsError(
            f"{path} is truncated or damaged: it has {file.size} bytes, expected {offset} by its "
            "header: fetch it again"
        )
    return make_checkpoint(file, header, parts, config, ignore_unknown)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write version 0; see `gptx.conversions.formats.fastgpt.write` for the errors."""
    header, texts = make_header_and_texts(checkpoint)
    with create(path) as file:
        file.write(header.integers().data)
        write_tensors(file, checkpoint)
        file.writelines(text.data for text in texts)
