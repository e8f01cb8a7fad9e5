"""gptx.generation.model_info: the tokenizer of a model, and errors about a missing one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptx.config import GPT2Config
from gptx.errors import TokenizerError
from gptx.generation.model_info import ModelInfo
from gptx.model_files import ModelFiles


@pytest.mark.parametrize("revision", [None, "c" * 40])
def test_a_missing_tokenizer(tmp_path: Path, revision: str | None) -> None:
    """The cache of the Hub is not a place for files of the user."""
    files = ModelFiles("org/model", tmp_path, tmp_path / "config.json", (), {}, revision)
    info = ModelInfo(files, GPT2Config())
    assert not info.has_tokenizer
    with pytest.raises(TokenizerError, match="org/model has no tokenizer: give tokenizer") as error:
        _ = info.tokenizer
    assert (str(tmp_path) in str(error.value)) == (revision is None)
    assert ("`gptx download org/model`" in str(error.value)) == (revision is not None)
    assert str(error.value).endswith("Python also takes token ids in place of text")
