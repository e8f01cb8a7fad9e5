"""The machine of a measurement: processor, libraries, and the bandwidth of its memory.

Memory bandwidth limits a decode step, which uses each weight once.
"""

from __future__ import annotations

import importlib
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from gptx._version import __version__
from gptx.backends import TABLE, Backend, get_backend
from gptx.bench.worker import Events
from gptx.process import count_cores

MATRIX_WIDTH = 1024
READ_ROUNDS = 7
MIN_READ_BYTES = 256_000_000  # more than the caches of an ordinary processor
MAX_READ_BYTES = 2_000_000_000  # a GPU reads it in half a millisecond


def describe(backend: Backend) -> dict[str, Any]:
    """Return the facts that every record has."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": backend.device_name() or None,
        "cpu": cpu_name(),
        "cores": count_cores(),
        "gptx": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "library": library_version(backend),
        "blas": blas_version(),
    }


def cpu_name() -> str:
    """Return the processor's name, or its architecture where the system has no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def library_version(backend: Backend) -> str:
    """Return the array library and its version, "mlx 0.32.4" for example."""
    package = TABLE[backend.name].package
    version = getattr(importlib.import_module(package), "__version__", "")
    return f"{package.partition('.')[0]} {version}".strip()


def blas_version() -> str:
    """Return NumPy's BLAS and its kernels, "openblas 0.3.31 SkylakeX" for example."""
    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "blas":
            names = (library["internal_api"], library["version"], library.get("architecture"))
            return " ".join(str(name) for name in names if name)
    return ""


def largest_cache_bytes() -> int:
    """Return the size of the processor's largest cache; 0 where the system does not report it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=0)


def measure_bandwidth(backend: str, threads: int | None) -> Events:
    """Yield the read bandwidth of a backend's memory: {"bandwidth": bytes per second}."""
    made = get_backend(backend, threads=threads)
    n_bytes = min(max(MIN_READ_BYTES, 2 * largest_cache_bytes()), MAX_READ_BYTES)
    yield {"bandwidth": read_bandwidth(made, MAX_READ_BYTES if made.device_name() else n_bytes)}


def read_bandwidth(backend: Backend, n_bytes: int) -> float:
    """Read `n_bytes` with the library's own ops, and return bytes per second.

    The ops are a matrix-vector product and the sums of a matrix: next to no arithmetic. The fastest
    one counts; with BLAS that is the product, on the backend's threads. The start of a computation
    on a device and the copy of one number to the host are subtracted.

    The matrix is much larger than the caches. A model that fits a cache may be read faster.
    """
    xp = backend.xp
    with backend.scope():
        vector = xp.ones((MATRIX_WIDTH,), dtype=xp.float32)
        matrix = xp.ones((n_bytes // (4 * MATRIX_WIDTH), MATRIX_WIDTH), dtype=xp.float32)
        reads = (
            partial(xp.matmul, matrix, vector),
            partial(xp.sum, matrix, axis=-1),
            lambda: xp.reshape(xp.sum(matrix), (1,)),
        )
        seconds = min(_median_seconds(backend, read) for read in reads)
        overhead = _median_seconds(backend, partial(xp.matmul, matrix[:1, :], vector))
    return 4 * MATRIX_WIDTH * matrix.shape[0] / max(seconds - overhead, seconds / 2)


def _median_seconds(backend: Backend, read: Callable[[], Any]) -> float:
    times = []
    for _ in range(READ_ROUNDS + 1):
        backend.synchronize()
        start = time.perf_counter()
        backend.to_numpy(read()[:1])  # a lazy library computes when a number is requested
        backend.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
