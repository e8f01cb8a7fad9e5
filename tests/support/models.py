"""Models of random weights, without files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.generation.text_model import Model
from gptx.model import Transformer
from gptx.model_files import ModelFiles
from gptx.quantization import Quantization, QuantizedTensor, dequantize
from gptx.random_weights import random_weights
from gptx.stored_weights import TABLES
from gptx.weights import load_arrays


def make_model(
    config: GPT2Config, backend: Backend, weights: Any = None, how: Quantization | None = None
) -> Model:
    """A model of random weights (or the given ones), quantized if `how` says so, without files and
    without a tokenizer."""
    found = random_weights(config) if weights is None else weights
    nowhere = Path("random")
    files = ModelFiles("random", nowhere, nowhere, (), {}, None)
    loaded = load_arrays(found, config, backend, quantization=how)
    with backend.scope():
        gpt2 = Transformer(loaded.config, loaded.tree, backend)
    return Model(gpt2, files, loaded.fingerprint)


def floats_of(weights: Any) -> dict[str, np.ndarray]:
    """The weights of a quantized model as floats, in the Hub's layout."""
    floats = {}
    for name, x in weights.items():
        if isinstance(x, QuantizedTensor):
            x = dequantize(x) if name in TABLES else dequantize(x).T
        floats[name] = x
    return floats
