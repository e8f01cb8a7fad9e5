"""The model.dat of fastGPT before it turned to GGUF: the same parts without any padding.

Version 0 (March to July 2023) is ten integers and the data, without a word on what it is; version
1 (until March 2024) has a mark and its number before them. The first two weeks' file, which had no
merges, is not read. The parts, and what wrote and read them, see `fastgpt.py`.
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
    check_version,
    checked,
    checkpoint_of,
    prepared,
    write_tensors,
)
from gptx.errors import WeightsError
from gptx.files import create


def detect(path: Path) -> bool:
    """Whether a file begins with the mark, or with what can be the sizes of a model."""
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


def read(path: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open a file of version 0 or 1.

    Parameters
    ----------
    config
        In the place of what the file says.

    Raises
    ------
    ConfigError, WeightsError, TokenizerError
        The file is damaged.
    StorageError
        It cannot be read.
    """
    file = BinaryFile(path)
    offset = 0
    mark, version = file.array(0, (2,), "<i4", "the header").tolist()
    if mark == MARK:
        check_version(path, mark, version, 1)
        offset = 8
    header = checked(path, file.array(offset, (10,), "<i4", "the header").tolist())
    offset += 40
    parts = {}
    for part in header.parts():
        parts[part.name] = replace(part, offset=offset)
        offset += part.n_bytes
    if offset != file.size:
        raise WeightsError(
            f"{path} is truncated or damaged: it has {file.size} bytes, its header tells of "
            f"{offset}: fetch it again"
        )
    return checkpoint_of(file, header, parts, config)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write version 0; see `gptx.conversions.formats.fastgpt.write` for the errors."""
    header, texts = prepared(checkpoint)
    with create(path) as file:
        file.write(header.integers().data)
        write_tensors(file, checkpoint)
        file.writelines(text.data for text in texts)
