"""Keys and values in float16, whatever the model computes in."""

from __future__ import annotations

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
from tests.support.models import make_model
from tests.support.random_models import CASES, random_ids

HAVE_FLOAT16 = [name for name in BACKENDS if name != "strict"]  # the standard knows no float16


@pytest.fixture(params=HAVE_FLOAT16)
def half(request: pytest.FixtureRequest) -> Any:
    """Make a model whose cache is float16: half("124M")."""
    backend = make_backend(request.param, cache_dtype="float16")
    return lambda case, **more: make_model(CASES[case], backend, **more)


@pytest.mark.parametrize("case", ["124M", "355M", "1558M", "tiny"])  # heads 8, 4, 8 and 8 wide
def test_logits_lose_no_more_than_float16_does(case: str, half: Any) -> None:
    model: Model = half(case)
    ids = random_ids(CASES[case], 1, 40)[0].tolist()
    exact = make_model(CASES[case], get_backend("numpy", generic=True)).logits(ids)
    error = np.abs(model.logits(ids) - exact).max()
    assert 1e-6 < error < 0.02  # of logits as large as 13


@pytest.mark.parametrize(
    "config",
    [GPT2Config(1000, 300, 192, 2, 3), GPT2Config(65, 80, 160, 1, 2)],
    ids=["as wide as OpenAI's", "and a rest"],
)
def test_wide_heads(config: GPT2Config, half: Any) -> None:
    """64 and 80 wide: all vectors of the kernels."""
    model = make_model(config, half("tiny").backend)
    ids = random_ids(config, 1, 70)[0].tolist()
    exact = make_model(config, get_backend("numpy", generic=True)).logits(ids)
    error = np.abs(model.logits(ids) - exact).max()
    assert 1e-6 < error < 0.02


def test_the_compiled_pass_reads_it() -> None:
    step = pytest.importorskip("gptx.backends.cpu.compiled", reason="the kernels need Numba")
    model = make_model(CASES["124M"], get_backend("numpy", cache_dtype="float16"))
    assert isinstance(model.gpt2.forward, step.CompiledForward) == step.HALF


def test_a_processor_without_float16_goes_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    step = pytest.importorskip("gptx.backends.cpu.compiled", reason="the kernels need Numba")
    expected = make_model(CASES["124M"], get_backend("numpy", cache_dtype="float16")).logits([1, 2])
    monkeypatch.setattr(step, "HALF", False)
    model = make_model(CASES["124M"], get_backend("numpy", cache_dtype="float16"))
    assert not isinstance(model.gpt2.forward, step.CompiledForward)
    np.testing.assert_allclose(model.logits([1, 2]), expected, atol=0.01)


@pytest.mark.parametrize("name", [name for name in HAVE_FLOAT16 if name != "cupy-cpu"])  # slow
def test_the_embedded_model_says_the_same(name: str, shakespeare: Model) -> None:
    backend = make_backend(name, cache_dtype="float16")
    model = gptx.load("shakespeare", backend=backend)
    ids = shakespeare.encode("ROMEO: It is the east, and Juliet is the sun")
    np.testing.assert_allclose(model.logits(ids), shakespeare.logits(ids), atol=0.01)
    options: dict[str, Any] = {"max_tokens": 40}
    assert model.generate(ids, **options).tokens == shakespeare.generate(ids, **options).tokens


def test_decoding_reads_what_a_prompt_wrote(half: Any) -> None:
    """Token by token, or all at once: the same, but where rounding falls to the other side."""
    model: Model = half("124M")
    ids = random_ids(CASES["124M"], 1, 30)[0].tolist()
    at_once = model.logits(ids)
    cache = KVCache(model.config, model.backend, 1, 30)
    with model.backend.scope():
        for n, id in enumerate(ids):
            step = model.backend.asarray(np.array([[id]]))
            logits = model.gpt2.forward(step, cache.extend([1]), cache)
            found = model.backend.to_numpy(logits)[0, 0]
            np.testing.assert_allclose(found, at_once[n], atol=0.01)


def test_a_ragged_batch_gets_what_each_gets_alone(half: Any) -> None:
    model: Model = half("124M", how=Quantization(32, 8))
    prompts = [random_ids(CASES["124M"], 1, n, seed=n)[0].tolist() for n in (3, 9, 1)]
    alone = [r.tokens for p in prompts for r in [model.generate(p, max_tokens=10)]]
    assert [r.tokens for r in model.generate(prompts, max_tokens=10)] == alone


def test_the_cache_takes_half_of_the_memory() -> None:
    whole, halved = (
        KVCache(CASES["124M"], get_backend("numpy", cache_dtype=dtype), 2, 10)
        for dtype in (None, "float16")
    )
    assert halved.keys[0].nbytes * 2 == whole.keys[0].nbytes
    assert halved.values[0].dtype == np.float16


def test_a_saved_cache_goes_on_in_another_type(tmp_path: Path, half: Any) -> None:
    model: Model = half("124M")
    ids = random_ids(CASES["124M"], 1, 12)[0].tolist()
    model.prefill(ids).save(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_size < 4 * 12 * 4 * 96 + 4000  # 2 bytes a number
    full = make_model(CASES["124M"], get_backend("numpy"))
    for other in (model, full):
        cache = other.load_cache(tmp_path / "cache")
        again = other.generate([*ids, 7], cache=cache, max_tokens=8)
        assert again.tokens == full.generate([*ids, 7], max_tokens=8).tokens


def test_a_copied_sequence_is_the_same(half: Any) -> None:
    model: Model = half("124M")
    cache = model.prefill([5, 6, 7])
    prefix = cache.prefix(2, 8)
    for layer in range(model.config.n_layer):
        one, two = (model.backend.to_numpy(c.keys[layer])[:, :, :2] for c in (cache, prefix))
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "int8", "", 16])
def test_another_type_is_refused(dtype: Any) -> None:
    with pytest.raises(BackendError, match=r"cache_dtype is .*expected 'float16'") as error:
        get_backend("numpy", cache_dtype=dtype)
    assert error.value.exit_code == 2


def test_a_library_without_float16_says_so() -> None:
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(BackendError, match="cache_dtype is 'float16'"):
        get_backend(strict, cache_dtype="float16")


def test_a_backend_that_is_made_has_one() -> None:
    with pytest.raises(ParameterError, match="cache_dtype belong"):
        gptx.load("shakespeare", backend=get_backend("numpy"), cache_dtype="float16")


def test_the_command_line_has_it() -> None:
    command = ("generate", "-m", "shakespeare", "ROMEO:", "-n", "5", "-q")
    assert run(*command, "--cache-dtype", "float16").out == run(*command).out
    assert run(*command, "--cache-dtype", "float3").code == 2
