"""An independent parser of GGUF, after its specification; random models as checkpoints."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Checkpoint, StoredTensor
from gptx.conversions.formats.gguf import write
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from gptx.tokenization.pipeline import PipelineTokenizer

# Type in the file -> options of the writer.
TYPES: dict[str, dict[str, Any]] = {
    "F32": {"dtype": "float32"},
    "F16": {"dtype": "float16"},
    "BF16": {"dtype": "bfloat16"},
    "Q8_0": {"quantization": Quantization(64, 8)},
    "Q4_0": {"quantization": Quantization(64, 4)},
}
IDS = {"F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8, "Q4_0": 2}
BLOCK_BYTES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 30: (1, 2)}  # numbers, bytes


class File:
    """A parsed GGUF file."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 4
        assert data[:4] == b"GGUF"
        assert self.take("I") == 3
        n_tensors, n_metadata = self.take("Q"), self.take("Q")
        self.metadata = {self.string(): self.value(self.take("I")) for _ in range(n_metadata)}
        infos = []
        for _ in range(n_tensors):
            name = self.string()
            shape = [self.take("Q") for _ in range(self.take("I"))][::-1]
            infos.append((name, shape, self.take("I"), self.take("Q")))
        start = self.at + -self.at % 32
        self.types = {name: kind for name, _, kind, _ in infos}
        self.shapes = {name: shape for name, shape, _, _ in infos}
        self.raw = {}
        end = 0
        for name, shape, kind, offset in infos:
            assert offset == end  # without gaps, each at a multiple of 32
            block, size = BLOCK_BYTES[kind]
            n_bytes = math.prod(shape) // block * size
            self.raw[name] = data[start + offset : start + offset + n_bytes]
            end = offset + n_bytes + -n_bytes % 32
        assert len(data) == start + end

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        n = self.take("Q")
        self.at += n
        return self.data[self.at - n : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == 9:
            inner, n = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(n)]
        return self.string() if kind == 8 else self.take({4: "I", 5: "i", 6: "f"}[kind])

    def numbers(self, name: str) -> np.ndarray:
        return decoded(self.raw[name], self.types[name]).reshape(self.shapes[name])


def decoded(raw: bytes, kind: int) -> np.ndarray:
    """Decode the bytes of a tensor to float64."""
    if kind == 30:
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if kind in (0, 1):
        return np.frombuffer(raw, ["<f4", "<f2"][kind]).astype(np.float64)
    numbers: list[float] = []
    for start in range(0, len(raw), BLOCK_BYTES[kind][1]):
        (scale,) = struct.unpack_from("<e", raw, start)
        if kind == 8:
            quantized = struct.unpack_from("32b", raw, start + 2)
        else:
            quants = raw[start + 2 : start + 18]
            quantized = tuple([(q & 15) - 8 for q in quants] + [(q >> 4) - 8 for q in quants])
        numbers += [scale * x for x in quantized]
    return np.array(numbers)


def checkpoint(
    config: GPT2Config,
    weights: Mapping[str, np.ndarray] | None = None,
    tokenizer: PipelineTokenizer | None = None,
) -> Checkpoint:
    """Make a checkpoint of weights in memory; random ones by default."""
    weights = random_weights(config) if weights is None else weights
    stored = {name: StoredTensor(w.shape, w.dtype, lambda w=w: w) for name, w in weights.items()}
    return Checkpoint(config, stored, tokenizer)


def written(
    folder: Path,
    config: GPT2Config,
    weights: Mapping[str, np.ndarray] | None = None,
    tokenizer: PipelineTokenizer | None = None,
    type: str = "F32",
) -> File:
    """Write a model to folder/model.gguf and parse it."""
    path = folder / "model.gguf"
    path.unlink(missing_ok=True)
    write(checkpoint(config, weights, tokenizer), path, **TYPES[type])
    return File(path.read_bytes())
