"""Backends that are unknown, not installed or cannot do what is asked are refused by name."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

import gptx
from gptx.backends import TABLE, get_backend
from gptx.errors import BackendError, GptxError, ParameterError
from tests.support.refusals import command, refused, short


@pytest.mark.parametrize(
    ("kind", "options", "says"),
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
    ids=short,
)
def test_what_no_backend_can(kind: type[GptxError], options: Any, says: str) -> None:
    with refused(kind, says):
        gptx.generate("O", model="shakespeare", max_tokens=1, **options)


def test_mlx_has_no_threads() -> None:
    pytest.importorskip("mlx.core")
    with refused(BackendError, "threads is 2, but the mlx backend has no setting for threads"):
        get_backend("mlx", threads=2)
    command("-b", "mlx", "-t", "2", "O", code=2, says="threads is 2")


class Absent:
    """A finder for `sys.meta_path` that knows a package not to be there."""

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
    monkeypatch.setattr(sys, "meta_path", [Absent(backend), *sys.meta_path])
    with refused(BackendError, f"backend '{backend}' needs {backend}", "not installed", install):
        gptx.load("shakespeare", backend=backend)
    command("-b", backend, "O", code=2, says=install)
