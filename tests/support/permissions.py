"""Tests of files without permissions, which root could read anyway."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    """Give up root's rights over files until the context ends."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this system has no permissions of POSIX")
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def folder_of_another_user() -> Iterator[Path]:
    """Make a folder that `unprivileged` code may use; `tmp_path` belongs to root only."""
    with tempfile.TemporaryDirectory() as name:
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            os.chown(name, NOBODY, NOBODY)
        yield Path(name)
