"""`gptx backends`: the table, the JSON, and the commands that install what is missing."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import numpy as np
import pytest

from gptx.backends import TABLE
from tests.support.cli import run


def test_a_line_for_each_backend() -> None:
    done = run("backends")
    assert done.code == 0
    rows = [line.split(maxsplit=2) for line in done.out.splitlines()]
    assert [row[0] for row in rows] == list(TABLE)
    assert {row[1] for row in rows} <= {"yes", "no"}
    assert rows[0][1] == "yes"


def test_json() -> None:
    rows = json.loads(run("backends", "--json").out)
    assert [row["name"] for row in rows] == list(TABLE)
    assert rows[0]["available"] is True
    assert rows[0]["detail"].startswith("numpy ")


def test_a_missing_backend_has_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gptx.backends.mlx_backend", None)
    mlx = json.loads(run("backends", "--json").out)[2]
    assert (mlx["name"], mlx["available"]) == ("mlx", False)
    assert "pip install 'mlx" in mlx["detail"]


def test_version_of_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: "0.99")
    line = run("backends").out.splitlines()[0]
    assert line.endswith(f"numpy {np.__version__}, compiled with Numba 0.99")


def test_missing_numba_has_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "numba":
            raise metadata.PackageNotFoundError(package)
        return real(package)

    real = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    line = run("backends").out.splitlines()[0]
    assert line.endswith(
        f"numpy {np.__version__}; `pip install '.[fast]'` in a checkout of gptx compiles the "
        "forward pass, "
        "and keeps quantized weights small"
    )
