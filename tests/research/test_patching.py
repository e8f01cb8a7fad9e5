"""Activation patching: from one run into another, by position and by head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx import research
from gptx.backends import Backend, get_backend
from gptx.errors import ParameterError, PromptError
from gptx.generation.text_model import Model
from tests.support.lens_cases import CASES as LENS_CASES
from tests.support.lens_cases import LAYER, TOKEN
from tests.support.models import make_model
from tests.support.random_models import random_ids

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = LENS_CASES["gelu_new"]
IDS = random_ids(TINY, 1, 4, seed=11)[0].tolist()
KINDS = ["h.1.resid_pre", "h.1.attn.pattern", "h.1.attn.z", "blocks.0.attn.hook_v", "ln_f"]


def last_logit(logits: np.ndarray) -> float:
    return float(logits[-1, 3])


def test_a_run_patched_with_itself_changes_no_bit(backend: Backend) -> None:
    model = make_model(TINY, backend)
    names = KINDS if backend.name != "cupy" else ["h.1.attn.pattern"]
    found = research.patch(model, IDS, IDS, names, last_logit)
    assert found.clean == found.corrupted
    assert (found.values == found.corrupted).all()
    names = [name for name in names if ".attn." in name]
    heads = research.patch(model, IDS, IDS, names, last_logit, by="head")
    assert (heads.values == heads.corrupted).all()


def test_a_patch_equals_that_of_transformer_lens(backend: Backend) -> None:
    with np.load(GOLDEN / "lens.npz") as data:
        ids, logits = data["gelu_new.ids"][0].tolist(), data["gelu_new.patched"]
    model = make_model(TINY, backend)
    for token in (3, 8):
        metric = research.logit_difference(model, token, 0)
        found = research.patch(model, ids[::-1], ids, f"h.{LAYER}.resid_post", metric)
        expected = logits[-1, token] - logits[-1, 0]
        assert found.values[0, TOKEN] == pytest.approx(expected, abs=1e-4)


def test_the_residual_stream_at_the_last_token_recovers_everything_at_the_end() -> None:
    """Before the last norm, the logits of a token depend on its own row only."""
    model = make_model(TINY, get_backend("numpy"))
    found = research.patch(model, IDS, IDS[::-1], "h.*.resid_post", last_logit)
    assert found.names == ("h.0.resid_post", "h.1.resid_post")
    np.testing.assert_allclose(found.recovered[1], [0, 0, 0, 1], rtol=0, atol=1e-5)
    assert found.values.shape == (2, 4)
    assert found.clean_ids == found.corrupted_ids[::-1] == IDS
    assert found.clean != found.corrupted


def test_all_heads_are_the_whole_activation() -> None:
    """In the last block, whose heads are added: the effects of single heads before the MLP."""
    model = make_model(TINY, get_backend("numpy"))
    other = IDS[::-1]
    names = ["h.1.attn.z", "blocks.1.attn.hook_z"]
    found = research.patch(model, IDS, other, names, last_logit, by="head")
    np.testing.assert_array_equal(found.values[0], found.values[1])
    rows = research.activations(model, IDS, "h.1.attn.z")["h.1.attn.z"]
    D = TINY.head_dim

    def replace(x: Any) -> Any:
        y = x.copy()
        y[0, :, D : 2 * D] = rows[:, D : 2 * D]
        return y

    with model.hooks({"h.1.attn.z": replace}):
        assert found.values[0, 1] == last_logit(model.logits(other))


def test_a_patching_shows_itself(shakespeare: Model) -> None:
    metric = research.logit_difference(shakespeare, ",", "!")
    found = research.patch(shakespeare, "To be, or", "To go, or", "h.0.resid_pre", metric)
    assert "".join(found.clean_tokens) == "To be, or"
    assert repr(found).startswith("<Patching of 1 activations by 4 positions: ")
    assert found.recovered.shape == (1, 4)
    assert "at h.0.resid_pre, position 1>" in repr(found)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clean": [1, 2]}, PromptError, "the clean text has 2 tokens, the corrupted one 4"),
        ({"metric": 3}, ParameterError, "metric is 3, expected a function of logits"),
        ({"by": "layer"}, ParameterError, "by is 'layer', expected 'position' or 'head'"),
        ({"by": "head"}, ParameterError, "ln_f has no heads"),
        ({"names": "nothing"}, ParameterError, "the model computes nothing of the name 'nothing'"),
    ],
)
def test_invalid_input_is_refused(options: Any, error: Any, message: str) -> None:
    model = make_model(TINY, get_backend("numpy"))
    call = {"clean": IDS, "corrupted": IDS, "names": "ln_f", "metric": last_logit} | options
    with pytest.raises(error) as e:
        research.patch(model, **call)
    assert message in str(e.value)
