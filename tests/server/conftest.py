"""A server on loopback for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gptx.generation.text_model import Model
from tests.support.serving import Served, serving


@pytest.fixture(scope="session")
def served(shakespeare: Model) -> Iterator[Served]:
    """The embedded model behind a server with the default settings, shared by all tests."""
    with serving(shakespeare) as server:
        yield server
