"""Models that many tests of the conversions read, written once a session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.conversions import source_of, to_format

Written = Callable[..., Path]


@pytest.fixture(scope="session")
def source_model(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Return a function of a model's name: a folder with it in float32, to be read only."""

    @functools.cache
    def write(model: str) -> Path:
        return source_of(model, tmp_path_factory.mktemp(f"source-{model}"))

    return write


@pytest.fixture(scope="session")
def converted_model(source_model: Written, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Return a function of a format and a model's name: the output, to be read only."""

    @functools.cache
    def write(format: str, model: str) -> Path:
        return to_format(format, source_model(model), tmp_path_factory.mktemp(format))

    return write
