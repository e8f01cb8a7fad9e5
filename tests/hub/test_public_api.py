"""gptx.hub uses only documented names of huggingface_hub."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gptx.hub
from gptx.conversions.formats import openai_download

# Names in huggingface_hub's reference: downloads, cache, HfApi, utilities, environment variables.
DOCUMENTED = {
    "huggingface_hub": {
        "CommitOperationAdd",
        "HfApi",
        "constants",
        "errors",
        "get_hf_file_metadata",
        "get_session",
        "get_token",
        "hf_hub_url",
        "try_to_load_from_cache",
    },
    "huggingface_hub.utils": {
        "are_progress_bars_disabled",
        "disable_progress_bars",
        "enable_progress_bars",
        "hf_raise_for_status",
        "tqdm",
        "validate_repo_id",
    },
}
# Environment variables, and the address that HF_ENDPOINT sets.
CONSTANTS = {
    "ENDPOINT",
    "HF_ASSETS_CACHE",
    "HF_HUB_CACHE",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "HF_HUB_DOWNLOAD_TIMEOUT",
    "HF_HUB_ETAG_TIMEOUT",
    "HF_HUB_OFFLINE",
}
SOURCES = [*Path(gptx.hub.__path__[0]).glob("*.py"), Path(openai_download.__file__)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_documented_names(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("huggingface_hub") for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("huggingface"):
            assert {name.name for name in node.names} <= DOCUMENTED[node.module or ""]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "constants" or node.attr in CONSTANTS, node.attr
