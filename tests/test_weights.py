"""gptx.weights: the tree of weights on a backend."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx import weights
from gptx.backends import Backend, get_backend
from gptx.config import GPT2Config
from gptx.errors import ParameterError
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from gptx.safetensors_weights import open_weights
from gptx.weights import NO_NUMBA_NOTE, to_backend
from tests.support.backends import make_backend
from tests.support.cli import raises_error
from tests.support.files.safetensors_bytes import MICRO, weights_path
from tests.support.random_models import CASES

INT8 = Quantization(32, 8)


def load_file(
    path: Path, config: GPT2Config, backend: Backend, **options: Any
) -> weights.LoadedWeights:
    return weights.load(open_weights([path], config).map(), config, backend, **options)


def test_load_goes_from_files_to_the_backend(tmp_path: Path) -> None:
    config, quantization = CASES["relu"], Quantization(32, 4)
    path, backend = weights_path(tmp_path, config=config), make_backend("numpy")
    loaded = load_file(path, config, backend)
    assert loaded.config == config
    assert loaded.fingerprint == weights.fingerprint(random_weights(config))
    assert np.asarray(loaded.tree.wte.weight).shape == (config.vocab_size, config.n_embd)
    quantized = load_file(path, config, backend, quantization=quantization, threads=1)
    assert quantized.config.quantization == quantization
    assert quantized.fingerprint != loaded.fingerprint


@pytest.mark.parametrize(
    ("options", "has_note"),
    [
        ({}, True),
        ({"compile": False}, True),
        ({"generic": True}, False),
        ({"dtype": "float64"}, False),
    ],
)
def test_quantized_weights_without_numba_have_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], has_note: bool
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    backend = get_backend("numpy", threads=1, **options)
    path = weights_path(tmp_path, config=CASES["relu"])
    for quantization in (None, Quantization(32, 4)):
        loaded = load_file(path, CASES["relu"], backend, quantization=quantization, threads=1)
        expected = (NO_NUMBA_NOTE,) if has_note and quantization else ()
        assert loaded.notes == expected


def test_float32_reaches_numpy_without_a_copy(tmp_path: Path) -> None:
    found = open_weights([weights_path(tmp_path)], MICRO).map()
    tree = to_backend(found, make_backend("numpy"))
    assert np.shares_memory(tree.wte.weight, found["wte.weight"])


def test_the_tree_has_the_names_as_attributes(backend: Backend) -> None:
    arrays = random_weights(CASES["untied"])
    with backend.scope():
        tree = to_backend(arrays, backend)
        assert len(tree.h) == 3
        for name, expected in arrays.items():
            node: Any = tree
            for part in name.split("."):
                node = node[int(part)] if part.isdigit() else getattr(node, part)
            np.testing.assert_array_equal(backend.to_numpy(node), expected)


def test_layers_are_in_order_beyond_nine() -> None:
    config = GPT2Config(vocab_size=3, n_positions=2, n_embd=2, n_layer=12, n_head=1)
    arrays = random_weights(config)
    backwards = dict(reversed(arrays.items()))
    tree = to_backend(backwards, make_backend("numpy"))
    for layer in range(12):
        assert np.shares_memory(tree.h[layer].ln_1.bias, arrays[f"h.{layer}.ln_1.bias"])


def test_the_config_of_a_quantized_model_needs_no_weights() -> None:
    config = replace(CASES["n-inner"], n_inner=96)  # 32 inputs, 96 in one matrix of a layer
    assert weights.quantized_config(config, None) == config
    described = weights.quantized_config(config, Quantization(32, 4))
    assert described == replace(config, quantization=Quantization(32, 4))
    assert weights.quantized_config(described, Quantization(32, 4)) == described
    with raises_error(ParameterError, "are int4 in groups of 32 already"):
        weights.quantized_config(described, Quantization(32, 8))
    with raises_error(ParameterError, "wte.weight has 32 inputs: give 32"):
        weights.quantized_config(config, Quantization(64, 4))
    uneven = replace(config, n_inner=72)
    with raises_error(ParameterError, "h.0.mlp.c_proj.weight has 72 inputs"):
        weights.quantized_config(uneven, Quantization(32, 4))


def test_each_tensor_is_accessed_once() -> None:
    """A mapping can read a tensor from its file at each access."""
    accessed: list[str] = []

    class Counted(dict[str, np.ndarray]):
        def __getitem__(self, name: str) -> np.ndarray:
            accessed.append(name)
            return super().__getitem__(name)

    config = CASES["untied"]
    found = Counted(random_weights(config))
    loaded = weights.load(found, config, make_backend("numpy"), quantization=INT8)
    assert accessed == list(config.tensor_shapes())
    quantized, described = weights.quantize_weights(random_weights(config), config, INT8)
    assert loaded.fingerprint == weights.fingerprint(quantized)
    assert loaded.config == described


def test_float_matrices_of_a_quantized_model_stay_floats() -> None:
    """In a model of mlx-lm, a matrix whose inputs do not divide into groups is floats."""
    config = CASES["relu"]
    floats = random_weights(config)
    found, described = weights.quantize_weights(floats, config, INT8)
    found["wte.weight"] = floats["wte.weight"]
    again, same = weights.quantize_weights(found, described, INT8)
    assert same == described
    assert again["wte.weight"] is floats["wte.weight"]
    loaded = weights.load(found, described, make_backend("numpy"), quantization=INT8)
    np.testing.assert_array_equal(loaded.tree.wte.weight, floats["wte.weight"])


def test_fingerprints_are_those_of_stored_caches() -> None:
    """A saved cache holds the fingerprint of its model; other versions of gptx compare it."""
    found = {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.float16)}
    assert weights.fingerprint(found) == "c219c18b"


def test_a_fingerprint_covers_all_tensors_and_not_their_order() -> None:
    found = random_weights(CASES["untied"])
    expected = weights.fingerprint(found)
    assert expected == weights.fingerprint(dict(reversed(found.items())))
    for name, tensor in found.items():
        changed = tensor.copy()
        changed.reshape(-1)[-1 if tensor.ndim == 1 else 0] += 1
        assert weights.fingerprint(found | {name: changed}) != expected
