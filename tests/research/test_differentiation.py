"""Gradients by activations: finite differences, and completeness of integrated gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptx import research
from gptx.backends import Backend, get_backend
from gptx.errors import NonFiniteError, ParameterError
from gptx.generation.text_model import Model
from gptx.logits import all_logits
from gptx.quantization import Quantization
from tests.support.backends import make_backend
from tests.support.lens_cases import CASES as LENS_CASES
from tests.support.models import EXACT, drawn_weights, make_model
from tests.support.random_models import random_ids

TINY = LENS_CASES["gelu_new"]
IDS = random_ids(TINY, 1, 5, seed=11)[0].tolist()
TEXT = "To be, or not to be"


def hidden_by(name: str, T: int) -> Any:
    """Return 0 where a perturbation would be masked, 1 elsewhere."""
    return np.tril(np.ones((T, T))) if name.endswith((".scores", ".pattern")) else 1.0


@pytest.mark.parametrize("case", ["gelu_new", "gelu", "relu", "untied"])
def test_gradients_equal_finite_differences(case: str, random: np.random.Generator) -> None:
    """Every name, in float64 on the generic ops, along a random direction."""
    model = make_model(LENS_CASES[case], EXACT)
    names = [name for name in model.hook_names if name != "lm_head"]
    names += ["blocks.1.attn.hook_q", "blocks.0.attn.hook_z"]
    found = research.gradients(model, IDS, names, 3, 8, position=-2)
    assert list(found) == names
    metric = research.logit_difference(model, 3, 8, position=-2)
    assert found.logit == pytest.approx(metric(model.logits(IDS)), abs=1e-5)
    tolerance = 1e-5 if model.config.activation_function == "gelu" else 1e-6
    for name, g in found.items():
        direction = random.standard_normal(g.shape) * hidden_by(name, len(IDS))
        g = np.where(direction != 0, g, 0)
        values = []
        for step in (1e-5, -1e-5):
            hooks = {name: lambda x, s=step, d=direction: x + s * d}
            with model.hooks(hooks), EXACT.scope():
                logits = np.asarray(all_logits(model.gpt2, IDS))  # in float64
            values.append(logits[-2, 3] - logits[-2, 8])
        error = (values[0] - values[1]) / 2e-5 - np.sum(g * direction)
        assert abs(error) <= tolerance * np.linalg.norm(g) * np.linalg.norm(direction), name


@pytest.mark.parametrize("name", ["numpy", "mlx", "mlx-generic", "strict", "cupy-cpu"])
def test_backends_agree(name: str) -> None:
    config = LENS_CASES["untied"]
    names = [f"h.0.{x}" for x in ("resid_pre", "attn.q", "attn.scores", "attn.pattern", "mlp.act")]
    names += ["wte", "wpe", "h.1.attn.z", "ln_f"]
    exact = research.gradients(make_model(config, EXACT), IDS, names, 5)
    found = research.gradients(make_model(config, make_backend(name)), IDS, names, 5)
    assert found.logit == pytest.approx(exact.logit, abs=1e-5)
    for key, g in exact.items():
        assert found[key].shape == g.shape
        assert np.abs(found[key] - g).max() < 1e-5 * max(1, np.abs(g).max()), key


def test_a_gradient_of_the_last_norm_is_a_row_of_the_head(backend: Backend) -> None:
    model = make_model(TINY, backend)
    found = research.gradients(model, IDS, "ln_f", 3)["ln_f"]
    np.testing.assert_array_equal(found[-1], backend.to_numpy(model.gpt2.weights.wte.weight)[3])
    assert not found[:-1].any()


@pytest.mark.parametrize("name", ["numpy", "mlx", "strict", "cupy-cpu"])
@pytest.mark.parametrize(
    "activation", ["wte", "h.0.resid_pre", "h.1.mlp.act", "blocks.1.attn.hook_pattern"]
)
def test_integrated_gradients_are_complete(activation: str, name: str) -> None:
    if name in ("strict", "cupy-cpu") and activation not in ("wte", "h.1.mlp.act"):
        pytest.skip("the same ops, slowly")
    model = make_model(TINY, make_backend(name))
    found = research.integrated_gradients(model, IDS, 3, 8, name=activation)
    metric = research.logit_difference(model, 3, 8)
    assert found.logit == pytest.approx(metric(model.logits(IDS)), abs=1e-4)
    with research.ablate(model, activation):
        assert found.baseline == pytest.approx(metric(model.logits(IDS)), abs=1e-4)
    assert abs(found.values.sum() - (found.logit - found.baseline)) < 1e-3
    assert abs(found.gap) < 1e-3
    assert found.by_token.sum() == pytest.approx(found.values.sum(), abs=1e-9)
    assert found.by_token.shape == (5,)


def test_integrated_gradients_of_text(shakespeare: Model) -> None:
    found = research.integrated_gradients(shakespeare, TEXT)
    assert found.token == shakespeare.logits(found.ids)[-1].argmax()
    assert abs(found.gap) < 1e-3
    assert found.values.shape == (7, 192)
    assert "".join(found.tokens) == TEXT
    end = research.activations(shakespeare, TEXT, "wte")["wte"]
    same = research.integrated_gradients(shakespeare, TEXT, baseline=end)
    assert same.baseline == pytest.approx(same.logit, abs=1e-5)
    assert not same.values.any()


def test_a_linear_activation_is_exact_at_once() -> None:
    model = make_model(TINY, EXACT)
    found = research.integrated_gradients(model, IDS, 3, name="ln_f", tolerance=1e-10)
    rows = research.activations(model, IDS, "ln_f")["ln_f"][-1] * model.gpt2.weights.wte.weight[3]
    np.testing.assert_allclose(found.values[-1], rows, rtol=1e-10)
    assert found.n_points == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: research.gradients(m, IDS, "lm_head"), "lm_head has the logits themselves"),
        (lambda m: research.gradients(m, IDS, "h.0.ln"), "did you mean"),
        (lambda m: research.gradients(m, IDS, "wte", 99), "token is 99"),
        (lambda m: research.gradients(m, IDS, "wte", position=5), "position is 5"),
        (lambda m: research.integrated_gradients(m, IDS, name="w*"), "which is 2 activations"),
        (lambda m: research.integrated_gradients(m, IDS, tolerance=0), "tolerance is 0"),
        (lambda m: research.integrated_gradients(m, IDS, max_points=3), "max_points is 3"),
        (
            lambda m: research.integrated_gradients(m, IDS, baseline=np.zeros(3)),
            "baseline has the shape [3], expected that of wte, [5, 12]",
        ),
        (
            lambda m: research.integrated_gradients(m, IDS, tolerance=1e-12, max_points=8),
            "after 8 points, expected 1e-12: raise max_points",
        ),
    ],
)
def test_invalid_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ParameterError) as e:
        call(make_model(TINY, get_backend("numpy")))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_a_damaged_model_and_a_damaged_baseline_are_errors_of_numbers() -> None:
    weights = {name: x.copy() for name, x in drawn_weights(TINY).items()}
    weights["h.0.mlp.c_fc.weight"][0, 0] = np.nan
    damaged = make_model(TINY, get_backend("numpy"), weights)
    for call in (research.attribute, research.integrated_gradients):
        with pytest.raises(NonFiniteError, match="its weights are damaged"):
            call(damaged, IDS)
    model = make_model(TINY, get_backend("numpy"))
    with pytest.raises(NonFiniteError, match="baseline has a NaN or an infinity"):
        research.integrated_gradients(model, IDS, baseline=np.full((5, 12), np.inf))


def test_gradients_of_a_hooked_or_quantized_model_are_refused() -> None:
    model = make_model(TINY, get_backend("numpy"))
    hooks = model.hooks({"ln_f": lambda x: None})
    with pytest.raises(ParameterError, match="gradients do not pass through hooks"), hooks:
        research.gradients(model, IDS, "wte")
    config = LENS_CASES["124M"]
    model = make_model(config, get_backend("numpy"), quantization=Quantization(32, 8))
    with pytest.raises(ParameterError, match="gradients need float weights"):
        research.gradients(model, [1, 2], "wte")
