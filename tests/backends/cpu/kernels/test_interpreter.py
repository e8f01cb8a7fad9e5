"""The NumPy backend's compiled kernels against the generic ops and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gptx.backends import Backend, get_backend
from gptx.config import GPT2Config
from gptx.kv_cache import KVCache
from gptx.logits import pad
from gptx.model import Transformer, forward
from gptx.quantization import QuantizedTensor, dequantize, quantize
from gptx.random_weights import random_weights
from gptx.weights import to_backend
from tests.support.random_models import CASES

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install 'gptx[fast]')")

import numba

from gptx.backends.cpu.compiled import CompiledForward, Program, QuantizedWeight
from gptx.backends.cpu.kernels import interpreter as numpy_kernels
from gptx.backends.cpu.kernels.amx import tile_unit as amx
from gptx.backends.fusion import FusedOp
from tests.support.kernels import as_kept, in_16_bits

GENERIC = get_backend("numpy", generic=True, threads=1)

# Inputs, outputs: those of every size of GPT-2, a small vocabulary, and what fills no tile, vector
# or block.
MATRICES = [
    (768, 2304),
    (1024, 1024),
    (1280, 5120),
    (1600, 1600),
    (6400, 1600),
    (768, 10007),
    (32, 1),
    (96, 63),
    (160, 65),
    (224, 130),
]
ROWS = [1, 2, 5, 19, 300]


def close(found: np.ndarray, exact: np.ndarray, size: np.ndarray) -> None:
    """Assert that `found` is `exact` but for the rounding of sums whose terms add up to `size`."""
    assert found.shape == exact.shape
    assert np.max(np.abs(found - exact) / size) < 3e-6


@pytest.fixture(params=["panels", "AMX"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What multiplies several rows with codes: vectors, or a matrix unit where there is one."""
    if request.param == "AMX" and not amx.allowed():
        pytest.skip("this processor has no AMX, or the system does not lend it")
    monkeypatch.setattr("gptx.backends.cpu.compiled.amx.allowed", lambda: request.param == "AMX")
    return request.param


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n_in", "n_out"), MATRICES, ids=lambda n: str(n))
def test_products_with_codes(
    n_in: int, n_out: int, bits: int, unit: str, random: np.random.Generator
) -> None:
    group_size = 64 if n_in % 64 == 0 else 32
    w = random.standard_normal((n_out, n_in)).astype(np.float32)
    q = quantize(w, bits, group_size)
    tiles, exact = QuantizedWeight(q), dequantize(q).astype(np.float64)
    bias = random.standard_normal(n_out).astype(np.float32)
    for rows in ROWS:
        x = random.standard_normal((rows, n_in)).astype(np.float32)
        size = np.abs(x).astype(np.float64) @ np.abs(exact).T + np.abs(bias)
        wanted = x @ exact.T + bias
        for threads in (1, 3):
            close(tiles.product(x, bias, threads), wanted, size)


@pytest.mark.parametrize("is_head", [False, True])
@pytest.mark.parametrize(
    ("n_in", "n_out"),
    [(768, 2304), (1600, 520), (3072, 768), (768, 65), (520, 130), (40, 63), (7, 1)],
    ids=lambda n: str(n),
)
def test_products_with_floats(
    n_in: int, n_out: int, is_head: bool, unit: str, random: np.random.Generator
) -> None:
    """Rows that the threads share the inputs for, and one more; weights as they lie in a file."""
    shape = (n_out, n_in) if is_head else (n_in, n_out)
    weight = np.empty(n_in * n_out * 4 + 8, np.uint8)[8:].view(np.float32).reshape(shape)
    weight[:] = random.standard_normal(shape)
    bias = None if is_head else random.standard_normal(n_out).astype(np.float32)
    exact = (weight.T if is_head else weight).astype(np.float64)
    instruction = FusedOp("linear", 0, 1, weight=weight, bias=bias, is_head=is_head)
    for rows in (1, 2, 5, 8, 19, 32, 33, 48, 49, 64, 65, 130):
        x = random.standard_normal((rows, n_in)).astype(np.float32)
        wanted, size = x @ exact, np.abs(x) @ np.abs(exact)
        if bias is not None:
            wanted, size = wanted + bias, size + np.abs(bias)
        for threads in (1, 3):
            program = Program([instruction], inputs=[n_in])
            given, y = (np.full((144, width), np.nan, np.float32) for width in program.widths)
            given[:rows, :n_in] = x
            program.run({0: given, 1: y}, (1, rows, 0, 0, 0), threads)
            close(y[:rows, :n_out], wanted, size)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [2, 15, 16, 17, 130, 300])
