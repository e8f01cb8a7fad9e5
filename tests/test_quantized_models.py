"""Quantized models: logits on every backend, `load`, the command line, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.backends import Backend, get_backend
from gptx.config import GPT2Config
from gptx.errors import ParameterError, WeightsError
from gptx.generation.text_model import Model
from gptx.quantization import Quantization, QuantizedTensor, dequantize, quantize
from gptx.random_weights import random_weights
from gptx.safetensors_file import BFLOAT16
from gptx.weights import fingerprint, quantize_weights
from tests.support.backends import make_backend
from tests.support.cli import assert_generate_fails, raises_error, run
from tests.support.models import drawn_weights, floats_of, make_model
from tests.support.random_models import CASES, random_ids, to_bfloat16
from tests.support.shared_files import shared

INT4 = Quantization(32, 4)
INT8 = Quantization(32, 8)
CONFIG = CASES["124M"]
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


# On every backend


@lru_cache
def _quantized(case: str, quantization: Quantization) -> tuple[dict[str, Any], GPT2Config]:
    return quantize_weights(drawn_weights(CASES[case]), CASES[case], quantization)


@lru_cache
def _dequantized_logits(case: str, quantization: Quantization, ids: tuple[int, ...]) -> np.ndarray:
    floats = floats_of(_quantized(case, quantization)[0])
    return make_model(CASES[case], get_backend("numpy"), floats).logits(ids)


@pytest.mark.parametrize("quantization", [INT4, INT8], ids=str)
@pytest.mark.parametrize("case", ["124M", "untied"])
def test_logits_equal_those_of_the_dequantized_model(
    case: str, quantization: Quantization, backend: Backend
) -> None:
    weights, config = _quantized(case, quantization)
    ids = random_ids(config, 1, 12, 3)[0].tolist()
    expected = _dequantized_logits(case, quantization, tuple(ids))
    got = make_model(config, backend, weights).logits(ids)
    # Both are float32. AMX rounds the inputs to 24 bits of the largest one in a row, and the CPU
    # kernels round the scales of int8 to 19 bits.
    atol = 5e-5 if backend.name == "numpy" and quantization is INT8 else 2e-5
    np.testing.assert_allclose(got, expected, rtol=2**-23, atol=atol)


def test_matrices_and_the_token_table_are_quantized() -> None:
    config = CASES["untied"]
    floats = random_weights(config)
    weights, described = quantize_weights(floats, config, INT4)
    assert described == replace(config, quantization=INT4)
    matrices = {f"h.{layer}.{name}.weight" for layer in range(3) for name in MATRICES}
    matrices |= {"wte.weight", "lm_head.weight"}
    assert {name for name, x in weights.items() if isinstance(x, QuantizedTensor)} == matrices
    assert all(weights[name] is floats[name] for name in set(floats) - matrices)
    got, w = weights["h.1.mlp.c_fc.weight"], floats["h.1.mlp.c_fc.weight"]  # [in, out]
    assert isinstance(got, QuantizedTensor)
    assert got.shape == w.shape[::-1]
    np.testing.assert_array_equal(dequantize(got), dequantize(quantize(w.T, 4, 32)))


def test_bfloat16_weights_are_quantized() -> None:
    weights: dict[str, Any] = random_weights(CONFIG)
    wide = to_bfloat16(weights["wte.weight"]).astype(np.uint32) << 16
    weights["wte.weight"] = to_bfloat16(weights["wte.weight"]).view(BFLOAT16)
    got = quantize_weights(weights, CONFIG, INT4)[0]["wte.weight"]
    assert isinstance(got, QuantizedTensor)
    expected = quantize(wide.view(np.float32), 4, 32)
    np.testing.assert_array_equal(got.weight, expected.weight)


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_load_quantizes(folder: Callable[..., Path], backend: str) -> None:
    made = make_backend(backend)
    expected = make_model(CONFIG, made, quantization=INT4)
    model = gptx.load(folder("124M"), backend=made, quantize="int4", group_size=32)
    assert (model.config, model.fingerprint) == (expected.config, expected.fingerprint)
    np.testing.assert_array_equal(model.logits([1, 2, 3]), expected.logits([1, 2, 3]))


def test_each_quantization_has_a_fingerprint() -> None:
    floats = random_weights(CONFIG)
    prints = {
        fingerprint(quantize_weights(floats, CONFIG, quantization)[0])
        for quantization in (None, INT4, INT8)
    }
    assert len(prints) == 3
    weights, _ = quantize_weights(floats, CONFIG, INT4)
    x = weights["h.2.mlp.c_fc.weight"]
    assert isinstance(x, QuantizedTensor)
    other = replace(x, scales=x.scales * 2)
    assert fingerprint(weights) != fingerprint({**weights, "h.2.mlp.c_fc.weight": other})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_dtypes_are_close(dtype: str) -> None:
    ids = random_ids(CONFIG, 1, 20, 3)[0].tolist()
    exact = make_model(CONFIG, get_backend("numpy", dtype="float64"), quantization=INT4).logits(ids)
    found = make_model(CONFIG, make_backend("mlx", dtype=dtype), quantization=INT4).logits(ids)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < {"float16": 0.02, "bfloat16": 0.12}[dtype]


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int5"}, "quantize is 'int5', expected 'int8' or 'int4'"),
        ({"quantize": 4}, "quantize is 4, expected"),
        ({"quantize": ["int4"]}, "quantize is ['int4'], expected"),
        ({"quantize": "int4", "group_size": 48}, "group_size is 48, expected 32, 64 or 128"),
        ({"quantize": "int4", "group_size": None}, "group_size is None, expected"),
        ({"group_size": 32}, "group_size is 32, but quantize is missing: give quantize='int8'"),
    ],
)
def test_invalid_options_are_errors_before_the_search_for_a_model(
    options: Any, message: str
) -> None:
    with raises_error(ParameterError, message):
        gptx.load("./nowhere", **options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--quantize", "int5"), "'int5' is not one of 'int8', 'int4'"),
        (("--group-size", "32"), "--group-size is 32, but --quantize is missing"),
        (("--quantize", "int4", "--group-size", "48"), "expected 32, 64 or 128"),
        (
            ("--quantize", "int4", "--group-size", "128"),
            "wte.weight has 192 inputs: give 32 or 64",
        ),
    ],
)
def test_invalid_options_of_the_command(args: tuple[str, ...], message: str) -> None:
    assert_generate_fails(*args, "O", code=2, message=message)


def test_weights_that_are_not_finite(folder: Callable[..., Path]) -> None:
    weights = random_weights(CONFIG)
    weights["h.1.mlp.c_fc.weight"][5, 7] = math.nan
    with raises_error(WeightsError, "h.1.mlp.c_fc.weight holds a NaN"):
        gptx.load(folder("124M", weights=weights), quantize="int4", group_size=32)


def test_the_command_quantizes() -> None:
    args = ("-q", "-n", "20", "O")
    expected = str(gptx.load("shakespeare", quantize="int4").generate("O", max_tokens=20))
    done = run("generate", "-m", "shakespeare", "--quantize", "int4", *args)
    assert (done.code, done.out.rstrip("\n")) == (0, expected.rstrip("\n"))


# Perplexity


def test_perplexity_of_held_out_text(shakespeare: Model) -> None:
    """The start of the held-out text."""
    text = shared("data/tinyshakespeare.txt").read_text()
    ids = shakespeare.encode(text[int(len(text) * 0.9) :])[:2_000]
    floats = shakespeare.score(ids).perplexity
    for name, limit in ("int8", 1.005), ("int4", 1.04):
        ratio = gptx.load("shakespeare", quantize=name).score(ids).perplexity / floats
        assert ratio < limit
        assert abs(ratio - 1) > 1e-6  # 1 means that no weight was quantized
