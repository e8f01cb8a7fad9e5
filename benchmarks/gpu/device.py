"""What there is, and how fast it can be at best: the ceilings that `gpu.py` compares with."""

from __future__ import annotations

import contextlib
import importlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# Of what runs on the GPU's machine; the last column says who wants it.
NEEDED = {
    "numpy": "gptx",
    "array_api_compat": "gptx",
    "safetensors": "gptx",
    "tokenizers": "gptx",
    "huggingface_hub": "gptx",
    "threadpoolctl": "gptx",
    "cupy": "gptx on the GPU",
    "ml_dtypes": "gptx's bfloat16",
    "torch": "the peers",
    "transformers": "the peers",
}

KERNELS = r"""
extern "C" __global__ void nothing() {}

// Sums what it reads, 16 bytes at a time; what is not written would not be read.
extern "C" __global__ void read_all(const uint4* x, long long n, unsigned* out) {
    unsigned sum = 0;
    long long step = (long long)gridDim.x * blockDim.x;
    #pragma unroll 8
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        uint4 word = x[i];
        sum += word.x ^ word.y ^ word.z ^ word.w;
    }
    if (sum == 0x9e3779b9u) *out = sum;
}
"""
ROUNDS = 9
LAUNCHES = 1000
NODES = 200


def missing() -> str:
    """One line that says what is not installed, and how to bring it; "" if all is there."""
    absent = {}
    for name, who in NEEDED.items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            absent[name] = f"{name} ({who}: {error})"
    if not absent:
        return ""
    names = {"cupy": "cupy-cuda13x"}
    packages = " ".join(names.get(name, name.replace("_", "-")) for name in absent)
    return (
        f"missing: {', '.join(absent.values())}. Elsewhere: pip download --no-deps "
        f"--only-binary=:all: --python-version {platform.python_version().rpartition('.')[0]} "
        f"--platform manylinux_2_28_{platform.machine()} -d wheels {packages}; here: "
        "pip install --no-index --no-deps wheels/*.whl"
    )


def facts() -> dict[str, Any]:
    """The machine and its software."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    for name in NEEDED:
        with contextlib.suppress(ImportError):
            found[name] = getattr(importlib.import_module(name), "__version__", "there")
    return found


def gpu_facts() -> dict[str, Any]:
    """Those of the GPU and its driver."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(cupy.cuda.Device().id)
    free, total = runtime.memGetInfo()
    return {
        "device": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "l2_bytes": properties["l2CacheSize"],
        "shared_bytes_of_a_block": properties["sharedMemPerBlockOptin"],
        "memory": total,
        "memory_free": free,
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
    }


def rates(n_bytes: int = 2**32) -> Iterator[tuple[str, float]]:
    """Yield name and value: bytes per second, operations per second, seconds.

    - `copy`: device to device, bytes read and bytes written.
    - `read`: the fastest of our own kernel and CuPy's sum.
    - `matmul`: of bfloat16 numbers that are random, as zeros would be faster.
    - `launch`: of an empty kernel, on the host; `graph_node`: of one in a graph, on the device;
      `round_trip`: one number from the device to the host.
    """
    import cupy
    import torch

    module = cupy.RawModule(code=KERNELS)
    read_all, nothing = module.get_function("read_all"), module.get_function("nothing")
    x = cupy.arange(n_bytes // 4, dtype=cupy.uint32) * np.uint32(2654435761)
    y, out = cupy.empty_like(x), cupy.zeros(1, cupy.uint32)
    blocks = cupy.cuda.Device().attributes["MultiProcessorCount"] * 8
    yield "copy", 2 * n_bytes / _on_device(lambda: cupy.copyto(y, x))
    ways: list[Callable[[], Any]] = [
        lambda: read_all((blocks,), (256,), (x, np.int64(n_bytes // 16), out)),
        lambda: cupy.sum(x.view(cupy.float32)),
    ]
    yield "read", n_bytes / min(_on_device(way) for way in ways)
    x = y = None  # what is measured here needs the room no more
    cupy.get_default_memory_pool().free_all_blocks()
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        torch.matmul(a, b)
    start.record()
    for _ in range(10):
        torch.matmul(a, b)
    end.record()
    end.synchronize()
    yield "matmul", 10 * 2 * n**3 / (start.elapsed_time(end) / 1e3)
    yield from _overheads(nothing, out)


def _overheads(nothing: Any, out: Any) -> Iterator[tuple[str, float]]:
    import cupy

    nothing((1,), (32,), ())
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        nothing((1,), (32,), ())
    yield "launch", (time.perf_counter() - start) / LAUNCHES
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        for _ in range(NODES):
            nothing((1,), (32,), ())
        graph = stream.end_capture()
    yield "graph_node", _on_device(graph.launch) / NODES
    start = time.perf_counter()
    for _ in range(100):
        out.get()
    yield "round_trip", (time.perf_counter() - start) / 100


def _on_device(work: Callable[[], Any]) -> float:
    """Seconds, the median of several by the device's clock; once before for what is compiled."""
    import cupy

    times = []
    for _ in range(ROUNDS + 1):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
    return statistics.median(times[1:])


def host_rates(n_bytes: int = 2**26) -> Iterator[tuple[str, float]]:
    """The same names for the processor, with NumPy: for a dry run."""
    x = np.arange(n_bytes // 4, dtype=np.float32)
    y = np.empty_like(x)
    a = np.random.default_rng(0).random((512, 512), np.float32)

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    yield "copy", 2 * n_bytes / min(seconds(lambda: np.copyto(y, x)) for _ in range(3))
    yield "read", n_bytes / min(seconds(x.sum) for _ in range(3))
    yield "matmul", 2 * 512**3 / min(seconds(lambda: a @ a) for _ in range(3))
