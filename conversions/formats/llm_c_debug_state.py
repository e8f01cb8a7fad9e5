"""The debug states of llm.c, `gpt2_124M_debug_state.bin`: a batch, and what a model computes of it.

A header has 256 integers: magic number, version 2, B, T. Token ids and targets [B, T], logits
[B, T, V], the loss, and the gradients of all weights in the order of a model file follow.
llm.c's test programs compare their own numbers with these (https://github.com/karpathy/llm.c,
train_gpt2.py: `write_state`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import require_openai_settings
from gptx.conversions.containers.binary import BinaryFile, write_array
from gptx.conversions.formats.llm_c import (
    HEADER_BYTES,
    count_parameters,
    map_parameters,
    padded_vocabulary,
    write_parameters,
)
from gptx.errors import WeightsError
from gptx.files import atomic_file

MAGIC, VERSION = 20240327, 2


@dataclass(frozen=True)
class DebugState:
    """A batch, and the numbers that a model computes of it.

    Attributes
    ----------
    ids, targets
        Token ids [B, T], and the tokens after them [B, T], int32.
    logits
        Logits [B, T, V], float32.
    loss
        Mean cross entropy of the batch, in nats.
    gradients
        Name of a weight -> gradient of the loss, float32, in gptx's layout.
    """

    ids: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    loss: float
    gradients: Mapping[str, np.ndarray]


def write(state: DebugState, config: GPT2Config, path: Path) -> None:
    """Write a file that llm.c's test programs load, atomically.

    Raises
    ------
    ConfigError
        llm.c would compute something else.
    WeightsError
        An array does not have the shape that the batch and the config give it.
    StorageError
        The file cannot be written.
    """
    require_openai_settings(config, "llm.c")
    B, T = state.ids.shape
    expected = {"targets": (B, T), "logits": (B, T, config.vocab_size)} | config.tensor_shapes()
    given = {"targets": state.targets, "logits": state.logits, **state.gradients}
    for name, shape in expected.items():
        found = given[name].shape if name in given else "missing"
        if found != shape:
            raise WeightsError(f"{name} of the debug state is {found}, expected shape {shape}")
    with atomic_file(path) as file:
        file.write(struct.pack("<4i", MAGIC, VERSION, B, T).ljust(HEADER_BYTES, b"\0"))
        file.write(np.ascontiguousarray(state.ids, "<i4").data)
        file.write(np.ascontiguousarray(state.targets, "<i4").data)
        write_array(file, state.logits, "float32", "the logits")
        file.write(struct.pack("<f", state.loss))
        write_parameters(file, state.gradients, config)


def read(path: Path, config: GPT2Config) -> DebugState:
    """Open a debug state of a model; its arrays are mapped into memory, read-only.

    Raises
    ------
    WeightsError
        The file is no debug state, is truncated or damaged, or belongs to a model of other sizes.
    StorageError
        The file cannot be read.
    """
    file = BinaryFile(path)
    magic, version, B, T = struct.unpack("<4i", file.read(0, 16, "the header"))
    if magic != MAGIC:
        raise WeightsError(
            f"{path} is no debug state of llm.c: it starts with {magic}, not {MAGIC}"
        )
    if version != VERSION:
        raise WeightsError(
            f"{path} has version {version}, expected {VERSION}: "
            "write it again with llm.c's train_gpt2.py"
        )
    V, padded = config.vocab_size, padded_vocabulary(config)
    numbers = B * T * (2 + V) + 1 + count_parameters(config, padded)
    if min(B, T) < 1 or file.size != HEADER_BYTES + 4 * numbers:
        raise WeightsError(
            f"{path} has {file.size} bytes, expected {HEADER_BYTES + 4 * numbers} for {B} x {T} "
            f"tokens and this config: give the config of its model, or fetch it again"
        )
    offset = HEADER_BYTES
    ids = file.map(offset, (B, T), "<i4", "the token ids")
    targets = file.map(offset + 4 * B * T, (B, T), "<i4", "the targets")
    offset += 8 * B * T
    logits = file.map(offset, (B, T, V), "<f4", "the logits")
    offset += 4 * B * T * V
    [loss] = struct.unpack("<f", file.read(offset, 4, "the loss"))
    return DebugState(ids, targets, logits, loss, map_parameters(file, offset + 4, config, padded))
