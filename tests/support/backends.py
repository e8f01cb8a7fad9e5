"""Every way to run the model, by name; an absent backend is a visible skip."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from gptx.backends import Backend, get_backend
from gptx.errors import BackendError
from tests.emulator import cupy_stand_in

# Each way to run the model: name -> arguments of get_backend.
BACKENDS: dict[str, dict[str, Any]] = {
    "numpy": {"backend": "numpy"},
    "numpy-ops": {"backend": "numpy", "compile": False},
    "numpy-generic": {"backend": "numpy", "generic": True},
    "mlx": {"backend": "mlx"},
    "mlx-generic": {"backend": "mlx", "generic": True},
    "cupy": {"backend": "cupy"},
    "cupy-cpu": {"backend": "cupy"},  # on the stand-in for CuPy, which needs no GPU
    "strict": {"backend": "array_api_strict"},
}

STAND_IN = ExitStack()  # uninstalls the stand-in for CuPy at the end of a test


def make_backend(name: str, **options: Any) -> Backend:
    """Return a backend by its name in `BACKENDS`; skip the test if it is not available."""
    arguments = BACKENDS[name] | options
    if name == "cupy-cpu":
        STAND_IN.enter_context(cupy_stand_in.installed())
    if arguments["backend"] == "array_api_strict":
        arguments["backend"] = pytest.importorskip("array_api_strict")
    try:
        return get_backend(**arguments)
    except BackendError as error:
        if name == "cupy-cpu":  # the stand-in is always available
            raise
        pytest.skip(str(error))
