"""The compiled forward pass against the generic ops."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gptx.backends import get_backend
from gptx.config import GPT2Config
from gptx.kv_cache import KVCache
from gptx.logits import pad
from gptx.model import Transformer, forward
from gptx.quantization import QuantizedTensor, quantize
from gptx.random_weights import random_weights
from gptx.weights import to_backend
from tests.support.random_models import CASES

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

from gptx.backends.cpu.compiled import CompiledForward
from tests.support.kernels import with_encoded_scales, with_float16_scales

GENERIC = get_backend("numpy", generic=True, threads=1)

CONFIGS = {
    "heads of 8": GPT2Config(97, 80, 32, 2, 4),  # half a vector
    "heads of 64": GPT2Config(500, 80, 192, 2, 3),
    "heads of 80": GPT2Config(65, 80, 160, 1, 2),
    "untied, n_inner": GPT2Config(70, 40, 64, 2, 2, n_inner=96, tie_word_embeddings=False),
    "gelu": GPT2Config(70, 40, 64, 1, 4, activation_function="gelu"),
    "relu": GPT2Config(70, 40, 64, 1, 4, activation_function="relu"),
    "scaled": GPT2Config(70, 40, 64, 3, 4, scale_attn_by_inverse_layer_idx=True),
}
CALLS = {
    "prompt and steps": [[[5, 3, 9, 1, 0, 2, 2]], [[7]], [[8]]],
    "steps only": [[[1]], [[2]], [[3]], [[4]], [[5]]],
    "two prompts": [[[1, 2, 3]], [[4, 5, 6, 7, 8]]],
    "batch": [[[1, 2, 3], [4, 5, 6]], [[7], [8]]],
    "ragged": [[[1, 2, 3, 4, 5, 6, 7, 8, 9], [3], [4, 5, 6, 7]], [[7], [8], [9]], [[1], [2], [3]]],
    "long": [[[i % 60 for i in range(37)]], [[1]]],
    "prompts beside steps": [
        [[4, 5, 6], [1], list(range(20))],
        [[7], [i % 60 for i in range(37)], [8]],
        [[9], [3], [i * 7 % 60 for i in range(17)]],
    ],
}


def make_pair(
    config: GPT2Config,
    bits: int | None,
    threads: int,
    rounded: Callable[[QuantizedTensor], QuantizedTensor] = with_encoded_scales,
) -> tuple[Transformer, Transformer]:
    """Return one model on two backends: compiled, and with generic ops."""
    weights: dict[str, Any] = dict(random_weights(config))
    if bits is not None:
        for name, w in weights.items():
            if w.ndim == 2 and name != "wpe.weight":
                table = name in ("wte.weight", "lm_head.weight")
                q = quantize(w if table else np.ascontiguousarray(w.T), bits, 32)
                weights[name] = rounded(q)
    backends = get_backend("numpy", threads=threads), GENERIC
    compiled, generic = (Transformer(config, to_backend(weights, b), b) for b in backends)
    assert isinstance(compiled.forward, CompiledForward)
    return compiled, generic


def run_calls(
    model: Transformer, calls: list[list[list[int]]], last_only: bool
) -> tuple[list[Any], KVCache]:
    """Run one forward pass after the other over one cache; return the logits of each."""
    found = []
    lengths = [sum(len(call[b]) for call in calls) for b in range(len(calls[0]))]
    with model.backend.scope():
        cache = KVCache(model.config, model.backend, len(calls[0]), max(lengths))
        for call in calls:
            positions = cache.extend([len(ids) for ids in call])
            found.append(model.forward(pad(call), positions, cache, last_only=last_only))
    return found, cache


def assert_same_results(
    compiled: Transformer,
    generic: Transformer,
    calls: list[list[list[int]]],
    last_only: bool = False,
    atol: float = 2e-5,
    message: str = "",
) -> None:
    """Compare the logits and the caches."""
    found, found_cache = run_calls(compiled, calls, last_only)
    expected, expected_cache = run_calls(generic, calls, last_only)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=message)
    for layer in range(compiled.config.n_layer):
        for a, b in (
            (found_cache.keys[layer], expected_cache.keys[layer]),
            (found_cache.values[layer], expected_cache.values[layer]),
        ):
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=message)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("case", CONFIGS)
def test_compiled_and_generic_passes_agree(case: str, bits: int | None, unit: str) -> None:
    pair = make_pair(CONFIGS[case], bits, threads=2)
    for name, calls in CALLS.items():
        for last_only in (False, True) if len(calls[0][0]) > 1 else (False,):
            message = f"{name}, last_only={last_only}"
            assert_same_results(*pair, calls, last_only, message=message)


@pytest.mark.parametrize("bits", [8, 4])
def test_float16_scales(bits: int, unit: str) -> None:
    compiled, generic = make_pair(CONFIGS["heads of 64"], bits, 2, with_float16_scales)
    assert compiled.weights.wte.weight.offset_bits == 0
    assert_same_results(compiled, generic, CALLS["ragged"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_config(case: str, threads: int) -> None:
    calls = [[[1, 2, 3], [4, 5, 6]], [[7], [8]]]
    assert_same_results(*make_pair(CASES[case], None, threads), calls)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_threads_share_every_stage(bits: int | None, unit: str) -> None:
    """At the width of 124M, with several chunks of rows."""
    config = GPT2Config(1003, 310, 768, 1, 12)
    random = np.random.default_rng(1)
    calls = [[random.integers(0, 1003, 300).tolist()], [[3]], [[4]]]
    pair = make_pair(config, bits, threads=2)
    assert_same_results(*pair, calls, last_only=True, atol=5e-5)


def test_large_scores_saturate_the_softmax() -> None:
    """One score far above the others gives exp(-large) for these, and no NaN."""
    config = GPT2Config(70, 40, 64, 1, 4)
    weights = random_weights(config)
    weights["h.0.attn.c_attn.weight"] = weights["h.0.attn.c_attn.weight"] * 300
    backends = get_backend("numpy", threads=1), GENERIC
    compiled, generic = (Transformer(config, to_backend(weights, b), b) for b in backends)
    calls = [[list(range(30))], [[1]]]
    found, expected = (run_calls(model, calls, False)[0] for model in (compiled, generic))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tensor", ["h.0.attn.c_attn.weight", "h.0.mlp.c_fc.bias", "ln_f.weight"])
def test_nan_propagates(tensor: str) -> None:
    config = CONFIGS["heads of 64"]
    weights = random_weights(config)
    weights[tensor] = weights[tensor].copy()
    weights[tensor][..., 1] = np.nan
    backend = get_backend("numpy", threads=1)
    model = Transformer(config, to_backend(weights, backend), backend)
    assert np.isnan(run_calls(model, [[[1, 2, 3]], [[4]]], False)[0][1]).any()


def test_another_forward_pass_runs_op_by_op() -> None:
    config = CONFIGS["heads of 64"]
    backend = get_backend("numpy", threads=1)
    model = Transformer(config, to_backend(random_weights(config), backend), backend)

    def doubled(
        model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool
    ) -> Any:
        x = forward(model, ids, positions, cache, last_only=last_only)
        return model.backend.relu(x)

    compiled = backend.compile(doubled, model)
    assert not isinstance(compiled, CompiledForward)
    cache = KVCache(config, backend, 1, 3)
    found = compiled(np.array([[1, 2, 3]]), cache.extend([3]), cache, last_only=False)
    assert found.shape == (1, 3, config.vocab_size)
    assert found.min() == 0


def test_without_numba_the_model_runs_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    backend = get_backend("numpy")
    config = CONFIGS["heads of 64"]
    model = Transformer(config, to_backend(random_weights(config), backend), backend)
    assert not isinstance(model.forward, CompiledForward)
    q = quantize(np.ones((64, 64), np.float32), 4, 32)
    assert isinstance(backend.pack_quantized(q), np.ndarray)


@pytest.mark.parametrize("options", [{"generic": True}, {"dtype": "float64"}])
def test_options_that_disable_the_kernels(options: dict[str, Any]) -> None:
    backend = get_backend("numpy", **options)
    q = quantize(np.ones((64, 64), np.float32), 8, 32)
    assert isinstance(backend.pack_quantized(q), np.ndarray)


def test_a_later_call_does_not_overwrite_returned_logits() -> None:
    compiled, _ = make_pair(CONFIGS["heads of 64"], None, threads=1)
    found, _ = run_calls(compiled, [[[1, 2, 3]], [[4]], [[5]]], False)
    before = [x.copy() for x in found]
    run_calls(compiled, [[[9, 9, 9]], [[9]], [[9]]], False)
    for a, b in zip(found, before, strict=True):
        np.testing.assert_array_equal(a, b)
