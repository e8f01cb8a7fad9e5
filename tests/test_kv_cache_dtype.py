"""A float16 KV cache on each backend."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.backends import get_backend
from gptx.config import GPT2Config
from gptx.errors import BackendError, ParameterError
from gptx.generation.text_model import Model
from gptx.kv_cache import KVCache
from gptx.quantization import Quantization
from tests.support.backends import BACKENDS, make_backend
from tests.support.cli import run
from tests.support.models import float32_logits, make_model
from tests.support.random_models import CASES, random_ids

WITH_FLOAT16 = [name for name in BACKENDS if name != "strict"]  # the standard has no float16


@lru_cache
def _float16_model(name: str, config: GPT2Config, quantization: Quantization | None) -> Model:
    if name == "cupy-cpu":  # the emulator is slow
        config = replace(config, n_layer=1)
    return make_model(config, make_backend(name, cache_dtype="float16"), quantization=quantization)


@pytest.fixture(params=WITH_FLOAT16)
def float16_model(request: pytest.FixtureRequest) -> Any:
    """A function that returns a model with a float16 cache; tests share the models."""
    make_backend(request.param)  # skips the test, or installs the stand-in for CuPy
    return lambda config, quantization=None: _float16_model(request.param, config, quantization)


# Heads 8 and 4 wide, a single head; 64 wide, as in OpenAI's models; 80 wide, no multiple of a panel
CONFIGS = [CASES[case] for case in ("124M", "355M", "tiny")]
CONFIGS += [GPT2Config(200, 94, 192, 2, 3), GPT2Config(65, 94, 160, 1, 2)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.n_head}x{c.n_embd // c.n_head}")
def test_the_error_of_logits_is_that_of_float16(config: GPT2Config, float16_model: Any) -> None:
    ids = random_ids(config, 1, min(70, config.n_positions - 24))[0].tolist()
    model: Model = float16_model(config)
    error = np.abs(model.logits(ids) - float32_logits(model.config, tuple(ids))).max()
    assert 1e-6 < error < 0.02  # of logits as large as 13


def test_the_compiled_pass_supports_float16() -> None:
    pytest.importorskip("numba", reason="the kernels need Numba")
    compiled = importlib.import_module("gptx.backends.cpu.compiled")
    model = make_model(CASES["124M"], get_backend("numpy", cache_dtype="float16"))
    is_compiled = isinstance(model.gpt2.forward, compiled.CompiledForward)
    assert is_compiled == compiled.HAS_FLOAT16


def test_a_processor_without_float16_runs_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="the kernels need Numba")
    compiled = importlib.import_module("gptx.backends.cpu.compiled")
    expected = make_model(CASES["124M"], get_backend("numpy", cache_dtype="float16")).logits([1, 2])
    monkeypatch.setattr(compiled, "HAS_FLOAT16", False)
    model = make_model(CASES["124M"], get_backend("numpy", cache_dtype="float16"))
    assert not isinstance(model.gpt2.forward, compiled.CompiledForward)
    np.testing.assert_allclose(model.logits([1, 2]), expected, atol=0.01)


@pytest.mark.parametrize("name", ["numpy", "numpy-ops", "mlx", "cupy"])
def test_the_embedded_model_generates_the_same_text(name: str, shakespeare: Model) -> None:
    model = gptx.load("shakespeare", backend=make_backend(name, cache_dtype="float16"))
    ids = shakespeare.encode("ROMEO: It is the east, and Juliet is the sun")
    np.testing.assert_allclose(model.logits(ids), shakespeare.logits(ids), atol=0.01)
    found, expected = (m.generate(ids, max_tokens=20).tokens for m in (model, shakespeare))
    assert found == expected


def test_decoding_step_by_step_agrees_with_the_prompt(float16_model: Any) -> None:
    """Except for rounding to another float16."""
    model: Model = float16_model(CASES["124M"])
    ids = random_ids(CASES["124M"], 1, 18)[0].tolist()
    expected = model.logits(ids)
    cache = KVCache(model.config, model.backend, 1, 18)
    with model.backend.scope():
        for n, id in enumerate(ids):
            step = model.backend.asarray(np.array([[id]]))
            logits = model.gpt2.forward(step, cache.extend([1]), cache)
            found = model.backend.to_numpy(logits)[0, 0]
            np.testing.assert_allclose(found, expected[n], atol=0.01)


def test_a_ragged_batch_gives_the_tokens_of_single_prompts(float16_model: Any) -> None:
    model: Model = float16_model(CASES["124M"], Quantization(32, 8))
    prompts = [random_ids(CASES["124M"], 1, n, seed=n)[0].tolist() for n in (3, 9, 1)]
    expected = [model.generate(prompt, max_tokens=6).tokens for prompt in prompts]
    assert [r.tokens for r in model.generate(prompts, max_tokens=6)] == expected


def test_the_cache_takes_half_of_the_memory() -> None:
    float32, float16 = (
        KVCache(CASES["124M"], get_backend("numpy", cache_dtype=dtype), 2, 10)
        for dtype in (None, "float16")
    )
    assert float16.keys[0].nbytes * 2 == float32.keys[0].nbytes
    assert float16.values[0].dtype == np.float16


def test_a_saved_cache_continues_in_another_dtype(tmp_path: Path, float16_model: Any) -> None:
    model: Model = float16_model(CASES["124M"])
    ids = random_ids(CASES["124M"], 1, 12)[0].tolist()
    model.prefill(ids).save(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_size < 4 * 12 * 4 * 96 + 4000  # 2 bytes a number
    float32 = make_model(model.config, get_backend("numpy"))
    expected = float32.generate([*ids, 7], max_tokens=8).tokens
    for other in (model, float32):
        cache = other.load_cache(tmp_path / "cache")
        assert other.generate([*ids, 7], cache=cache, max_tokens=8).tokens == expected


def test_a_prefix_has_the_same_keys(float16_model: Any) -> None:
    model: Model = float16_model(CASES["124M"])
    cache = model.prefill([5, 6, 7])
    prefix = cache.prefix(2, 8)
    for layer in range(model.config.n_layer):
        one, two = (model.backend.to_numpy(c.keys[layer])[:, :, :2] for c in (cache, prefix))
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "int8", "", 16])
def test_another_dtype_is_an_error(dtype: Any) -> None:
    with pytest.raises(BackendError, match=r"cache_dtype is .*expected 'float16'") as error:
        get_backend("numpy", cache_dtype=dtype)
    assert error.value.exit_code == 2


def test_a_library_without_float16_is_an_error() -> None:
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(BackendError, match="cache_dtype is 'float16'"):
        get_backend(strict, cache_dtype="float16")


def test_cache_dtype_with_a_backend_object_is_an_error() -> None:
    with pytest.raises(ParameterError, match="cache_dtype cannot be set on an existing Backend"):
        gptx.load("shakespeare", backend=get_backend("numpy"), cache_dtype="float16")


def test_the_command_line_option() -> None:
    command = ("generate", "-m", "shakespeare", "ROMEO:", "-n", "5", "-q")
    assert run(*command, "--cache-dtype", "float16").out == run(*command).out
    assert run(*command, "--cache-dtype", "float3").code == 2
