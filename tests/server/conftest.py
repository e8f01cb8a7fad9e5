"""A server on loopback and a static site, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gptx.generation.text_model import Model
from gptx.server.sites import writer as site
from tests.support.serving import Served, serving
from tests.support.sites import write_runtime


@pytest.fixture(scope="session")
def served(shakespeare: Model) -> Iterator[Served]:
    """The embedded model behind a server with the default settings, shared by all tests."""
    with serving(shakespeare) as server:
        yield server


@pytest.fixture(scope="session")
def no_runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names of onnxruntime-web's files."""
    return write_runtime(tmp_path_factory.mktemp("ort"))


@pytest.fixture(scope="session")
def files_only(tmp_path_factory: pytest.TempPathFactory, no_runtime: Path) -> Path:
    """A site of the embedded model, without a runtime."""
    folder = tmp_path_factory.mktemp("site") / "site"
    site.make_site("shakespeare", folder, ort=no_runtime)
    return folder
