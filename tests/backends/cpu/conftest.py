"""Fixtures for the NumPy backend's kernels."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["vectors", "AMX"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on vectors, and on AMX if the process may use it."""
    pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")
    from gptx.backends.cpu import program

    if request.param == "AMX" and not program.amx_is_allowed():
        pytest.skip("this processor has no AMX, or the system does not permit it")
    monkeypatch.setattr(program, "amx_is_allowed", lambda: request.param == "AMX")
    return request.param
