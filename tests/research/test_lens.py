"""The logit lens: the last layer is the model, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptx import research
from gptx.backends import Backend
from gptx.errors import ParameterError
from gptx.generation.text_model import Model
from gptx.hooks import logits_from
from gptx.research.activations import record
from tests.support.backends import make_backend
from tests.support.models import make_model
from tests.support.random_models import CASES, random_ids

OP_BY_OP = ("numpy-ops", "numpy-generic", "mlx", "mlx-generic", "strict")
TEXT = "To be, or not to be"


def test_the_last_layer_is_the_logits_bit_for_bit(backend: Backend) -> None:
    for case in ("untied", "gelu-erf"):
        model = make_model(CASES[case], backend)
        ids = random_ids(model.config, 1, 6)[0].tolist()
        lens = research.logit_lens(model, ids)
        n = model.config.n_layer
        assert lens.names == ("h.0.resid_pre", *(f"h.{i}.resid_post" for i in range(n)))
        np.testing.assert_array_equal(lens.logits[-1], model.logits(ids))
        assert np.abs(lens.logits[-1] - lens.logits[-2]).max() > 1e-3


@pytest.mark.parametrize("name", OP_BY_OP)
def test_the_lens_of_the_last_layer_computes_the_same_bits(name: str) -> None:
    """Not by definition: last layer norm and head of the last residual stream."""
    model = make_model(CASES["untied"], make_backend(name))
    ids = random_ids(model.config, 1, 6)[0].tolist()
    with model.backend.scope():
        x = record(model, ids, ["h.2.resid_post"])["h.2.resid_post"]
        logits = model.backend.to_numpy(logits_from(model.gpt2, "h.2.resid_post", x))[0]
    np.testing.assert_array_equal(logits, model.logits(ids))


def test_a_layer_is_read_by_the_last_norm_and_the_head(shakespeare: Model) -> None:
    lens = research.logit_lens(shakespeare, TEXT, ["h.3.resid_mid", "blocks.1.hook_mlp_out"], k=3)
    assert lens.names == ("h.3.resid_mid", "blocks.1.hook_mlp_out")
    weights = shakespeare.gpt2.weights
    for row, name in enumerate(("h.3.resid_mid", "h.1.mlp.c_proj")):
        x = research.activations(shakespeare, TEXT, name)[name].astype(np.float64)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)
        expected = (x * weights.ln_f.weight + weights.ln_f.bias) @ weights.wte.weight.T
        np.testing.assert_allclose(lens.logits[row], expected, rtol=0, atol=1e-4)


def test_the_most_probable_tokens(shakespeare: Model) -> None:
    lens = research.logit_lens(shakespeare, TEXT, k=4)
    best = shakespeare.logits(lens.ids).argmax(axis=-1)
    np.testing.assert_array_equal(lens.top_ids[-1, :, 0], best)
    assert lens.top_tokens[-1][-1][0] == shakespeare.decode([int(best[-1])])
    assert len(lens.top_tokens) == 7 == len(lens.top_tokens[0])
    assert (np.diff(lens.top_logprobs, axis=-1) <= 0).all()
    logits = lens.logits[-1, -1].astype(np.float64)
    expected = logits[best[-1]] - np.log(np.exp(logits).sum())
    assert lens.top_logprobs[-1, -1, 0] == pytest.approx(expected, abs=1e-5)
    assert "".join(lens.tokens) == TEXT
    assert repr(lens).startswith("<LogitLens of 7 tokens, at the last one: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": "h.0.attn.q"}, "names has h.0.attn.q, an array [1, 6, 7, 32], expected [1, 7"),
        ({"names": "h.0.mlp.act"}, "expected [1, 7, 192]"),
        ({"names": "h.0.resid"}, "did you mean"),
        ({"k": 0}, "k is 0, expected a whole number"),
    ],
)
def test_invalid_input_is_refused(options: Any, message: str, shakespeare: Model) -> None:
    with pytest.raises(ParameterError) as e:
        research.logit_lens(shakespeare, TEXT, **options)
    assert message in str(e.value)
