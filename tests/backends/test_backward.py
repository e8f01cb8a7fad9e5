"""The loss of a model and its gradients: finite differences, recomputation, frozen weights."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gptx
from gptx import weights as stored
from gptx.backends import Backend, gradients
from gptx.backends.backward import (
    Batch,
    Dropout,
    LossFunction,
    loss_function,
)
from gptx.backends.graph import UnsupportedOp, Weight, named_weights
from gptx.config import GPT2Config
from gptx.kv_cache import KVCache
from gptx.model import Transformer, forward
from tests.support.models import EXACT, drawn_weights
from tests.support.random_models import CASES, random_ids

Random = np.random.Generator
SHRUNK = {"n_layer": 2, "n_embd": 12, "n_head": 3, "vocab_size": 23}
SMALL = replace(CASES["124M"], **SHRUNK, bos_token_id=None, eos_token_id=None)
DROPOUT = Dropout(0.1, 0.2, 0.3, seed=4)


def transformer(config: GPT2Config, ops: Backend = EXACT) -> Transformer:
    return Transformer(config, stored.to_backend(drawn_weights(config), ops), ops)


def batch_of(config: GPT2Config, B: int = 2, T: int = 6) -> Batch:
    ids = random_ids(config, B, T + 1)
    weights = np.ones((B, T), np.float32)
    weights[0, -2:] = 0  # padding
    return Batch(ids[:, :-1], ids[:, 1:], weights)


def gradients_of(
    model: Transformer, batch: Batch, step: int = 0, **options: Any
) -> tuple[float, dict[str, Any]]:
    function = loss_function(forward, model, **options)
    weights = dict(named_weights(model.weights))
    loss, found = function.gradients(weights, batch, scale=1 / batch.n_tokens, step=step)
    return float(loss), found


SIZES = ("355M", "774M", "1558M", "epsilon")  # other numbers, the same ops: soak tests


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.soak if case in SIZES else ())
        for case in [*CASES, "dropout"]
    ],
)
def test_gradients_equal_finite_differences(case: str, random: Random) -> None:
    """Every weight of every switch of the config, along random directions."""
    case, dropout = ("untied", DROPOUT) if case == "dropout" else (case, None)
    config = replace(CASES[case], **SHRUNK, bos_token_id=None, eos_token_id=None)
    model, batch = transformer(config), batch_of(config)
    function = loss_function(forward, model, dropout=dropout)
    weights = dict(named_weights(model.weights))
    options = {"scale": 1 / batch.n_tokens, "step": 3}
    found = function.gradients(weights, batch, **options)[1]
    assert set(found) == set(config.tensor_shapes())
    tolerance = 2e-6 if config.activation_function == "gelu" else 1e-7
    for name, g in found.items():
        assert g.shape == weights[name].shape
        direction = random.standard_normal(g.shape)
        step = 1e-5 / np.linalg.norm(direction)
        losses = [
            float(function.gradients(weights | {name: moved}, batch, **options)[0])
            for moved in (weights[name] + step * direction, weights[name] - step * direction)
        ]
        error = (losses[0] - losses[1]) / (2 * step) - np.sum(g * direction)
        assert abs(error) < tolerance * np.linalg.norm(g) * np.linalg.norm(direction), name


def test_the_loss_is_that_of_the_logits() -> None:
    model, batch = transformer(SMALL), batch_of(SMALL)
    cache = KVCache(SMALL, EXACT, *batch.ids.shape)
    logits = forward(model, batch.ids, cache.extend([batch.ids.shape[1]] * 2), cache)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
    wanted = float((nll * batch.weights).sum() / batch.n_tokens)
    function = loss_function(forward, model, dropout=DROPOUT)  # which an evaluation leaves out
    weights = dict(named_weights(model.weights))
    loss = function.loss(weights, batch, scale=1 / batch.n_tokens)
    assert float(loss) == pytest.approx(wanted, rel=1e-12)
    assert gradients_of(model, batch)[0] == pytest.approx(wanted, rel=1e-12)
    assert gradients_of(model, batch, dropout=DROPOUT)[0] != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("recompute", ["cheap", "block"])
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["", "dropout"])
def test_recomputation_changes_no_bit(recompute: str, dropout: Dropout | None) -> None:
    model, batch = transformer(SMALL), batch_of(SMALL)
    loss, found = gradients_of(model, batch, step=5, dropout=dropout)
    again, equal = gradients_of(model, batch, step=5, dropout=dropout, recompute=recompute)
    assert again == loss
    for name in found:
        np.testing.assert_array_equal(equal[name], found[name])


def test_recomputation_saves_memory() -> None:
    """Of a model with more activations than weights."""
    config = replace(SMALL, n_layer=8)
    model, batch = transformer(config), batch_of(config, 4, 60)
    peaks = {}
    for recompute in ("none", "cheap", "block"):
        tracemalloc.start()
        gradients_of(model, batch, recompute=recompute)
        peaks[recompute] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks["cheap"] < 0.85 * peaks["none"], peaks
    assert peaks["block"] < 0.5 * peaks["none"], peaks


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["", "dropout"])
def test_a_batch_in_parts_has_the_same_gradients(dropout: Dropout | None) -> None:
    """transformers #34191 and trl #2175: the mean is over the tokens of all parts."""
    model, batch = transformer(SMALL), batch_of(SMALL, B=4)
    loss, found = gradients_of(model, batch, dropout=dropout)
    function = loss_function(forward, model, dropout=dropout)
    weights = dict(named_weights(model.weights))
    parts = [
        function.gradients(
            weights, batch.sequences(i, i + 1), scale=1 / batch.n_tokens, first_sequence=i
        )
        for i in range(4)
    ]
    assert sum(float(part[0]) for part in parts) == pytest.approx(loss, rel=1e-12)
    for name, g in found.items():
        total = sum(part[1][name] for part in parts)
        np.testing.assert_allclose(total, g, rtol=0, atol=1e-12 * np.linalg.norm(g))


