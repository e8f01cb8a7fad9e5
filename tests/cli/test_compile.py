"""`gptx compile`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.cli import run


def test_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")
    from gptx.backends.cpu import machine_code

    compiled: list[str] = []

    def load(name: str) -> None:
        compiled.append(name)
        (tmp_path / name).touch()

    monkeypatch.setattr(machine_code, "load", load)
    monkeypatch.setattr(machine_code, "is_compiled", lambda name: (tmp_path / name).exists())
    assert run("compile", "int8").out == "int8: compiled in 0 s\n"
    assert run("compile").out == (
        "float32: compiled in 0 s\nint8: is there\nint4: compiled in 0 s\n"
    )
    assert run("compile", "int4", "--cache-dtype", "float16").out == (
        "int4, float16-cache: compiled in 0 s\n"
    )
    assert compiled == ["int8", "float32", "int8", "int4", "int4,float16-cache"]


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    done = run("compile")
    assert done.code == 2
    assert done.err == (
        "Error: the kernels need Numba, run pip install '.[fast]' in a checkout of gptx\n"
    )
