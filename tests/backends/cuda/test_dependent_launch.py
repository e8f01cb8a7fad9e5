"""Programmatic dependent launch with the stand-in's driver."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits
from tests.emulator.cupy_stand_in import installed
from tests.emulator.cupy_stand_in.kernels import HEADER, Driver
from tests.support.backends import make_backend
from tests.support.models import make_model
from tests.support.random_models import CASES

CONFIG = replace(CASES["124M"], n_layer=2, n_head=2, n_embd=64, vocab_size=83)
CODE = r"""
extern "C" __global__ void some_threads_sync(double* x) {
    if (blockIdx.x == 1) return;
    grid_dependency_sync();
    x[0] = 1;
}
extern "C" __global__ void copy_arguments(
    const half_t* x, const void* none, int n, float by, long long big, unsigned long long bits,
    double* out
) {
    grid_dependency_sync();
    DYNAMIC_SHARED(raw);
    raw[99] = 1;
    if (threadIdx.x + threadIdx.y || blockIdx.x != 2) return;
    out[0] = to_float(x[n]);
    out[1] = by;
    out[2] = (double)big;
    out[3] = (double)bits;
    out[4] = none == nullptr;
    out[5] = gridDim.x * 100 + gridDim.y * 10 + gridDim.z;
    out[6] = blockDim.x * 100 + blockDim.y * 10 + blockDim.z;
}
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `dependent_launch`, with a driver that launches on the emulator."""
    with installed():
        module = importlib.import_module("gptx.backends.cuda.dependent_launch")
        monkeypatch.setattr(module, "driver", Driver)
        monkeypatch.setattr(module.cupy.cuda.Device, "compute_capability", "90")
        yield module


def test_arguments_reach_the_kernel(module: Any) -> None:
    import cupy

    kernel = cupy.RawModule(code=HEADER + CODE).get_function("copy_arguments").kernel
    x = cupy.arange(8, dtype=cupy.float16)[2:]
    out = cupy.zeros(7)
    numbers = np.int32(3), np.float32(0.1), np.int64(-(2**40)), np.uint64(2**63)
    module.launch(kernel.ptr, (3, 1), (4, 2), (x, None, *numbers, out), 100, 0)
    assert out.get().tolist() == [5, np.float32(0.1), -(2**40), 2**63, 1, 311, 421]


def test_errors_of_the_driver_are_reported(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "cuLaunchKernelEx", lambda *_: 98)
    with pytest.raises(RuntimeError, match="98"):
        module.launch(0, (1,), (1,), (), 0, 0)


def test_it_needs_a_driver_and_a_device_that_support_it(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    assert module.is_supported()
    with monkeypatch.context() as other:
        other.setattr(cupy.cuda.Device, "compute_capability", "89")
        assert not module.is_supported()
    monkeypatch.setattr(module, "driver", lambda: None)
    assert not module.is_supported()


@pytest.fixture
def calls(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments of each dependent launch."""
    calls: list[Any] = []
    launch = Driver.cuLaunchKernelEx
    monkeypatch.setattr(
        Driver, "cuLaunchKernelEx", lambda *args: calls.append(args) or launch(*args)
    )
    return calls


def generate(dependent: bool | None) -> list[int]:
    backend = make_backend("cupy-cpu")
    vars(backend)["dependent_launch"] = dependent
    model = make_model(CONFIG, backend)
    return model.generate([1, 2, 3], max_tokens=12, ignore_eos=True).tokens


def test_graphs_with_dependent_launches_compute_the_same(calls: list[Any]) -> None:
    plain = generate(dependent=False)
    assert not calls
    assert generate(dependent=True) == plain
    n_calls = len(calls)
    assert n_calls > 0
    assert generate(dependent=None) == plain  # autotuning, then one of both
    assert len(calls) == 2 * n_calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_with_dependent_launches_are_the_same(dtype: str, calls: list[Any]) -> None:
    ids = [[1, 2, 3], [9] * 12]
    found = []
    for dependent in (False, True):
        backend = make_backend("cupy-cpu", dtype=dtype)
        vars(backend)["dependent_launch"] = dependent
        model = make_model(CONFIG, backend)
        for _ in range(3):  # kernel by kernel, captured, as a graph
            with backend.scope():
                cache = KVCache(CONFIG, backend, 2, 16)
                found.append(backend.to_numpy(next_token_logits(model.gpt2, ids, cache)).tolist())
        assert bool(calls) == dependent
    assert all(logits == found[0] for logits in found)


def test_a_kernel_without_grid_dependency_sync_is_reported(module: Any) -> None:
    import cupy

    kernel = cupy.RawModule(code=HEADER + CODE).get_function("some_threads_sync").kernel
    x = cupy.zeros(1)
    with pytest.raises(AssertionError, match="some_threads_sync: 32 of 64 threads call"):
        module.launch(kernel.ptr, (2,), (32,), (x,), 0, 0)


def test_graphs_without_dependent_launches_if_unsupported_or_rejected(
    module: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    plain = generate(dependent=False)
    with monkeypatch.context() as other:
        other.setattr(cupy.cuda.Device, "compute_capability", "80")
        assert generate(dependent=None) == generate(dependent=True) == plain
    assert not calls
    monkeypatch.setattr(Driver, "cuLaunchKernelEx", lambda *_: 98)
    assert generate(dependent=None) == plain
    with pytest.raises(RuntimeError):
        generate(dependent=True)
