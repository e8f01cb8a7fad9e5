"""The files of the folder `shared` beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


def shared(path: str) -> Path:
    """Return the path of a shared file; skip the test if it is missing, but fail in CI."""
    found = SHARED / path
    if not found.exists() and not os.environ.get("CI"):
        pytest.skip(f"{found.name} is missing (it is not part of the repository)")
    assert found.exists(), f"{found} is missing in CI"
    return found
