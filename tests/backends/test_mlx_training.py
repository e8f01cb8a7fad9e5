"""Training on MLX: memory of a lazy library, and compiled steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptx.backends import Backend, gradients
from gptx.backends.backward import Batch, Dropout, loss_function
from gptx.backends.graph import named_weights
from gptx.config import GPT2Config
from gptx.model import Transformer, forward
from gptx.training.trainer import Trainer
from gptx.weights import to_backend
from tests.support.backends import make_backend
from tests.support.models import drawn_weights
from tests.support.random_models import CASES, random_ids
from tests.support.training import CONFIG, TinyData, tiny_settings

mx = pytest.importorskip("mlx.core")

DEEP = replace(CASES["124M"], n_layer=8, n_embd=16, n_head=2, vocab_size=23)
TINY = replace(DEEP, n_layer=1, n_embd=8)
DROPOUT = Dropout(0.1, 0.2, 0.3, seed=4)


def batch_of(config: GPT2Config, B: int, T: int) -> Batch:
    ids = random_ids(config, B, T + 1)
    return Batch(ids[:, :-1], ids[:, 1:], np.ones((B, T), np.float32))


def model_of(config: GPT2Config, ops: Backend) -> Transformer:
    weights = drawn_weights(replace(config, bos_token_id=None, eos_token_id=None))
    return Transformer(config, to_backend(weights, ops), ops)


def peak_of(f: Callable[[], Any]) -> int:
    """Return the peak of MLX's memory, in bytes, over that of before."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(f())
    return int(mx.get_peak_memory() - before)


def test_recomputation_saves_memory() -> None:
    """Without an order between the ops, MLX keeps the results that it computes again."""
    ops = make_backend("mlx")
    peaks = {}
    with ops.scope():
        model, batch = model_of(DEEP, ops), batch_of(DEEP, 4, 60)
        weights = dict(named_weights(model.weights))
        mx.eval(weights)
        for recompute in ("none", "cheap", "block"):
            function = loss_function(forward, model, recompute=recompute)
            peaks[recompute] = peak_of(lambda f=function: f.gradients(weights, batch, scale=1.0))
    assert peaks["cheap"] < 0.85 * peaks["none"], peaks
    assert peaks["block"] < 0.5 * peaks["none"], peaks


def test_the_logits_of_all_rows_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = make_backend("mlx")
    monkeypatch.setattr("gptx.backends.mlx_training.MAX_BLOCK_LOGITS", 2**14)
    N, V = 1024, 1000
    with ops.scope():
        x, table = mx.random.normal((N, 4)), mx.random.normal((V, 4))
        targets, weights = mx.arange(N) % V, mx.ones((N,))
        mx.eval(x, table, targets, weights)
        cross_entropy: Any = ops.override("cross_entropy")
        peak = peak_of(lambda: cross_entropy(x, table, targets, weights, wanted=(True, True)))
    assert peak < 0.5 * 4 * N * V


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_blocks_of_rows_change_nothing(
    wanted: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = make_backend("mlx")
    results = []
    with ops.scope():
        x, table = mx.random.normal((37, 4), key=mx.random.key(1)), mx.eye(9, 4)
        operands = x, table, mx.arange(37) % 9, mx.arange(37) / 37
        for rows in (37, 5):
            monkeypatch.setattr("gptx.backends.mlx_training.MAX_BLOCK_LOGITS", 9 * rows)
            found = gradients.function(ops, "cross_entropy")(*operands, wanted=wanted)
            assert [g is not None for g in found[1:]] == list(wanted)
            results.append([ops.to_numpy(g) for g in found if g is not None])
    for one, several in zip(*results, strict=True):
        np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("generic", [False, True], ids=["", "generic"])
def test_16_bits_keep_the_sum_of_many_parts(generic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of logits at a time: in bfloat16, 128 + 0.5 is 128."""
    monkeypatch.setattr("gptx.backends.mlx_training.MAX_BLOCK_LOGITS", 1)
    monkeypatch.setattr(gradients, "LOSS_ROWS", 1)
    ops = make_backend("mlx", dtype="bfloat16", generic=generic)
    N = 600
    with ops.scope():
        x, table = mx.ones((N, 3), mx.bfloat16), mx.zeros((2, 3), mx.bfloat16)
        operands = x, table, mx.zeros((N,), mx.int32), mx.ones((N,))
        _, _, dtable = gradients.function(ops, "cross_entropy")(*operands, wanted=(False, True))
        assert dtable.dtype == mx.bfloat16
        assert dtable.tolist() == [[-300.0] * 3, [300.0] * 3]


def test_memory_does_not_grow_with_the_steps() -> None:
    trainer = Trainer(CONFIG, TinyData(), tiny_settings(dropout=0.1), backend=make_backend("mlx"))
    active = []
    for _ in range(8):
        trainer.step()
        mx.synchronize()
        active.append(mx.get_active_memory())
    # MLX frees memory a little later at times; a leak would be in all of the last steps.
    assert min(active[-3:]) <= active[2] * 1.01, active
    assert max(active[2:]) <= active[2] * 1.1, active


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions that MLX has traced to compile them, in order."""
    from gptx.backends import mlx_training

    traced: list[str] = []
    compile = mx.compile

    def counting(f: Any) -> Any:
        def function(*arguments: Any) -> Any:
            traced.append(f.__name__)
            return f(*arguments)

        return compile(function)

    monkeypatch.setattr(mlx_training.mx, "compile", counting)
    mlx_training._adamw.cache_clear()
    return traced


def test_no_number_compiles_a_step_again(traces: list[str]) -> None:
    """A trace only: MLX compiles when it computes the results."""
    from gptx.backends.mlx_training import MlxLoss, _adamw

    ops = make_backend("mlx")
    options: dict[str, Any] = {"trainable": None, "recompute": "cheap", "dropout": DROPOUT}
    with ops.scope():
        model = model_of(TINY, ops)
        function = MlxLoss(forward, model, compiled=True, **options)
        function._start = lambda results: results  # type: ignore[method-assign]
        weights = dict(named_weights(model.weights))
        for step in range(3):
            batch = batch_of(TINY, 2, 5)
            loss, found = function.gradients(
                weights, batch, scale=1 / (step + 1), step=step, first_sequence=2 * step
            )
            w, g = list(weights.values()), [found[name] for name in weights]
            update = _adamw(0.9, 0.99, 1e-8, (0.1,) * len(weights), True)
            update(w, g, w, w, mx.array([0.1 * step, 1.0, 1.0, step + 1.0]))
        assert loss.shape == ()
        assert {n: g.shape for n, g in found.items()} == {n: w.shape for n, w in weights.items()}
        assert traces == ["_gradients", "update"]
        function.loss(weights, batch, scale=1.0)
        function.gradients(weights, batch_of(TINY, 3, 5), scale=1.0)
    assert traces == ["_gradients", "update", "_loss", "_gradients"]


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles with g++ on the CPU")
@pytest.mark.parametrize("dropout", [Dropout(), DROPOUT], ids=["", "dropout"])
def test_a_compiled_run_is_the_same_run(dropout: Dropout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first compilation takes a second for each kernel, and MLX keeps them."""
    from gptx.backends.mlx_training import MlxTraining

    losses = []
    for compiled in (False, True):
        monkeypatch.setattr(MlxTraining, "compiles_steps", compiled)
        settings = tiny_settings(dropout=dropout.resid, accumulate=2)
        trainer = Trainer(CONFIG, TinyData(8), settings, backend=make_backend("mlx"))
        losses.append([trainer.step().loss for _ in range(5)])
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)
