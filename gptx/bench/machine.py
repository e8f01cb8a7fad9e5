"""What a measurement was made with: the processor, the libraries, the date."""

from __future__ import annotations

import importlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from gptx._version import __version__
from gptx.backends import TABLE, Backend


def about(backend: Backend) -> dict[str, Any]:
    """The facts that go into every record."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": backend.device_name() or None,
        "cpu": cpu_name(),
        "cores": cores(),
        "gptx": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "library": library(backend),
        "blas": blas(),
    }


def cores() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name where the system tells it, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def library(backend: Backend) -> str:
    """The array library and its version, "mlx 0.32.4" for example."""
    package = TABLE[backend.name].package
    version = getattr(importlib.import_module(package), "__version__", "")
    return f"{package.partition('.')[0]} {version}".strip()


def blas() -> str:
    """NumPy's BLAS and the kernels that it chose, "openblas 0.3.31 SkylakeX" for example."""
    for found in threadpoolctl.threadpool_info():
        if found["user_api"] == "blas":
            names = (found["internal_api"], found["version"], found.get("architecture"))
            return " ".join(str(name) for name in names if name)
    return ""


def largest_cache() -> int:
    """Bytes of the processor's largest cache; 0 where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=0)
