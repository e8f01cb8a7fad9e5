"""gptx.training.initialization: the first weights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from gptx.config import GPT2Config
from gptx.training.initialization import initial_weights

CONFIG = GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=3, n_head=4)


def test_the_law_of_gpt2() -> None:
    """Deviations 0.02 and 0.02 / sqrt(2L), biases 0, norms 1."""
    weights = dict(initial_weights(replace(CONFIG, tie_word_embeddings=False), 0))
    assert {n: w.shape for n, w in weights.items()} == replace(
        CONFIG, tie_word_embeddings=False
    ).tensor_shapes()
    for name, w in weights.items():
        assert w.dtype == np.float32
        if name.endswith("bias"):
            assert not w.any()
        elif w.ndim == 1:
            assert (w == 1).all()
        else:
            std = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert w.std() == pytest.approx(std, rel=0.04)
            assert abs(w.mean()) < 5 * std / math.sqrt(w.size)


def test_the_numbers_are_those_of_the_counter() -> None:
    """Key [seed, 2], and a counter for each tensor in the order of the config."""
    names = list(CONFIG.tensor_shapes())
    weights = dict(initial_weights(CONFIG, 5))
    name = "h.1.mlp.c_fc.weight"
    philox = np.random.Philox(key=[5, 2], counter=[0, 0, 0, names.index(name)])
    expected = np.random.Generator(philox).standard_normal((64, 256), np.float32)
    assert np.array_equal(weights[name], expected * np.float32(0.02))


def test_seeds_and_tensors_differ() -> None:
    a, b = dict(initial_weights(CONFIG, 0)), dict(initial_weights(CONFIG, 1))
    assert not np.array_equal(a["wte.weight"], b["wte.weight"])
    first, second = (a[f"h.{i}.attn.c_attn.weight"] for i in (0, 1))
    assert not np.array_equal(first, second)
