"""Logits without sampling: of all tokens, and of the token after each of several prompts."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest

import gptx.logits
from gptx.backends import get_backend
from gptx.kv_cache import KVCache
from gptx.logits import all_logits, next_token_logits, non_finite_error, pad
from gptx.model import Transformer
from tests.support.models import float32_logits, make_model
from tests.support.random_models import CASES

CONFIG = CASES["tiny"]
PROMPTS = [[3, 1, 4], [1], [5, 9]]


@pytest.fixture
def gpt2() -> Transformer:
    return make_model(CONFIG, get_backend("numpy", compile=False)).gpt2


def test_all_logits_have_a_cache_of_one_sequence(
    gpt2: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mock.Mock(wraps=KVCache)
    monkeypatch.setattr(gptx.logits, "KVCache", made)
    found = all_logits(gpt2, [3, 1, 4])
    made.assert_called_once_with(CONFIG, gpt2.backend, 1, 3)
    np.testing.assert_allclose(found, float32_logits(CONFIG, (3, 1, 4)), rtol=0, atol=1e-5)


def test_next_token_logits_are_those_of_each_prompt(gpt2: Transformer) -> None:
    """The pass computes the logits of the last tokens only."""
    real: Any = gpt2.forward
    forward = vars(gpt2)["forward"] = mock.Mock(wraps=real)
    cache = KVCache(CONFIG, gpt2.backend, 3, 8)
    found = next_token_logits(gpt2, PROMPTS, cache)
    assert forward.call_args.kwargs == {"last_only": True}
    assert cache.lengths.tolist() == [3, 1, 2]
    expected = [float32_logits(CONFIG, tuple(ids))[-1] for ids in PROMPTS]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_prompt_repeats_its_last_token() -> None:
    assert pad(PROMPTS).tolist() == [[3, 1, 4], [1, 1, 1], [5, 9, 9]]
    assert pad([[7]]).tolist() == [[7]]


def test_the_error_of_logits_that_are_not_finite_names_the_type(gpt2: Transformer) -> None:
    assert "too large for float32: " in str(non_finite_error(gpt2))