def test_panels_and_the_matrix_unit_agree(
    rows: int,
    bits: int,
    group_size: int,
    random: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They cut and sum in other ways, so they need not agree to the last bit, and do not."""
    if not amx.allowed():
        pytest.skip("this processor has no AMX, or the system does not lend it")
    q = quantize(random.standard_normal((200, 384)).astype(np.float32), bits, group_size)
    x = random.standard_normal((rows, 384)).astype(np.float32)
    found = []
    for allowed in (False, True):
        monkeypatch.setattr(amx, "allowed", lambda answer=allowed: answer)
        found.append(QuantizedWeight(q).product(x, None, 2))
    close(found[0], found[1], np.abs(x) @ np.abs(dequantize(q)).T)
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_hold_the_matrix(bits: int, group_size: int, random: np.random.Generator) -> None:
    q = quantize(random.standard_normal((130, 256)).astype(np.float32), bits, group_size)
    tiles = QuantizedWeight(q)
    w = dequantize(q)
    close = {"rtol": 0, "atol": 2.0 ** (bits - 26) * np.abs(w).max()}  # words round scales
    np.testing.assert_allclose(tiles.rows(np.arange(130)), w, **close)
    np.testing.assert_allclose(tiles.rows(np.array([[129, 0]])), w[[[129, 0]]], **close)
    x = random.standard_normal((3, 256)).astype(np.float32)
    np.testing.assert_allclose(tiles.product(x, None, 1), x @ dequantize(q).T, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_any_size(bits: int, unit: str, random: np.random.Generator) -> None:
    """Codes of 4 bits are multiplied where they lie in their word, up to 16**6 too large."""
    w = random.standard_normal((64, 128)).astype(np.float32) * 10.0 ** random.integers(
        -6, 6, (64, 1)
    )
    q = quantize(w.astype(np.float32), bits, 32)
    exact = dequantize(q).astype(np.float64)
    x = random.standard_normal((2, 128)).astype(np.float32) * np.float32(1e3)
    size = np.abs(x).astype(np.float64) @ np.abs(exact).T
    close(QuantizedWeight(q).product(x, None, 1), x @ exact.T, size)
    close(QuantizedWeight(q).product(x[:1], None, 1), x[:1] @ exact.T, size[:1])


def models(
    config: GPT2Config,
    bits: int | None,
    threads: int,
    rounded: Callable[[QuantizedTensor], QuantizedTensor] = as_kept,
) -> tuple[Transformer, Transformer]:
    """One model, compiled and in generic ops."""
    weights: dict[str, Any] = dict(random_weights(config))
    if bits is not None:
        for name, w in weights.items():
            if w.ndim == 2 and name != "wpe.weight":
                table = name in ("wte.weight", "lm_head.weight")
                q = quantize(w if table else np.ascontiguousarray(w.T), bits, 32)
                weights[name] = rounded(q)
    compiled = get_backend("numpy", threads=threads)
    made = [Transformer(config, to_backend(weights, b), b) for b in (compiled, GENERIC)]
    assert isinstance(made[0].forward, CompiledForward)
    return made[0], made[1]


def logits(
    model: Transformer, calls: list[list[list[int]]], last_only: bool
) -> tuple[list[Any], KVCache]:
    """Logits of one forward pass after the other over one cache."""
    found = []
    lengths = [sum(len(call[b]) for call in calls) for b in range(len(calls[0]))]
    with model.backend.scope():
        cache = KVCache(model.config, model.backend, len(calls[0]), max(lengths))
        for call in calls:
            positions = cache.extend([len(ids) for ids in call])
            found.append(model.forward(pad(call), positions, cache, last_only=last_only))
    return found, cache


WIDE = {
    "width 32": GPT2Config(97, 80, 32, 2, 4),  # heads of 8, in no whole vector
    "heads of 64": GPT2Config(1000, 300, 192, 2, 3),
    "heads of 80": GPT2Config(65, 80, 160, 1, 2),
    "untied, inner": GPT2Config(70, 40, 64, 2, 2, n_inner=96, tie_word_embeddings=False),
    "erf": GPT2Config(70, 40, 64, 1, 4, activation_function="gelu"),
    "relu": GPT2Config(70, 40, 64, 1, 4, activation_function="relu"),
    "scaled": GPT2Config(70, 40, 64, 3, 4, scale_attn_by_inverse_layer_idx=True),
}
CALLS = {
    "prompt and steps": [[[5, 3, 9, 1, 0, 2, 2]], [[7]], [[8]]],
    "steps alone": [[[1]], [[2]], [[3]], [[4]], [[5]]],
    "two prompts": [[[1, 2, 3]], [[4, 5, 6, 7, 8]]],
    "batch": [[[1, 2, 3], [4, 5, 6]], [[7], [8]]],
    "ragged": [[[1, 2, 3, 4, 5, 6, 7, 8, 9], [3], [4, 5, 6, 7]], [[7], [8], [9]], [[1], [2], [3]]],
    "long": [[[i % 60 for i in range(37)]], [[1]]],
}


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("case", WIDE)
def test_a_replay_computes_what_the_generic_ops_do(
    case: str, name: str, bits: int | None, last_only: bool, unit: str
) -> None:
    compiled, generic = models(WIDE[case], bits, threads=2)
    found, found_cache = logits(compiled, CALLS[name], last_only)
    wanted, wanted_cache = logits(generic, CALLS[name], last_only)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    for layer in range(WIDE[case].n_layer):
        for a, b in (
            (found_cache.keys[layer], wanted_cache.keys[layer]),
            (found_cache.values[layer], wanted_cache.values[layer]),
        ):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_replay_with_scales_of_16_bits(bits: int, unit: str) -> None:
    compiled, generic = models(WIDE["heads of 64"], bits, 2, in_16_bits)
    assert compiled.weights.wte.weight.steps == 0
    found, wanted = (logits(model, CALLS["ragged"], False)[0] for model in (compiled, generic))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_replay_of_every_config(case: str, threads: int) -> None:
    compiled, generic = models(CASES[case], None, threads)
    calls = [[[1, 2, 3], [4, 5, 6]], [[7], [8]]]
    for a, b in zip(
        logits(compiled, calls, False)[0], logits(generic, calls, False)[0], strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_a_real_width_in_parallel(unit: str) -> None:
    """Large enough for every stage to be shared between threads, at the length of a context."""
    config = GPT2Config(5003, 520, 768, 1, 12)
    random = np.random.default_rng(1)
    calls = [[random.integers(0, 5003, 515).tolist()], [[3]], [[4]]]
    for bits in (None, 8, 4):
        compiled, generic = models(config, bits, threads=2)
        for a, b in zip(
            logits(compiled, calls, True)[0], logits(generic, calls, True)[0], strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=0, atol=5e-5)


def test_large_logits_saturate_the_softmax() -> None:
    """One key far above the others: exp of what is far below zero, and no NaN."""
    config = GPT2Config(70, 40, 64, 1, 4)
    weights = random_weights(config)
    weights["h.0.attn.c_attn.weight"] = weights["h.0.attn.c_attn.weight"] * 300
    made = [
        Transformer(config, to_backend(weights, b), b)
        for b in (get_backend("numpy", threads=1), GENERIC)
    ]
    calls = [[list(range(30))], [[1]]]
    for a, b in zip(
        logits(made[0], calls, False)[0], logits(made[1], calls, False)[0], strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tensor", ["h.0.attn.c_attn.weight", "h.0.mlp.c_fc.bias", "ln_f.weight"])
def test_a_nan_is_not_lost(tensor: str) -> None:
    config = WIDE["heads of 64"]
    weights = random_weights(config)
    weights[tensor] = weights[tensor].copy()
    weights[tensor][..., 1] = np.nan
    backend = get_backend("numpy", threads=1)
    model = Transformer(config, to_backend(weights, backend), backend)
    assert np.isnan(logits(model, [[[1, 2, 3]], [[4]]], False)[0][1]).any()


def test_a_forward_pass_of_ones_own_runs_op_by_op() -> None:
    """The tape refuses what it does not know; the model runs all the same."""
    config = WIDE["heads of 64"]
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
    monkeypatch.setitem(__import__("sys").modules, "gptx.backends.cpu.compiled", None)
    backend = get_backend("numpy")
    config = WIDE["heads of 64"]
    model = Transformer(config, to_backend(random_weights(config), backend), backend)
    assert not isinstance(model.forward, CompiledForward)
    q = quantize(np.ones((64, 64), np.float32), 4, 32)
    assert isinstance(backend.pack_quantized(q), np.ndarray)


@pytest.mark.parametrize("options", [{"generic": True}, {"dtype": "float64"}])
def test_what_turns_the_kernels_off(options: dict[str, Any]) -> None:
    backend: Backend = get_backend("numpy", **options)
    q: QuantizedTensor = quantize(np.ones((64, 64), np.float32), 8, 32)
    assert isinstance(backend.pack_quantized(q), np.ndarray)


def test_the_logits_are_the_callers() -> None:
    """A later step does not write into what an earlier one returned."""
    compiled, _ = models(WIDE["heads of 64"], None, threads=1)
    found, _ = logits(compiled, [[[1, 2, 3]], [[4]], [[5]]], False)
    before = [x.copy() for x in found]
    logits(compiled, [[[9, 9, 9]], [[9]], [[9]]], False)
    for a, b in zip(found, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_compiling_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiled(x: int) -> int:
        return x + 1

    theirs, ours = numba.njit(compiled), numba.njit(compiled)
    monkeypatch.setattr(numpy_kernels, "run", ours)
    assert theirs(1) == 2  # a function of someone else's
    assert capsys.readouterr().err == ""
    assert ours(1) == 2
    assert capsys.readouterr().err.startswith("gptx: compiling the kernels")
    assert ours(2) == 3
    assert capsys.readouterr().err == ""
