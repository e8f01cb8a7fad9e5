"""Models with random weights, without files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gptx.backends import Backend, get_backend
from gptx.config import GPT2Config
from gptx.generation.model_info import ModelInfo
from gptx.generation.text_model import Model
from gptx.model import Transformer
from gptx.model_files import ModelFiles
from gptx.quantization import Quantization, QuantizedTensor, dequantize
from gptx.random_weights import random_weights
from gptx.stored_weights import TABLES
from gptx.weights import load, to_backend
from tests.support.random_models import CASES

EXACT = get_backend("numpy", dtype="float64", generic=True)


@lru_cache
def drawn_weights(config: GPT2Config) -> dict[str, np.ndarray]:
    """Return `random_weights(config)`; tests share them and do not change them."""
    return random_weights(config)


def make_model(
    config: GPT2Config,
    backend: Backend,
    weights: Any = None,
    quantization: Quantization | None = None,
) -> Model:
    """Return a model without files and tokenizer; by default its weights are random.

    With `quantization`, the weights are quantized.
    """
    found = drawn_weights(config) if weights is None else weights
    folder = Path("random")
    info = ModelInfo(ModelFiles("random", folder, folder, (), {}, None), config)
    loaded = load(found, config, backend, quantization=quantization)
    return Model(Transformer(loaded.config, loaded.tree, backend), info, loaded.fingerprint)


@lru_cache
def exact_transformer(case: str) -> Transformer:
    """Return the model of a case on the generic ops in float64; tests share it."""
    config = CASES[case]
    return Transformer(config, to_backend(drawn_weights(config), EXACT), EXACT)


@lru_cache
def float32_logits(config: GPT2Config, ids: tuple[int, ...]) -> np.ndarray:
    """Return the logits [T, V] of the random model of a config on NumPy; tests share them."""
    return make_model(config, get_backend("numpy")).logits(ids)


def floats_of(weights: Any) -> dict[str, np.ndarray]:
    """Return the weights of a quantized model as floats, in the Hub's layout."""
    floats = {}
    for name, x in weights.items():
        if isinstance(x, QuantizedTensor):
            x = dequantize(x) if name in TABLES else dequantize(x).T
        floats[name] = x
    return floats
