"""Both vocabularies, each from both forms of its files."""

from __future__ import annotations

import pytest

from gptx.tokenization.pipeline import PipelineTokenizer
from tests.tokenization.vocabularies import KINDS, load


@pytest.fixture(scope="session", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tokenizer(kind: str) -> PipelineTokenizer:
    return load(kind)
