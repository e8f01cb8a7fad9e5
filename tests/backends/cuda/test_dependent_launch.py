"""Launches past CuPy, by the driver: they give a kernel what CuPy's would (on the stand-in)."""

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

SMALL = replace(CASES["124M"], n_layer=2, n_head=3)
CODE = r"""
extern "C" __global__ void hasty(double* x) {
    if (blockIdx.x == 1) return;
    wait_for_previous();
    x[0] = 1;
}
extern "C" __global__ void note(
    const half_t* x, const void* none, int n, float by, long long big, unsigned long long bits,
    double* out
) {
    wait_for_previous();
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
def early(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a driver that launches on the emulator."""
    with installed():
        module = importlib.import_module("gptx.backends.cuda.dependent_launch")
        monkeypatch.setattr(module, "driver", Driver)
        monkeypatch.setattr(module.cupy.cuda.Device, "compute_capability", "90")
        yield module


def test_every_argument_arrives(early: Any) -> None:
    import cupy

    kernel = cupy.RawModule(code=HEADER + CODE).get_function("note").kernel
    x = cupy.arange(8, dtype=cupy.float16)[2:]
    out = cupy.zeros(7)
    numbers = np.int32(3), np.float32(0.1), np.int64(-(2**40)), np.uint64(2**63)
    early.launch(kernel.ptr, (3, 1), (4, 2), (x, None, *numbers, out), 100, 0)
    assert out.get().tolist() == [5, np.float32(0.1), -(2**40), 2**63, 1, 311, 421]


def test_what_the_driver_refuses_is_told(early: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "cuLaunchKernelEx", lambda *_: 98)
    with pytest.raises(RuntimeError, match="98"):
        early.launch(0, (1,), (1,), (), 0, 0)


def test_it_needs_the_driver_and_a_device_that_can(
    early: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    assert early.is_possible()
    with monkeypatch.context() as other:
        other.setattr(cupy.cuda.Device, "compute_capability", "89")
        assert not early.is_possible()
    monkeypatch.setattr(early, "driver", lambda: None)
    assert not early.is_possible()


@pytest.fixture
def calls(early: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with each early launch."""
    noted: list[Any] = []
    launch = Driver.cuLaunchKernelEx
    monkeypatch.setattr(
        Driver, "cuLaunchKernelEx", lambda *args: noted.append(args) or launch(*args)
    )
    return noted


def text(early: bool | None) -> list[int]:
    backend = make_backend("cupy-cpu")
    vars(backend)["early"] = early
    model = make_model(SMALL, backend)
    return model.generate([1, 2, 3], max_tokens=16, ignore_eos=True).tokens


def test_a_graph_of_early_launches_computes_the_same(calls: list[Any]) -> None:
    plain = text(early=False)
    assert not calls
    assert text(early=True) == plain
    n_calls = len(calls)
    assert n_calls > 0
    assert text(early=None) == plain  # in turns, then either
    assert len(calls) == 2 * n_calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_of_early_launches_are_the_same(dtype: str, calls: list[Any]) -> None:
    ids = [[1, 2, 3], [9] * 30]
    found = []
    for early in (False, True):
        backend = make_backend("cupy-cpu", dtype=dtype)
        vars(backend)["early"] = early
        model = make_model(SMALL, backend)
        for _ in range(3):  # kernel by kernel, captured, and once more
            with backend.scope():
                cache = KVCache(SMALL, backend, 2, 40)
                found.append(backend.to_numpy(next_token_logits(model.gpt2, ids, cache)).tolist())
        assert bool(calls) == early
    assert all(logits == found[0] for logits in found)


def test_a_kernel_that_does_not_wait_is_found(early: Any) -> None:
    import cupy

    kernel = cupy.RawModule(code=HEADER + CODE).get_function("hasty").kernel
    x = cupy.zeros(1)
    with pytest.raises(AssertionError, match="hasty: 32 of 64 wait"):
        early.launch(kernel.ptr, (2,), (32,), (x,), 0, 0)


def test_a_device_that_cannot_and_a_driver_that_refuses_have_graphs_without(
    early: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    plain = text(early=False)
    with monkeypatch.context() as other:
        other.setattr(cupy.cuda.Device, "compute_capability", "80")
        assert text(early=None) == text(early=True) == plain
    assert not calls
    monkeypatch.setattr(Driver, "cuLaunchKernelEx", lambda *_: 98)
    assert text(early=None) == plain
    with pytest.raises(RuntimeError):
        text(early=True)
