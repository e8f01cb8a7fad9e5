"""The stand-in for CuPy: accepted and rejected calls, and its removal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.emulator.cupy_stand_in import installed
from tests.emulator.cupy_stand_in.kernels import HEADER

CODE = r"""
extern "C" __global__ void add(const REAL* x, REAL* y, int n, float by) {
    DYNAMIC_SHARED(raw);
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = from_float<REAL>(to_float(x[i]) + by);
}
extern "C" __global__ void count_blocks(int* n) { atomicAdd(n, 1); }
"""


@pytest.fixture
def cupy() -> Iterator[Any]:
    with installed() as module:
        yield module


def raw_kernel(cupy: Any, name: str = "add") -> Any:
    options = ("-std=c++17", "-DREAL=float")
    return cupy.RawModule(code=HEADER + CODE, options=options).get_function(name)


def cupy_modules() -> list[str]:
    return sorted(name for name in sys.modules if "cupy" in name and "stand_in" not in name)


def test_it_is_importable_only_while_it_is_installed() -> None:
    before = cupy_modules()
    with installed() as first:
        import array_api_compat.cupy as xp
        import cupy
        from cupyx.scipy.special import erf

        assert cupy is first
        assert "array_api_compat.cupy" in cupy_modules()
        assert float(erf(xp.asarray([0.5]))[0]) == pytest.approx(0.5204999)
    assert cupy_modules() == before
    import array_api_compat

    assert "cupy" not in vars(array_api_compat) or "array_api_compat.cupy" in before
    with installed() as again:
        assert again is first
        assert sys.modules["array_api_compat.cupy"] is xp


def test_contexts_may_end_in_any_order() -> None:
    before = cupy_modules()
    one, other = installed(), installed()
    with one, other:
        assert "cupy" in cupy_modules()
    for context in (one := installed(), other := installed()):
        context.__enter__()
    for context in (one, other):  # the first context ends first
        assert "cupy" in cupy_modules()
        context.__exit__(None, None, None)
    assert cupy_modules() == before


def test_views_share_memory(cupy: Any) -> None:
    x = cupy.arange(12, dtype=cupy.float32).reshape(3, 4)
    row = x[1]
    assert row.data.ptr == x.data.ptr + 16
    assert x.T.data.ptr == x.data.ptr
    row[...] = 0
    assert x.get()[1].tolist() == [0, 0, 0, 0]
    again = cupy.ndarray((2, 2), cupy.float32, memptr=x.data + 32)
    assert again.get().tolist() == [[8, 9], [10, 11]]
    assert (x + 0).data.ptr != x.data.ptr


def test_memory_order_is_kept(cupy: Any) -> None:
    x = cupy.asfortranarray(cupy.asarray(np.arange(6.0).reshape(2, 3)))
    assert x.strides == (8, 16)
    assert (x * 2).strides == (8, 16)
    assert cupy.ascontiguousarray(x.T).data.ptr == x.data.ptr
    assert cupy.ascontiguousarray(x).strides == (24, 8)


def test_new_memory_holds_garbage(cupy: Any) -> None:
    assert np.isnan(cupy.empty(3, cupy.float32).get()).all()


def test_numpy_arrays_are_rejected(cupy: Any) -> None:
    x, host = cupy.zeros(3), np.zeros(3)
    for operation in (
        lambda: x + host,
        lambda: host + x,
        lambda: cupy.maximum(x, host),
        lambda: cupy.concatenate((x, host)),
        lambda: np.asarray(x),
    ):
        with pytest.raises(TypeError):
            operation()
    assert (x + np.float64(1)).get().tolist() == [1, 1, 1]


def test_parameters_that_cupy_lacks_are_rejected(cupy: Any) -> None:
    x = cupy.zeros((2, 2))
    for operation in (
        lambda: cupy.take(x, cupy.zeros(1, cupy.int64), mode="clip"),
        lambda: cupy.sum(x, where=x > 0),
        lambda: x.sum(initial=0),
        lambda: x.astype(cupy.float32, "K", "unsafe", True, False, 0),
    ):
        with pytest.raises(TypeError):
            operation()
    for thing, name in ((cupy, "linspace_"), (x, "ctypes"), (cupy.cuda, "Graphs")):
        assert not hasattr(thing, name)


def test_matmul_of_16_bits_accumulates_in_float32(cupy: Any) -> None:
    x = cupy.full((1, 4096), 1, cupy.float16)
    assert float((x @ x.T)[0, 0]) == 4096  # sums of float16 stay at 2048
    from ml_dtypes import bfloat16

    batch = cupy.ones((2, 2, 2), bfloat16)
    with pytest.raises(TypeError, match="bfloat16"):
        batch @ batch


def test_a_kernel_reads_and_writes_arrays(cupy: Any) -> None:
    x, y = cupy.arange(5, dtype=cupy.float32), cupy.empty(5, cupy.float32)
    raw_kernel(cupy)((1,), (32,), (x, y, np.int32(5), np.float32(0.5)))
    assert y.get().tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]


def test_an_empty_grid_runs_one_block(cupy: Any) -> None:
    n = cupy.zeros(1, cupy.int32)
    raw_kernel(cupy, "count_blocks")((0,), (1,), (n,))
    assert int(n[0]) == 1


@pytest.mark.parametrize("bad", ["int", "wide", "host", "strided", "short", "grid", "shared"])
def test_invalid_launches_are_rejected(cupy: Any, bad: str) -> None:
    x = cupy.zeros((4, 2), cupy.float32)
    args = [x, x, np.int32(4), np.float32(1)]
    if bad in ("int", "wide"):
        args[2] = 4 if bad == "int" else np.int64(4)
    if bad in ("host", "strided"):
        args[0] = np.zeros(4, np.float32) if bad == "host" else x[:, 0]
    if bad == "short":
        args[0] = x.astype(cupy.float16)
    grid = [1] if bad == "grid" else (1,)
    with pytest.raises((AssertionError, TypeError, cupy.cuda.driver.CUDADriverError)):
        raw_kernel(cupy)(grid, (32,), args, shared_mem=49153 if bad == "shared" else 0)


def test_large_shared_memory_needs_the_attribute(cupy: Any) -> None:
    x = cupy.zeros(4, cupy.float32)
    kernel = raw_kernel(cupy)
    kernel.max_dynamic_shared_size_bytes = 100_000
    kernel((1,), (32,), (x, x, np.int32(4), np.float32(1)), shared_mem=100_000)
    assert x.get().tolist() == [1, 1, 1, 1]
    with pytest.raises(cupy.cuda.driver.CUDADriverError):
        kernel.max_dynamic_shared_size_bytes = 2**20


def test_a_captured_launch_runs_when_the_graph_runs(cupy: Any) -> None:
    x = cupy.zeros(4, cupy.float32)
    kernel = raw_kernel(cupy)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        kernel((1,), (32,), (x, x, np.int32(4), np.float32(1)))
        view = x[:2]  # no work on the device
        graph = stream.end_capture()
    assert view.get().tolist() == [0, 0]
    graph.launch()
    x[0] = 5
    graph.launch(stream)
    assert x.get().tolist() == [6, 2, 2, 2]


@pytest.mark.parametrize(
    "work",
    [
        lambda cupy, x: x @ x,
        lambda cupy, x: x + 1,
        lambda cupy, x: x.get(),
        lambda cupy, x: cupy.asnumpy(x),
        lambda cupy, x: x[0, 0].item(),
        lambda cupy, x: bool(x.all()),
        lambda cupy, x: cupy.zeros(3),
        lambda cupy, x: cupy.asarray(np.zeros(3)),
        lambda cupy, x: x.set(np.zeros((2, 2))),
        lambda cupy, x: x.fill(1),
        lambda cupy, x: cupy.cuda.Device().synchronize(),
    ],
)
def test_other_work_invalidates_a_capture(cupy: Any, work: Any) -> None:
    x = cupy.zeros((2, 2))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="capturing"):
            work(cupy, x)
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="previous error"):
            stream.end_capture()
    assert not stream.is_capturing()
    assert x.get().tolist() == [[0, 0], [0, 0]]


def test_the_default_stream_cannot_capture(cupy: Any) -> None:
    with pytest.raises(RuntimeError, match="default"):
        cupy.cuda.get_current_stream().begin_capture()


def test_a_graph_does_not_keep_its_arrays_alive(cupy: Any) -> None:
    x, y = cupy.zeros((2, 4), cupy.float32)
    kernel = raw_kernel(cupy)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        kernel((1,), (32,), (x, y, np.int32(4), np.float32(1)))
        graph = stream.end_capture()
    del x, y
    with pytest.raises(AssertionError, match="freed"):
        graph.launch()


def test_a_stream_belongs_to_its_device(cupy: Any) -> None:
    stream = cupy.cuda.Stream()
    with cupy.cuda.Device(1):
        assert cupy.cuda.Device().id == 1
        with pytest.raises(RuntimeError, match="device"):
            stream.__enter__()
    assert cupy.cuda.Device().id == 0


def test_events_measure_time(cupy: Any) -> None:
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    with pytest.raises(ValueError, match="no time"):
        cupy.cuda.get_elapsed_time(start, end)
    start.record()
    end.record()
    assert cupy.cuda.get_elapsed_time(start, end) >= 0


def test_an_asynchronous_copy_completes_at_its_event(cupy: Any) -> None:
    import cupyx

    x = cupy.arange(3, dtype=cupy.int64)
    host = cupyx.empty_pinned(x.shape, x.dtype)
    x.get(out=host, blocking=False)
    event = cupy.cuda.get_current_stream().record()
    x[...] = 7  # after the event
    assert host.tolist() == [-1, -1, -1]
    event.synchronize()
    assert host.tolist() == [0, 1, 2]
    host[0] = 5
    cupy.cuda.Device().synchronize()
    assert host[0] == 5
    x.get(out=host)
    assert host.tolist() == [7, 7, 7]


def test_a_kernels_writes_to_host_memory_are_visible_after_an_event(cupy: Any) -> None:
    import cupyx

    host = cupyx.empty_pinned((2, 4), np.float32)
    host[...] = 5
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
    x, place = cupy.ones(4, cupy.float32), cupy.cuda.MemoryPointer(memory, 16)
    row = cupy.ndarray(4, np.float32, place)
    raw_kernel(cupy)((1,), (32,), (x, row, np.int32(4), np.float32(1)))
    assert host[0].tolist() == [5] * 4
    assert host[1].tolist() != [2] * 4
    cupy.cuda.get_current_stream().record().synchronize()
    assert host.tolist() == [[5] * 4, [2] * 4]


def test_a_pool_counts_bytes_and_has_a_limit(cupy: Any) -> None:
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        x = cupy.zeros(1000, cupy.uint8)
        y = x + 1
        assert (pool.used_bytes(), pool.total_bytes()) == (2048, 2048)
        free, total = cupy.cuda.runtime.memGetInfo()
        assert free <= total - 2048
        del x
        assert (pool.used_bytes(), pool.total_bytes()) == (1024, 2048)
        pool.free_all_blocks()
        assert pool.total_bytes() == 1024
        pool.set_limit(size=2048)
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError, match="2,048 bytes"):
            cupy.empty(2000, cupy.uint8)
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cupy.empty(2**50)
    assert y.get().tolist() == [1] * 1000
