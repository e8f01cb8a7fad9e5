"""Activations, attention maps, hidden states and embeddings, against other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx import research
from gptx.backends import Backend
from gptx.errors import ParameterError, PromptError
from gptx.generation.text_model import Model
from tests.support.backends import make_backend
from tests.support.lens_cases import CASES as LENS_CASES
from tests.support.models import make_model

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = LENS_CASES["gelu_new"]
TEXT = "To be, or not to be"


@pytest.fixture(scope="module")
def golden() -> Any:
    with np.load(GOLDEN / "lens.npz") as data:
        return {name: data[name] for name in data.files}


RUNS = [(case, name) for case in LENS_CASES for name in ("numpy", "mlx")]
RUNS += [(case, "strict") for case in ("untied", "unscaled", "layer-scaled", "124M")]
RUNS += [("gelu_new", "cupy-cpu"), ("124M", "cupy-cpu")]


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_attentions_and_hidden_states_are_those_of_transformers(
    case: str, name: str, golden: Any
) -> None:
    model = make_model(LENS_CASES[case], make_backend(name))
    ids = golden[f"{case}.ids"][0].tolist()
    maps = research.attention_maps(model, ids)
    assert maps.layers == tuple(range(model.config.n_layer))
    np.testing.assert_allclose(maps.patterns, golden[f"{case}.attentions"], rtol=0, atol=1e-4)
    states = research.hidden_states(model, ids)
    np.testing.assert_allclose(states, golden[f"{case}.hidden_states"], rtol=0, atol=1e-4)


def test_activations_of_names_here_and_of_transformer_lens(backend: Backend, golden: Any) -> None:
    model = make_model(TINY, backend)
    ids = golden["gelu_new.ids"][0].tolist()
    names = ["blocks.*.attn.hook_z", "h.1.attn.z", "ln_f"]
    found = research.activations(model, ids, names)
    assert list(found) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "h.1.attn.z", "ln_f"]
    assert found.ids == ids
    assert found.tokens == tuple(map(str, ids))  # a model without a tokenizer
    expected = golden["gelu_new.blocks.1.attn.hook_z"][0]
    np.testing.assert_allclose(found["blocks.1.attn.hook_z"], expected, rtol=0, atol=1e-4)
    rows = found["h.1.attn.z"]
    np.testing.assert_array_equal(rows.reshape(expected.shape), found["blocks.1.attn.hook_z"])
    assert repr(found) == "<Activations of 5 tokens: 4 arrays, 0.00 MB>"


def test_tokens_are_texts(shakespeare: Model) -> None:
    found = research.activations(shakespeare, TEXT, "wte")
    assert "".join(found.tokens) == TEXT
    assert found.ids == shakespeare.encode(TEXT)
    maps = research.attention_maps(shakespeare, TEXT, layers=[4, 1])
    assert maps.layers == (4, 1)
    assert maps.patterns.shape == (2, 6, 7, 7)
    assert repr(maps) == "<AttentionMaps of 7 tokens: 2 layers of 6 heads>"


def test_activations_within_hooks_are_those_of_the_hooked_model(shakespeare: Model) -> None:
    with shakespeare.hooks({"h.2.resid_post": lambda x: 0 * x}):
        found = research.activations(shakespeare, TEXT, ["h.2.resid_post", "h.3.resid_pre"])
    assert not any(x.any() for x in found.values())


def test_embeddings(shakespeare: Model) -> None:
    texts = [TEXT, "ROMEO:"]
    rows = [research.activations(shakespeare, text, "ln_f")["ln_f"] for text in texts]
    mean = research.embeddings(shakespeare, texts)
    np.testing.assert_allclose(mean, [x.mean(axis=0) for x in rows], rtol=0, atol=1e-6)
    assert mean.dtype == np.float32
    last = research.embeddings(shakespeare, texts, pooling="last", name="h.2.resid_post")
    expected = research.hidden_states(shakespeare, "ROMEO:")[3, -1]
    np.testing.assert_array_equal(last[1], expected)
    assert research.embeddings(shakespeare, TEXT).shape == (1, 192)
    assert research.embeddings(shakespeare, [1, 2, 3]).shape == (1, 192)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: research.activations(m, TEXT, []), ParameterError, "no names were given"),
        (lambda m: research.activations(m, TEXT, "h.9.ln_1"), ParameterError, "layers are 0 to 5"),
        (lambda m: research.activations(m, "", "wte"), PromptError, "the prompt is empty"),
        (lambda m: research.activations(m, [1] * 300, "wte"), PromptError, "holds 256"),
        (lambda m: research.activations(m, [5000], "wte"), PromptError, "expected 0 to 1023"),
        (lambda m: research.activations(m, ["a", "b"], "wte"), PromptError, "list of prompts"),
        (lambda m: research.activations(m, 3, "wte"), PromptError, "the prompt is 3"),
        (lambda m: research.attention_maps(m, TEXT, [6]), ParameterError, "numbers from 0 to 5"),
        (lambda m: research.attention_maps(m, TEXT, 3), ParameterError, "numbers from 0 to 5"),
        (lambda m: research.attention_maps(m, TEXT, []), ParameterError, "no names were given"),
        (lambda m: research.embeddings(m, TEXT, pooling="max"), ParameterError, "'mean' or 'last'"),
        (lambda m: research.embeddings(m, TEXT, name="h.0.attn.q"), ParameterError, "a row for"),
        (lambda m: research.embeddings(m, TEXT, name="h.*.ln_1"), ParameterError, "6 activations"),
        (lambda m: research.embeddings(m, []), PromptError, ""),
    ],
)
def test_invalid_input_is_refused(call: Any, error: Any, message: str, shakespeare: Model) -> None:
    with pytest.raises(error) as e:
        call(shakespeare)
    assert message in str(e.value)
    assert "\n" not in str(e.value)
