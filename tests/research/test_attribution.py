"""Direct logit attribution: the parts are linear, and sum to the logit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptx import research
from gptx.errors import ParameterError
from gptx.generation.text_model import Model
from gptx.quantization import Quantization
from tests.support.backends import make_backend
from tests.support.models import EXACT, make_model
from tests.support.random_models import CASES, random_ids

TEXT = "To be, or not to be"
RUNS = [(case, "numpy") for case in CASES]
RUNS += [(case, "mlx") for case in ("1558M", "gelu-erf", "tiny")]
RUNS += [(case, "strict") for case in ("untied", "layer-scaled", "n-inner")]
RUNS += [("tiny", "cupy-cpu")]


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_the_parts_sum_to_the_logit(case: str, name: str) -> None:
    model = make_model(CASES[case], make_backend(name))
    ids = random_ids(model.config, 1, 6)[0].tolist()
    logits = model.logits(ids)
    for token, versus, position in ((5, None, -1), (7, 3, 2), (None, 4, 0)):
        found = research.attribute(model, ids, token, versus, position=position)
        row = logits[position]
        expected = row[found.token] - (0 if versus is None else row[versus])
        assert found.logit == pytest.approx(expected, abs=1e-5)
        assert found.values.sum() == pytest.approx(found.logit, abs=1e-4)
        assert found.token == (row.argmax() if token is None else token)
        assert found.position == position % 6
    L, H = model.config.n_layer, model.config.n_head
    assert len(found.names) == len(found.values) == 3 + L * (H + 2)
    assert found.heads.shape == (L, H)
    assert found.mlps.shape == (L,)
    assert found.heads[0, H - 1] == found.values[found.names.index(f"h.0.attn.head.{H - 1}")]


def test_the_part_of_a_head_is_its_effect_with_a_frozen_norm() -> None:
    """In float64: the head ablated, in the last block, whose result only the last norm reads."""
    config = CASES["untied"]
    model = make_model(config, EXACT)
    ids = random_ids(config, 1, 6)[0].tolist()
    found = research.attribute(model, ids, 9, 4)
    weights = model.gpt2.weights
    direction = weights.ln_f.weight * (weights.lm_head.weight[9] - weights.lm_head.weight[4])
    names = ["h.2.resid_post", "h.1.attn.z", "h.1.mlp.c_proj"]
    at = {k: x[-1] for k, x in research.activations(model, ids, names).items()}
    scale = np.sqrt(at["h.2.resid_post"].var() + config.layer_norm_epsilon)

    def part(x: Any) -> float:
        return float((x - x.mean()) @ direction / scale)

    rows = slice(2 * config.head_dim, 3 * config.head_dim)
    written = at["h.1.attn.z"][rows] @ weights.h[1].attn.c_proj.weight[rows]
    assert found.heads[1, 2] == pytest.approx(part(written), rel=1e-10)
    assert found.mlps[1] == pytest.approx(part(at["h.1.mlp.c_proj"]), rel=1e-10)
    bias = found.values[found.names.index("h.1.attn.c_proj.bias")]
    assert bias == pytest.approx(part(weights.h[1].attn.c_proj.bias), rel=1e-10)


@pytest.mark.parametrize("name", ["numpy", "mlx", "cupy-cpu", "strict"])
def test_a_quantized_model(name: str) -> None:
    model = make_model(CASES["124M"], make_backend(name), quantization=Quantization(32, 8))
    ids = random_ids(model.config, 1, 4)[0].tolist()
    found = research.attribute(model, ids, 5)
    assert found.values.sum() == pytest.approx(found.logit, abs=1e-4)


def test_tokens_are_texts_or_ids(shakespeare: Model) -> None:
    (comma,) = shakespeare.encode(",")
    found = research.attribute(shakespeare, TEXT, ",", "!")
    assert found.token == comma
    assert found.versus == shakespeare.encode("!")[0]
    assert repr(found).startswith("<Attribution of a logit of ")
    np.testing.assert_array_equal(
        research.attribute(shakespeare, shakespeare.encode(TEXT), comma).values,
        research.attribute(shakespeare, TEXT, ",").values,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "two words"}, "token is 'two words', which is 5 tokens, expected one"),
        ({"token": 1024}, "token is 1024, expected the text of one token, or an id from 0 to 1023"),
        ({"token": ",", "versus": -1}, "versus is -1, expected"),
        ({"position": 7}, "position is 7, expected a number from -7 to 6: the text has 7 tokens"),
        ({"position": 0.5}, "position is 0.5, expected"),
        ({"token": ""}, "which is 0 tokens"),
    ],
)
def test_invalid_input_is_refused(options: Any, message: str, shakespeare: Model) -> None:
    with pytest.raises(ParameterError) as e:
        research.attribute(shakespeare, TEXT, **options)
    assert message in str(e.value)
