"""Weights are freed with the last reference to a model, not by Python's garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from unittest import mock

import numpy as np
import pytest

from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.generation.engine import TokenGenerator
from gptx.generation.params import SamplingParams
from gptx.kv_cache import KVCache
from gptx.model import Transformer
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from tests.support.models import make_model

CONFIG = GPT2Config(97, 80, 64, 2, 2)


def arrays_of(x: Any) -> Iterator[Any]:
    """Yield the arrays in a tree of weights, those of quantized matrices included."""
    if isinstance(x, list | tuple):
        children: Any = x
    elif hasattr(x, "dtype") and hasattr(x, "shape"):
        yield x
        return
    else:  # a block, or a quantized matrix
        children = getattr(x, "__dict__", {}).values()
    for child in children:
        yield from arrays_of(child)


def generate(model: Transformer) -> None:
    """Run a prompt and steps, with two sequences of different lengths."""
    for _ in TokenGenerator(model, [[1, 2, 3], [4]], SamplingParams(), max_tokens=3):
        pass


def interrupt(model: Transformer) -> None:
    """Interrupt a generation in a decode step."""
    generator = iter(TokenGenerator(model, [[1, 2, 3]], SamplingParams(), max_tokens=9))
    next(generator)
    interrupted = mock.patch.object(Backend, "sample", side_effect=KeyboardInterrupt)
    with interrupted, suppress(KeyboardInterrupt):
        list(generator)


def abandon(model: Transformer) -> None:
    """Begin a generation, and drop it."""
    next(iter(TokenGenerator(model, [[1, 2, 3]], SamplingParams(), max_tokens=9)))


def keep_cache(model: Transformer) -> KVCache:
    """Return a KV cache that outlives the model."""
    cache = KVCache(model.config, model.backend, 1, 9)
    with model.backend.scope():
        ids = model.backend.asarray(np.array([[1, 2, 3]]))
        model.forward(ids, cache.extend([3]), cache, last_only=True)
    return cache


@pytest.mark.parametrize("quantization", [None, Quantization(32, 8)], ids=["floats", "int8"])
@pytest.mark.parametrize("use", [generate, interrupt, abandon, keep_cache])
def test_the_last_reference_frees_the_weights(
    backend: Backend, quantization: Quantization | None, use: Callable[..., Any]
) -> None:
    gc.disable()
    try:
        model = make_model(CONFIG, backend, random_weights(CONFIG), quantization).gpt2
        weights = [weakref.ref(x) for x in arrays_of(model.weights)]
        assert len(weights) > 20
        kept = use(model)
        del model
        alive = sum(weight() is not None for weight in weights)
        del kept
    finally:
        gc.enable()
    assert not alive