@pytest.mark.parametrize(
    "trainable",
    [
        ["h.1.mlp.c_fc.weight"],
        ["h.0.attn.c_attn.bias", "ln_f.weight"],
        ["wte.weight"],
        ["wpe.weight", "h.1.ln_1.bias"],
        [],
    ],
    ids=["matrix", "vectors", "table", "positions", "none"],
)
def test_frozen_weights_have_no_gradient(trainable: list[str]) -> None:
    model, batch = transformer(SMALL), batch_of(SMALL)
    _, everything = gradients_of(model, batch)
    _, found = gradients_of(model, batch, trainable=trainable)
    assert sorted(found) == sorted(trainable)
    for name, g in found.items():
        np.testing.assert_array_equal(g, everything[name])


def test_frozen_weights_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product below the first trainable weight, and no result kept for a frozen one."""
    model = transformer(SMALL)
    function = loss_function(forward, model, trainable=["h.1.mlp.c_proj.bias"])
    assert isinstance(function, LossFunction)
    calls = []
    vjp = gradients.FUNCTIONS["linear_vjp"]

    def counted(ops: Any, g: Any, x: Any, *operands: Any, wanted: Any) -> Any:
        calls.append((x, wanted))
        return vjp(ops, g, x, *operands, wanted=wanted)

    monkeypatch.setitem(gradients.FUNCTIONS, "linear_vjp", counted)
    weights = dict(named_weights(model.weights))
    function.gradients(weights, batch_of(SMALL), scale=1.0)
    assert calls == [(None, (False, False, True))]


@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_nothing_below_the_trainable_weights_is_computed_again(recompute: str) -> None:
    """The operand of the first trainable layer is a result that `cheap` drops elsewhere."""
    layers = []

    class Counting(Backend):
        def linear(self, x: Any, weight: Any, bias: Any) -> Any:
            layers.append(weight.shape)
            return super().linear(x, weight, bias)

    model = transformer(SMALL, Counting(np, dtype="float64"))
    options = {"trainable": ["h.1.attn.c_attn.weight"], "recompute": recompute}
    _, found = gradients_of(model, batch_of(SMALL), **options)
    n_again = {"none": 0, "cheap": 0, "block": 3}[recompute]  # of the last block
    assert len(layers) == 4 * SMALL.n_layer + n_again
    _, expected = gradients_of(transformer(SMALL), batch_of(SMALL))
    for name, g in found.items():
        np.testing.assert_array_equal(g, expected[name])


def test_masked_targets_may_be_any_numbers() -> None:
    """-100 as in PyTorch, for one; a compiled loss would read outside of the logits."""
    targets = []

    class Reading(Backend):
        def cross_entropy(self, *operands: Any, **options: Any) -> Any:
            targets.extend(operands[2].tolist())
            return gradients.cross_entropy(self, *operands, **options)

    batch = batch_of(SMALL)
    expected = gradients_of(transformer(SMALL), batch)[0]
    wrong = np.where(batch.weights == 0, [-100, 10**6] * 3, batch.targets)
    model = transformer(SMALL, Reading(np, dtype="float64"))
    assert gradients_of(model, replace(batch, targets=wrong))[0] == expected
    assert targets == np.where(batch.weights == 0, 0, batch.targets).reshape(-1).tolist()


def test_dropout_changes_with_step_and_seed() -> None:
    model, batch = transformer(SMALL), batch_of(SMALL)
    losses = {
        gradients_of(model, batch, step=step, dropout=Dropout(0.1, 0.1, 0.1, seed=seed))[0]
        for step, seed in [(0, 0), (1, 0), (0, 1), (0, 0)]
    }
    assert len(losses) == 3


@pytest.mark.parametrize(("place", "calls"), [("embd", 2), ("attn", 6), ("resid", 8)])
def test_each_place_has_its_own_dropout(place: str, calls: int) -> None:
    """And the others cost nothing: forward, backward, and again for the pattern of attention."""
    drawn = []

    class Counting(Backend):
        def dropout(self, x: Any, p: float, **counters: int) -> Any:
            drawn.append(p)
            return gradients.dropout(self, x, p, **counters)

    batch = batch_of(SMALL)
    plain, _ = gradients_of(transformer(SMALL), batch)
    model = transformer(SMALL, Counting(np, dtype="float64"))
    dropped, _ = gradients_of(model, batch, dropout=Dropout(**{place: 0.5}))
    assert dropped != pytest.approx(plain, rel=1e-3)
    assert drawn == [0.5] * calls


def test_dropout_has_the_places_of_gpt2() -> None:
    """One for the embeddings, and in each block the pattern and both results."""
    model = transformer(SMALL)
    function = loss_function(forward, model, dropout=DROPOUT)
    sites = function._plan.sites
    ops = [node.op for node, _ in sorted(sites.items(), key=lambda item: item[1])]
    assert ops == ["add", *["attention", "add", "add"] * SMALL.n_layer]
    assert sorted(sites.values()) == list(range(len(sites)))


def test_a_backend_may_replace_the_loss_function() -> None:
    calls = []

    class Own(Backend):
        def loss_function(self, forward: Any, model: Any, **options: Any) -> str:
            calls.append((model, sorted(options)))
            return "own"

    model = transformer(SMALL, Own(np, dtype="float64"))
    assert loss_function(forward, model) == "own"
    assert calls == [(model, ["dropout", "recompute", "trainable"])]
    generic = transformer(SMALL, Own(np, dtype="float64", generic=True))
    assert isinstance(loss_function(forward, generic), LossFunction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": ["h.2.ln_1.bias"]}, "trainable has 'h.2.ln_1.bias', which is no weight"),
        ({"recompute": "all"}, "recompute is 'all', expected none, cheap, block"),
    ],
)
def test_an_invalid_option_is_refused(options: Any, message: str) -> None:
    with pytest.raises(gptx.errors.ParameterError, match=message):
        loss_function(forward, transformer(SMALL), **options)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_an_invalid_probability_is_refused(p: float) -> None:
    with pytest.raises(gptx.errors.ParameterError, match="for attn, expected at least 0"):
        Dropout(attn=p)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_an_invalid_seed_is_refused(seed: int) -> None:
    with pytest.raises(gptx.errors.ParameterError, match=f"seed is {seed}, expected at least 0"):
        Dropout(seed=seed)
    Dropout(seed=2**64 - 1)


def test_a_pass_without_a_head_is_not_supported() -> None:
    def headless(model: Any, ids: Any, positions: Any, cache: Any, *, last_only: bool) -> Any:
        return model.backend.embed(ids, model.weights.wte.weight)

    with pytest.raises(UnsupportedOp, match="unembed"):
        loss_function(headless, transformer(SMALL))


def test_an_op_without_a_gradient_is_not_supported() -> None:
    def with_softmax(model: Any, ids: Any, positions: Any, cache: Any, *, last_only: bool) -> Any:
        ops, table = model.backend, model.weights.wte.weight
        return ops.unembed(ops.softmax(ops.embed(ids, table)), table)

    with pytest.raises(UnsupportedOp, match="the gradient of softmax"):
        loss_function(with_softmax, transformer(SMALL))


def test_weights_are_named_as_in_files() -> None:
    names = [name for name, _ in named_weights(transformer(SMALL).weights)]
    assert sorted(names) == sorted(SMALL.tensor_shapes())
    assert Weight("h.0").name == "h.0"
