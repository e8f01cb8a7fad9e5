"""Backends: the array libraries that gptx runs on. To add one: a file here, and a row in `TABLE`.

A backend is an object that is passed along. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from numbers import Integral
from types import ModuleType
from typing import Any

from gptx.backends.base import Backend
from gptx.backends.positions import Positions
from gptx.errors import BackendError, ParameterError

__all__ = ["TABLE", "Backend", "BackendStatus", "Positions", "available", "get_backend"]


@dataclass(frozen=True)
class Row:
    """One backend: where its class is, the package it needs, and how to install that."""

    module: str
    cls: str
    package: str
    runs_on: str
    install: str


TABLE = {
    "numpy": Row("gptx.backends.cpu.backend", "NumpyBackend", "numpy", "CPU", "pip install numpy"),
    "cupy": Row(
        "gptx.backends.cuda.backend",
        "CupyBackend",
        "cupy",
        "NVIDIA GPU",
        "pip install 'cupy-cuda13x>=14' ml_dtypes (for CUDA 13; cupy-cuda12x for CUDA 12)",
    ),
    "mlx": Row(
        "gptx.backends.mlx_backend",
        "MlxBackend",
        "mlx.core",
        "Apple GPU, CPU on Linux",
        "pip install 'mlx>=0.32.3'"
        if sys.platform == "darwin"
        else "pip install 'mlx[cpu]>=0.32.3'",
    ),
}

# Namespaces that need array_api_compat's wrapper to conform to the standard.
WRAPPED = ("cupy", "dask.array", "torch")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here; `detail` is its version and what would make it faster, or
    how to get it."""

    name: str
    available: bool
    runs_on: str
    detail: str


def get_backend(
    backend: str | Any = "numpy",
    *,
    dtype: str | None = None,
    device: Any = None,
    threads: int | None = None,
    generic: bool = False,
    compile: bool = True,
    cache_dtype: str | None = None,
) -> Backend:
    """Make a backend.

    Parameters
    ----------
    backend
        "numpy", "cupy" or "mlx"; an array-API namespace such as `array_api_strict`,
        `array_api_compat.torch` or `jax.numpy`, which the generic ops run; or a `Backend`, which is
        returned as it is.
    dtype
        "float32" (default), and "float64", "float16" or "bfloat16" where the backend computes in
        them.
    device
        A device of that library; None is its default.
    threads
        Threads of the NumPy backend, BLAS's and the kernels', at least 1; None leaves BLAS alone,
        and gives the kernels every core.
    generic
        Turn all overrides off, to compare them with the generic ops.
    compile
        Make one compiled call of the forward pass where the backend can: NumPy's does with Numba,
        which takes half a second to begin. Without, float weights run op by op.
    cache_dtype
        What keys and values are kept in: "float16", or as `dtype` (None). It is half of the memory;
        NumPy's compiled pass reads them faster, too, elsewhere each step has to convert them.

    Raises
    ------
    BackendError
        The backend is unknown, not installed, or cannot do what is asked.
    ParameterError
        `threads` is not a positive whole number.
    """
    if isinstance(backend, Backend):
        given = (dtype, device, threads, cache_dtype)
        if any(x is not None for x in given) or generic or not compile:
            raise ParameterError(
                "dtype, device, threads, generic, compile and cache_dtype belong to "
                "get_backend(): the backend that was given is made already"
            )
        return backend
    if threads is not None and not _is_count(threads):
        raise ParameterError(f"threads is {threads!r}, expected a whole number of at least 1")
    options: dict[str, Any] = {
        "device": device,
        "threads": threads,
        "generic": generic,
        "compile": compile,
        "cache_dtype": cache_dtype,
    }
    if dtype is not None:
        options["dtype"] = str(dtype)
    if not isinstance(backend, str):
        return Backend(_conforming(backend), **options)
    if backend not in TABLE:
        raise BackendError(
            f"backend is {backend!r}, expected {', '.join(map(repr, TABLE))} "
            "or an array-API namespace"
        )
    made: Backend = getattr(_import(backend), TABLE[backend].cls)(**options)
    return made


def available() -> list[BackendStatus]:
    """Try each backend of the table and say whether it can be used here, or why not."""
    statuses = []
    for name, row in TABLE.items():
        try:
            get_backend(name)
            version = getattr(importlib.import_module(row.package), "__version__", "")
            detail = f"{row.package.partition('.')[0]} {version}"
            if name == "numpy":
                detail += _compiler()
            statuses.append(BackendStatus(name, True, row.runs_on, detail))
        except BackendError as error:
            statuses.append(BackendStatus(name, False, row.runs_on, str(error)))
    return statuses


def _compiler() -> str:
    """What Numba makes of the NumPy backend, or would; without its import, which takes long."""
    from importlib import metadata  # so does this one, for a single command

    try:
        return f", compiled with Numba {metadata.version('numba')}"
    except metadata.PackageNotFoundError:
        return (
            "; pip install 'gptx[fast]' compiles the forward pass, "
            "and keeps quantized weights small"
        )


def _is_count(value: object) -> bool:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and 1 <= int(value) < 2**31  # type: ignore[call-overload]


def _import(name: str) -> ModuleType:
    row = TABLE[name]
    try:
        return importlib.import_module(row.module)
    except ImportError as error:
        root = row.package.partition(".")[0]
        why = "is not installed" if error.name == root else f"cannot be imported ({error})"
        raise BackendError(f"backend {name!r} needs {root}, which {why}: {row.install}") from error


def _conforming(namespace: Any) -> Any:
    name = getattr(namespace, "__name__", "")
    if name in WRAPPED:
        return importlib.import_module(f"array_api_compat.{name}")
    if not all(hasattr(namespace, op) for op in ("matmul", "take", "permute_dims", "astype")):
        raise BackendError(
            f"backend is {namespace!r}, expected {', '.join(map(repr, TABLE))} "
            "or an array-API namespace (one with matmul, take, permute_dims, astype, ...)"
        )
    return namespace
