"""Ablation and steering, for prompts and for decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptx import research
from gptx.backends import Backend, get_backend
from gptx.errors import NonFiniteError, ParameterError
from gptx.generation.text_model import Model
from tests.support.lens_cases import CASES as LENS_CASES
from tests.support.models import make_model
from tests.support.random_models import random_ids

TINY = LENS_CASES["gelu_new"]
IDS = random_ids(TINY, 1, 5, seed=11)[0].tolist()
TEXTS = [IDS[::-1], IDS[:2], [7, 8, 9]]


def read(model: Model, name: str) -> np.ndarray:
    """Return an activation within the interventions that are active."""
    return research.activations(model, IDS, name)[name]


@pytest.mark.parametrize(
    "name",
    ["h.1.attn.z", "h.0.attn.k", "blocks.1.attn.hook_q", "h.1.attn.pattern", "h.0.resid_mid"],
)
def test_zero_ablation(name: str, library: Backend) -> None:
    model = make_model(TINY, library)
    with research.ablate(model, name):
        assert not read(model, name).any()
    if name == "h.0.resid_mid":
        return
    plain = read(model, name)
    with research.ablate(model, name, heads=[0, 2]):
        found = read(model, name)
    axis = {"h.1.attn.z": None, "blocks.1.attn.hook_q": 1}.get(name, 0)
    if axis is None:
        found, plain = (x.reshape(5, 3, TINY.head_dim) for x in (found, plain))
        axis = 1
    found, plain = np.moveaxis(found, axis, 0), np.moveaxis(plain, axis, 0)
    assert not found[[0, 2]].any()
    np.testing.assert_array_equal(found[1], plain[1])


def test_mean_ablation(library: Backend) -> None:
    model = make_model(TINY, library)
    names = ["h.1.mlp.act", "h.0.attn.v"]
    rows = [research.activations(model, ids, names) for ids in TEXTS]
    with research.ablate(model, names, "mean", texts=TEXTS):
        found = research.activations(model, IDS, names)
    mean = np.concatenate([x["h.1.mlp.act"] for x in rows]).mean(axis=0)
    np.testing.assert_allclose(found["h.1.mlp.act"], np.tile(mean, (5, 1)), rtol=0, atol=1e-6)
    heads = np.concatenate([x["h.0.attn.v"] for x in rows], axis=1).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found["h.0.attn.v"], np.tile(heads, (1, 5, 1)), rtol=0, atol=1e-6)


def test_resampling_takes_tokens_of_the_texts(library: Backend) -> None:
    model = make_model(TINY, library)
    names = ["h.0.resid_post", "blocks.1.attn.hook_k"]
    pools = [research.activations(model, ids, names) for ids in TEXTS]
    drawn = []
    for seed in (0, 0, 1):
        with research.ablate(model, names, "resample", texts=TEXTS, seed=seed):
            found = research.activations(model, IDS, names)
        rows = np.concatenate([pool["h.0.resid_post"] for pool in pools])
        matches = np.isclose(found["h.0.resid_post"][:, None], rows, atol=1e-6).all(axis=-1)
        assert (matches.sum(axis=1) >= 1).all()
        drawn.append(matches.argmax(axis=1).tolist())
        keys = np.concatenate([pool["blocks.1.attn.hook_k"] for pool in pools])[drawn[-1]]
        np.testing.assert_allclose(found["blocks.1.attn.hook_k"], keys, rtol=0, atol=1e-6)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1


def test_an_ablated_decode_step_is_that_of_the_whole_text(library: Backend) -> None:
    """Resampling depends on the position, not on the step."""
    model = make_model(TINY, library)
    with research.ablate(model, "h.*.attn.z", "resample", texts=TEXTS, heads=[1]):
        tokens = model.generate(IDS[:3], max_tokens=4).tokens
        for n in range(4):
            assert model.logits([*IDS[:3], *tokens[:n]])[-1].argmax() == tokens[n]


def test_a_steering_vector_is_a_difference_of_means(library: Backend) -> None:
    model = make_model(TINY, library)
    name = "h.0.resid_post"
    last = research.steering_vector(model, TEXTS[:2], TEXTS[2], name)
    states = [research.hidden_states(model, ids)[1] for ids in TEXTS]
    expected = (states[0][-1] + states[1][-1]) / 2 - states[2][-1]
    np.testing.assert_allclose(last, expected, rtol=0, atol=1e-6)
    mean = research.steering_vector(model, TEXTS[0], TEXTS[2], name, pooling="mean")
    expected = states[0].mean(axis=0) - states[2].mean(axis=0)
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-6)


def test_steering_adds_a_vector(library: Backend) -> None:
    model = make_model(TINY, library)
    plain, vector = read(model, "h.0.resid_post"), np.arange(12.0)
    with research.steer(model, {"h.0.resid_post": vector}, scale=-0.5, start=2):
        found = read(model, "h.0.resid_post")
        tokens = model.generate(IDS[:3], max_tokens=3).tokens
        assert model.logits([*IDS[:3], *tokens[:2]])[-1].argmax() == tokens[2]
    np.testing.assert_array_equal(found[:2], plain[:2])
    np.testing.assert_allclose(found[2:], plain[2:] - vector / 2, rtol=0, atol=1e-6)


def test_a_large_vector_decides_the_text() -> None:
    model = make_model(LENS_CASES["untied"], get_backend("numpy"))
    with research.steer(model, {"ln_f": model.gpt2.weights.lm_head.weight[17]}, scale=1e3):
        assert model.generate(IDS[:2], max_tokens=3).tokens == [17, 17, 17]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "median"}, "how is 'median', expected 'zero' or 'mean' or 'resample'"),
        ({"how": "mean"}, "how is 'mean' without texts, expected texts for 'mean' and 'resample'"),
        ({"how": "zero", "texts": TEXTS}, "how is 'zero' with texts, expected texts"),
        ({"names": "ln_f", "heads": [1]}, "ln_f has no heads: omit heads"),
        ({"heads": 1}, "heads is 1, expected a list of numbers from 0 to 2"),
        ({"names": 5}, "names is 5, expected a name or a list of names"),
        ({"heads": [3]}, "heads is [3], expected a list of numbers from 0 to 2"),
        ({"names": "h.0.attn.scores"}, "cannot be ablated: ablate attn.pattern in its place"),
        ({"names": "h.0.attn.keys"}, "cannot be ablated: ablate attn.k in its place"),
        (
            {"names": "h.0.attn.pattern", "how": "mean", "texts": TEXTS},
            "has a column for each position, how is 'mean', expected 'zero'",
        ),
        ({"seed": -1}, "seed is -1"),
        ({"names": "h.0.attn.y"}, "did you mean"),
    ],
)
def test_contradictory_ablations_are_refused(options: Any, message: str) -> None:
    model = make_model(TINY, get_backend("numpy"))
    with pytest.raises(ParameterError) as e:
        research.ablate(model, **({"names": "h.0.attn.z"} | options))
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 2


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        ({"h.0.ln_1": np.zeros(5)}, {}, "the vector of h.0.ln_1 has the shape [5], expected [12]"),
        ({"h.0.attn.q": np.zeros(4)}, {}, "is an array [1, 3, 5, 4], expected one of a row"),
        ({"h.0.ln_1": np.zeros(12)}, {"scale": float("nan")}, "scale is nan, expected a finite"),
        ({"h.0.ln_1": np.zeros(12)}, {"start": -1}, "start is -1"),
        ({"h.0.ln_1": "north"}, {}, "vectors is 'north', expected an array of numbers"),
        (np.zeros(12), {}, "expected a dict of names and vectors"),
        ({"h.0.ln": np.zeros(12)}, {}, "did you mean"),
    ],
)
def test_invalid_vectors_are_refused(vectors: Any, options: Any, message: str) -> None:
    model = make_model(TINY, get_backend("numpy"))
    logits = model.logits(IDS)
    with pytest.raises(ParameterError) as e, research.steer(model, vectors, **options):
        model.logits(IDS)
    assert message in str(e.value)
    np.testing.assert_array_equal(model.logits(IDS), logits)


def test_a_vector_with_a_nan_is_an_error_of_numbers() -> None:
    model = make_model(TINY, get_backend("numpy"))
    with pytest.raises(NonFiniteError, match="vectors has a NaN or an infinity"):
        research.steer(model, {"ln_f": np.full(12, np.nan)})
