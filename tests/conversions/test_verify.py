"""gptx.conversions.verify: checks of one model, comparisons of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Checkpoint, StoredTensor
from gptx.conversions.verify import check, compare
from gptx.embedded import EMBEDDED
from gptx.errors import WeightsError
from gptx.random_weights import random_weights
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.random_models import CASES

CONFIG = CASES["355M"]
WEIGHTS = random_weights(CONFIG)
NAME = "h.2.mlp.c_fc.weight"


def checkpoint(
    change: Callable[[dict[str, np.ndarray]], object] = lambda weights: None,
    config: GPT2Config = CONFIG,
) -> Checkpoint:
    """Make a random model with changed weights."""
    weights = {name: tensor.copy() for name, tensor in random_weights(config).items()}
    change(weights)
    stored = {n: StoredTensor(x.shape, x.dtype, lambda x=x: x) for n, x in weights.items()}  # type: ignore[misc]
    return Checkpoint(config, stored)


def rounded(weights: dict[str, np.ndarray]) -> None:
    for name, tensor in weights.items():
        weights[name] = tensor.astype(np.float16)


def test_a_model_is_identical_to_itself() -> None:
    result = compare(checkpoint(), checkpoint())
    assert result.identical
    assert result.same
    assert (result.logits, result.agreement) == (0, 1)
    assert set(result.tensors) == set(CONFIG.tensor_shapes())


def test_a_rounded_model_is_the_same() -> None:
    result = compare(checkpoint(), checkpoint(rounded))
    assert result.same
    assert not result.identical
    assert 0 < result.tensors[NAME].relative < 2**-10
    assert result.logits is not None
    assert 0 < result.logits < 0.1


def test_one_changed_number_is_found() -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[NAME][5, 7] += 0.25

    result = compare(checkpoint(), checkpoint(change))
    assert not result.same
    differing = {name: d for name, d in result.tensors.items() if d.largest}
    assert list(differing) == [NAME]
    assert differing[NAME].largest == pytest.approx(0.25, abs=1e-6)
    assert differing[NAME].relative == pytest.approx(0.25 / np.abs(WEIGHTS[NAME]).max(), rel=1e-5)
    assert result.logits is not None
    assert result.logits > 0


def test_more_than_rounding_is_another_model() -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        rounded(weights)
        weights[NAME][0, 0] += np.float16(0.01)

    result = compare(checkpoint(), checkpoint(change))
    assert [name for name, d in result.tensors.items() if not d.rounded] == [NAME]
    assert not result.same


def test_a_number_beyond_the_other_type_is_a_difference() -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[NAME][0, 0] = 70000

    result = compare(checkpoint(change), checkpoint(rounded))
    assert not result.tensors[NAME].rounded
    assert not result.same


def test_two_nans_are_equal_and_one_is_a_difference() -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[NAME][0, 0] = np.nan

    assert compare(checkpoint(change), checkpoint(change)).tensors[NAME].largest == 0
    one = compare(checkpoint(), checkpoint(change))
    assert np.isnan(one.tensors[NAME].largest)
    assert not one.same


@pytest.mark.parametrize(
    ("name", "value"),
    [("layer_norm_epsilon", 1e-3), ("activation_function", "relu"), ("n_head", 8)],
)
def test_settings_that_change_the_logits_are_compared(name: str, value: object) -> None:
    other = replace(CONFIG, **{name: value})
    result = compare(checkpoint(), checkpoint(config=other))
    assert result.config == {name: (getattr(CONFIG, name), value)}
    assert not result.same
    assert result.logits is not None
    assert result.logits > 1e-3


def test_other_settings_are_ignored() -> None:
    other = replace(CONFIG, n_inner=4 * CONFIG.n_embd, eos_token_id=None, bos_token_id=3)
    assert compare(checkpoint(), checkpoint(config=other)).identical


def test_other_shapes_are_reported_without_logits() -> None:
    result = compare(checkpoint(), checkpoint(config=replace(CONFIG, vocab_size=256)))
    assert result.config == {"vocab_size": (128, 256)}
    assert result.logits is None
    assert not result.same
    assert not result.identical


def test_another_tokenizer_is_another_model() -> None:
    folder = EMBEDDED["shakespeare"]
    tokenizer = PipelineTokenizer({"tokenizer.json": folder / "tokenizer.json"})
    model = tokenizer.definition()["model"]
    fewer = PipelineTokenizer.of_vocabulary(model["vocab"], model["merges"][:-1])
    with_it = [replace(checkpoint(), tokenizer=t) for t in (tokenizer, fewer)]
    assert compare(with_it[0], with_it[0]).tokenizer is True
    assert compare(with_it[0], with_it[1]).tokenizer is False
    assert list(compare(with_it[0], with_it[1]).tokenizer_differences) == ["merges 766"]
    assert not compare(with_it[0], with_it[1]).same
    assert compare(with_it[0], checkpoint()).same


def test_a_valid_model_passes() -> None:
    check(checkpoint())


def test_numbers_that_are_not_finite_are_counted() -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[NAME][3, 3:5] = np.inf
        weights["ln_f.bias"][0] = np.nan

    expected = f"tensor {NAME} has 2 numbers that are not finite .other tensors too: 1"
    with pytest.raises(WeightsError, match=expected):
        check(checkpoint(change))


def test_a_prompt_longer_than_the_context_is_truncated() -> None:
    config = replace(CONFIG, n_positions=8)
    assert compare(checkpoint(config=config), checkpoint(config=config)).identical
