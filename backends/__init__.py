"""Backends: the array libraries that gptx runs on, and their registry `TABLE`.

A backend is an object that is passed along. `get_backend` imports its module and its library.
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
from gptx.errors import BackendError, ParameterError, argument

__all__ = ["TABLE", "Backend", "BackendStatus", "Positions", "available", "get_backend"]


@dataclass(frozen=True)
class Row:
    """A backend in the registry: its module and class, and the package that it needs."""

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
    """The state of a backend on this machine.

    Attributes
    ----------
    name, runs_on
        Name and hardware of the backend.
    available
        True if it can be used.
    detail
        Version of its library, or the reason why it is not available.
    """

    name: str
    available: bool
    runs_on: str
    detail: str


def get_backend(
    backend: str | Any = "numpy",
    *,
    dtype: str | Any = None,
    device: Any = None,
    threads: int | None = None,
    generic: bool = False,
    compile: bool = True,
    cache_dtype: str | Any = None,
) -> Backend:
    """Return a new backend.

    Parameters
    ----------
    backend
        "numpy", "cupy" or "mlx"; an array-API namespace such as `array_api_strict`,
        `array_api_compat.torch` or `jax.numpy`, which runs the generic ops; or a `Backend`, which
        is returned unchanged.
    dtype
        "float32" (default), "float64", "float16" or "bfloat16", if the backend supports it; or a
        type of an array library, such as `numpy.float32`.
    device
        Device of the library; None is its default.
    threads
        CPU threads of the NumPy backend, for BLAS and the kernels, at least 1. None keeps the
        setting of BLAS, and gives the kernels every core.
    generic
        Turn off all overrides, to compare them with the generic ops.
    compile
        Compile the forward pass into one call if the backend can. For NumPy, Numba does that; its
        import takes half a second. Without, float weights run op by op.
    cache_dtype
        Type of keys and values in the cache: "float16", or None for `dtype`. float16 halves the
        memory. NumPy's compiled pass also reads it faster; other passes convert it at each step.

    Raises
    ------
    BackendError
        The backend is unknown, is not installed, or does not support an option.
    ParameterError
        `threads` is not a positive whole number, or an option is set with an existing `Backend`.
    """
    if isinstance(backend, Backend):
        is_given = {
            "dtype": dtype is not None,
            "device": device is not None,
            "threads": threads is not None,
            "generic": generic,
            "compile": not compile,
            "cache_dtype": cache_dtype is not None,
        }
        if names := ", ".join(argument(name) for name in is_given if is_given[name]):
            raise ParameterError(
                f"{names} cannot be set on an existing Backend: pass them to get_backend()"
            )
        return backend
    if threads is not None and not _is_count(threads):
        raise ParameterError(
            f"{argument('threads')} is {threads!r}, expected a whole number of at least 1"
        )
    options: dict[str, Any] = {
        "device": device,
        "threads": threads,
        "generic": generic,
        "compile": compile,
        "cache_dtype": _type_name(cache_dtype),
    }
    if dtype is not None:
        options["dtype"] = _type_name(dtype)
    if not isinstance(backend, str):
        return Backend(_conforming(backend), **options)
    if backend not in TABLE:
        raise BackendError(
            f"{argument('backend')} is {backend!r}, expected {', '.join(map(repr, TABLE))} "
            "or an array-API namespace"
        )
    cls: type[Backend] = getattr(_import(backend), TABLE[backend].cls)
    cls.check_process()
    return cls(**options)


def available() -> list[BackendStatus]:
    """Try to make each backend of the registry; return their states."""
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
    """Return the part of `detail` about Numba, without its import, which takes half a second."""
    from importlib import metadata  # not needed, and slow to import, for `import gptx`

    try:
        return f", compiled with Numba {metadata.version('numba')}"
    except metadata.PackageNotFoundError:
        return (
            "; `pip install '.[fast]'` in a checkout of gptx compiles the forward pass, "
            "and keeps quantized weights small"
        )


def _type_name(dtype: Any) -> str | None:
    """Return the name of a type: of a string, or of a type of NumPy, PyTorch, MLX or JAX."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    name = getattr(dtype, "__name__", None) or getattr(dtype, "name", None) or str(dtype)
    return str(name).rpartition(".")[2]  # "torch.float32"


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
            f"{argument('backend')} is {namespace!r}, expected {', '.join(map(repr, TABLE))} "
            "or an array-API namespace (one with matmul, take, permute_dims, astype, ...)"
        )
    return namespace
