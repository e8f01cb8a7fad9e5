"""The files of the folder `shared` beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


def shared(path: str) -> Path:
    """A file of the shared folder; in CI it has to be there, elsewhere its absence is a skip."""
    found = SHARED / path
    if not found.exists() and not os.environ.get("CI"):
        pytest.skip(f"{found.name} is not there (it is not part of the repository)")
    assert found.exists(), f"CI has no {found}"
    return found
