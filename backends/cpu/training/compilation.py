"""Numba's compiler for the row functions: lazily, once, with the machine code on disk."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

from numba import njit

from gptx.backends.cpu import interface, kernels
from gptx.backends.cpu.kernels.compilation import FAST_MATH

_FOLDERS = Path(__file__).parent, Path(kernels.__file__).parent
_SHARED = "compilation.py", "simd.py", "elementwise.py"  # of the kernels that generate texts
_FILES = [*sorted(_FOLDERS[0].glob("*.py")), *(_FOLDERS[1] / name for name in _SHARED)]
_FILES += sorted(Path(interface.__file__).parent.glob("*.py"))
_CHECKSUM = zlib.crc32(b"".join(path.read_bytes() for path in _FILES))


def cached(function: Callable[..., None]) -> Any:
    """Compile a function at its first call, and keep the machine code on disk.

    The compiled function does not hold the global interpreter lock.
    """
    # To detect stale code, Numba compares the file of the function and the values it closes over:
    # with the checksum among these, it compares all files that the function calls.
    code = function.__code__.replace(co_freevars=("sources_checksum",))
    closed = FunctionType(
        code, function.__globals__, function.__name__, None, (CellType(_CHECKSUM),)
    )
    closed.__module__, closed.__qualname__ = function.__module__, function.__qualname__
    options = {"fastmath": FAST_MATH, "error_model": "numpy", "nogil": True}
    try:
        return njit(cache=True, **options)(closed)
    except RuntimeError:  # no cache folder is writable
        return njit(**options)(closed)
