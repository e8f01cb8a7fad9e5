"""gptx.random_weights: the same bits in every run, for any size of the chunks."""

from __future__ import annotations

import numpy as np
import pytest

from gptx import random_weights as module
from gptx.random_weights import random_tensors, random_weights
from tests.support.random_models import CASES, checksum


def test_the_bits_are_fixed() -> None:
    assert checksum(random_weights(CASES["tiny"])) == 0x449D7242
    assert checksum(random_weights(CASES["untied"], seed=1)) == 0xBD51D40B


def test_the_size_of_the_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = random_weights(CASES["untied"])
    monkeypatch.setattr(module, "CHUNK_DRAWS", 33)
    for (name, tensor), (same, array) in zip(
        random_tensors(CASES["untied"]), expected.items(), strict=True
    ):
        assert name == same
        np.testing.assert_array_equal(tensor, array)
