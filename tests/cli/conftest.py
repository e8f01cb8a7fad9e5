"""Fixtures of the command line's tests."""

from __future__ import annotations

import pytest

import gptx
from gptx.backends.cpu.backend import NumpyBackend
from gptx.generation.text_model import Model


@pytest.fixture(autouse=True)
def _no_kernels_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands run op by op: compiled kernels, which other tests make, round differently."""
    monkeypatch.setattr(NumpyBackend, "is_compiled", lambda self: False)


@pytest.fixture(scope="session")
def shakespeare() -> Model:
    """The embedded model, not compiled: the commands do not compile for so few tokens either."""
    return gptx.load("shakespeare", compile=False)
