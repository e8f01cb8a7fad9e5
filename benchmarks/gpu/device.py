"""The device: its facts, and the upper limits that times are compared with."""

from __future__ import annotations

import importlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gptx.backends import get_backend
from gptx.bench.machine import MIN_READ_BYTES, read_bandwidth
from gptx.bench.worker import Event

# Package -> the part of the benchmark that needs it.
PACKAGES = {
    "numpy": "gptx",
    "array_api_compat": "gptx",
    "safetensors": "gptx",
    "tokenizers": "gptx",
    "huggingface_hub": "gptx",
    "threadpoolctl": "gptx",
    "cupy": "the backend",
    "ml_dtypes": "bfloat16",
    "torch": "the peers",
    "transformers": "the peers",
}

KERNELS = r"""
extern "C" __global__ void nothing() {}

// Reads 16 bytes at a time. Without a use of the sum, the compiler would drop the reads.
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
BUFFER_BYTES = 2**32  # more than any cache
N_LAUNCHES = 1000
N_GRAPH_NODES = 200


def report_device(until: float, dry_run: bool = False) -> Iterator[Event]:
    """Yield a note about missing packages, the facts of the device, and its upper limits.

    With `dry_run`, the only limit is the bandwidth of the host's memory.
    """
    versions, missing = find_packages()
    if missing:
        yield {"section": "note", "text": f"missing packages: {', '.join(missing)}"}
    yield {
        "section": "device",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **versions,
    }
    if dry_run:
        bandwidth = read_bandwidth(get_backend("numpy"), MIN_READ_BYTES)
        yield {"section": "rates", "name": "read", "value": bandwidth}
        return
    yield {"section": "device", **gpu_facts()}
    for name, value in gpu_rates():
        yield {"section": "rates", "name": name, "value": value}


def find_packages() -> tuple[dict[str, str], list[str]]:
    """Return the versions of the packages, and the missing ones with their use."""
    versions, missing = {}, []
    for name, use in PACKAGES.items():
        try:
            versions[name] = getattr(importlib.import_module(name), "__version__", "installed")
        except ImportError as error:
            missing.append(f"{name} ({use}: {error})")
    return versions, missing


def gpu_facts() -> dict[str, Any]:
    """Return the facts about the GPU and its driver."""
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


def gpu_rates() -> Iterator[tuple[str, float]]:
    """Yield name and value: bytes per second, operations per second, or seconds.

    - `copy`: device to device, bytes read and bytes written.
    - `read`: the faster of the kernel above and CuPy's sum.
    - `matmul`: a product of random bfloat16 numbers; zeros would be faster.
    - `launch`: an empty kernel, time on the host.
    - `graph_node`: an empty kernel in a CUDA graph, time on the device.
    - `round_trip`: one number from the device to the host.
    """
    import cupy
    import torch

    module = cupy.RawModule(code=KERNELS)
    read_all, nothing = module.get_function("read_all"), module.get_function("nothing")
    n_bytes = BUFFER_BYTES
    x = cupy.arange(n_bytes // 4, dtype=cupy.uint32) * np.uint32(2654435761)
    y, out = cupy.empty_like(x), cupy.zeros(1, cupy.uint32)
    blocks = cupy.cuda.Device().attributes["MultiProcessorCount"] * 8
    yield "copy", 2 * n_bytes / _device_seconds(lambda: cupy.copyto(y, x))
    reads: list[Callable[[], Any]] = [
        lambda: read_all((blocks,), (256,), (x, np.int64(n_bytes // 16), out)),
        lambda: cupy.sum(x.view(cupy.float32)),
    ]
    yield "read", n_bytes / min(_device_seconds(read) for read in reads)
    x = y = None  # frees the memory
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
    for _ in range(N_LAUNCHES):
        nothing((1,), (32,), ())
    yield "launch", (time.perf_counter() - start) / N_LAUNCHES
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        for _ in range(N_GRAPH_NODES):
            nothing((1,), (32,), ())
        graph = stream.end_capture()
    yield "graph_node", _device_seconds(graph.launch) / N_GRAPH_NODES
    start = time.perf_counter()
    for _ in range(100):
        out.get()
    yield "round_trip", (time.perf_counter() - start) / 100


def _device_seconds(work: Callable[[], Any]) -> float:
    """Return the median seconds on the device's clock, after a run that compiles."""
    return statistics.median([event_seconds(work) for _ in range(ROUNDS + 1)][1:])


def event_seconds(work: Callable[[], Any]) -> float:
    """Return the seconds between CuPy's events before and after some work on the device."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3
