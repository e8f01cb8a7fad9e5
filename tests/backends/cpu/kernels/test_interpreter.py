"""The notice that the kernels are being compiled."""

from __future__ import annotations

import pytest

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

import numba

from gptx.backends.cpu.kernels import interpreter


def test_compilation_prints_a_notice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def add_one(x: int) -> int:
        return x + 1

    other, ours = numba.njit(add_one), numba.njit(add_one)
    monkeypatch.setattr(interpreter, "run_program", ours)
    assert other(1) == 2
    assert capsys.readouterr().err == ""
    assert ours(1) == 2
    assert capsys.readouterr().err.startswith("gptx: compiling the kernels")
    assert ours(2) == 3
    assert capsys.readouterr().err == ""
