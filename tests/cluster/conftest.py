"""Fixtures of the tests of batches."""

from __future__ import annotations

import pytest

import gptx
from gptx.generation.text_model import Model


@pytest.fixture(scope="session")
def shakespeare() -> Model:
    """The embedded model, not compiled: few tokens."""
    return gptx.load("shakespeare", compile=False)
