"""Safetensors files written byte by byte, and the smallest possible model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.random_weights import random_weights
from tests.support.random_models import write_model

# The smallest possible model: its file is little more than a header.
MICRO = GPT2Config(vocab_size=3, n_positions=2, n_embd=2, n_layer=1, n_head=1)
DATA = np.array([1.5, -2.0], "<f4").tobytes()


def entry(dtype: str = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a file of any header (an object, or bytes) whose length field is `length`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def weights_path(folder: Path, weights: Any = None, config: Any = MICRO, **options: Any) -> Path:
    """Write a model of random or given weights; return the path of its safetensors file."""
    found = random_weights(config) if weights is None else weights
    return write_model(folder, config, found, **options) / "model.safetensors"
