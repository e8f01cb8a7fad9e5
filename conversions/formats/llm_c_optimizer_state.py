"""The optimizer states of llm.c, `state_00000100_00000.bin`: the moments of AdamW.

A header of 256 integers comes first. Then come m, v and, optionally, the weights in float32, each
in the order of a model file (https://github.com/karpathy/llm.c, train_gpt2.cu: `save_state`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import require_openai_settings
from gptx.conversions.containers.binary import BinaryFile
from gptx.conversions.formats.llm_c import (
    HEADER_BYTES,
    count_parameters,
    map_parameters,
    padded_vocabulary,
    write_parameters,
)
from gptx.errors import WeightsError
from gptx.files import atomic_file

MAGIC, VERSION = 20240527, 1
# Places of the header, counted in integers.
HAS_MASTER, STEP, RANDOM, RANDOM_OF_UPDATE = 4, 10, 20, 22
RANDOM_STATE = 13371337  # llm.c's own first state, of its rounding to bfloat16


@dataclass(frozen=True)
class OptimizerState:
    """The state of AdamW after some steps.

    Attributes
    ----------
    step
        Number of steps so far.
    m, v
        Name of a weight -> mean of its gradients, and of their squares; float32, in gptx's layout.
    master
        Name -> weight in float32; None if the file has none.
    """

    step: int
    m: Mapping[str, np.ndarray]
    v: Mapping[str, np.ndarray]
    master: Mapping[str, np.ndarray] | None = None


def read(path: Path, config: GPT2Config) -> OptimizerState:
    """Map a state into memory.

    Parameters
    ----------
    config
        Config of its model: the file has no sizes.

    Raises
    ------
    WeightsError
        The file is truncated or damaged, or is the state of another model.
    StorageError
        The file cannot be read.
    """
    file = BinaryFile(path)
    header = struct.unpack("<256i", file.read(0, HEADER_BYTES, "the header"))
    if header[:2] != (MAGIC, VERSION):
        raise WeightsError(
            f"{path} is not an optimizer state of llm.c: it starts with {header[0]}, {header[1]}, "
            f"expected {MAGIC}, {VERSION}"
        )
    padded = padded_vocabulary(config)
    n_bytes = 4 * count_parameters(config, padded)
    n_parts = 3 if header[HAS_MASTER] else 2
    expected = HEADER_BYTES + n_parts * n_bytes
    # After these parts, a file can have the order of the data.
    if file.size < expected or header[STEP] < 0:
        raise WeightsError(
            f"{path} has {file.size} bytes, expected {expected} for this model: it is truncated, "
            "of another model, or one part of a sharded state (llm.c's `-z`)"
        )
    m, v, *master = (
        map_parameters(file, HEADER_BYTES + part * n_bytes, config, padded)
        for part in range(n_parts)
    )
    return OptimizerState(header[STEP], m, v, master[0] if master else None)


def write(state: OptimizerState, config: GPT2Config, path: Path) -> None:
    """Write a state that llm.c's program resumes on one GPU, atomically.

    It begins with the first sample of the data, which the state of gptx has in another form.

    Raises
    ------
    ConfigError
        llm.c would compute something else.
    StorageError
        The file cannot be written.
    """
    require_openai_settings(config, "llm.c")
    header = bytearray(HEADER_BYTES)
    struct.pack_into("<5i", header, 0, MAGIC, VERSION, 1, 0, state.master is not None)
    struct.pack_into("<i", header, 4 * STEP, state.step)
    for place in (RANDOM, RANDOM_OF_UPDATE):
        struct.pack_into("<Q", header, 4 * place, RANDOM_STATE)
    with atomic_file(path) as file:
        file.write(bytes(header))
        for tensors in (state.m, state.v, state.master):
            if tensors is not None:
                write_parameters(file, tensors, config)
