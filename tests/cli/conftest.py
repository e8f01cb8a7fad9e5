"""Fixtures of the command line's tests."""

from __future__ import annotations

import pytest

import gptx
from gptx.generation.text_model import Model


@pytest.fixture(scope="session")
def shakespeare() -> Model:
    """The embedded model, not compiled: the commands do not compile for so few tokens either."""
    return gptx.load("shakespeare", compile=False)
