"""Errors of invalid options, and of backends that are unknown or not installed."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

import gptx
from gptx.backends import TABLE, available, get_backend
from gptx.errors import BackendError, GptxError, ParameterError
from tests.support.cli import assert_generate_fails, raises_error, short_id


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (BackendError, {"backend": "jax"}, "backend is 'jax', expected 'numpy', 'cupy', 'mlx'"),
        (BackendError, {"backend": 5}, "backend is 5"),
        (BackendError, {"backend": math}, "backend is <module 'math'"),
        (BackendError, {"dtype": "float16"}, "dtype is 'float16', the numpy backend computes in"),
        (BackendError, {"dtype": "int8"}, "dtype is 'int8'"),
        (BackendError, {"device": "gpu"}, "device is 'gpu'"),
        (ParameterError, {"threads": 0}, "threads is 0"),
        (ParameterError, {"threads": -1}, "threads is -1"),
        (ParameterError, {"threads": "two"}, "threads is 'two'"),
        (ParameterError, {"threads": 1.5}, "threads is 1.5"),
        (ParameterError, {"threads": True}, "threads is True"),
        (ParameterError, {"threads": 10**30}, f"threads is {10**30}"),
        (ParameterError, {"revision": "main"}, "revision is 'main'"),
        (ParameterError, {"bakend": "numpy"}, "unknown option bakend"),
    ],
    ids=short_id,
)
def test_invalid_options(kind: type[GptxError], options: Any, message: str) -> None:
    with raises_error(kind, message):
        gptx.generate("O", model="shakespeare", max_tokens=1, **options)


def test_threads_of_mlx() -> None:
    pytest.importorskip("mlx.core")
    with raises_error(BackendError, "threads is 2, but the mlx backend has no setting for threads"):
        get_backend("mlx", threads=2)
    assert_generate_fails("-b", "mlx", "-t", "2", "O", code=2, message="threads is 2")


class Missing:
    """A finder for `sys.meta_path` that reports a package as missing."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("backend", "install"),
    [("mlx", "pip install 'mlx"), ("cupy", "pip install 'cupy-cuda13x")],
)
def test_a_backend_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, backend: str, install: str
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == backend]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, TABLE[backend].module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(backend), *sys.meta_path])
    with raises_error(
        BackendError, f"backend '{backend}' needs {backend}", "not installed", install
    ):
        gptx.load("shakespeare", backend=backend)
    status = {s.name: s for s in available()}[backend]
    assert not status.available
    assert install in status.detail
    assert_generate_fails("-b", backend, "O", code=2, message=install)
