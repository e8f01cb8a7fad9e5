"""Launches past CuPy, by the driver: they give a kernel what CuPy's would (on the stand-in)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from conftest import make_backend, make_model
from cupy_on_cpu import installed
from cupy_on_cpu.kernels import HEADER, Driver
from random_models import CASES

CODE = r"""
extern "C" __global__ void note(
    const half_t* x, const void* none, int n, float by, long long big, unsigned long long bits,
    double* out
) {
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
        module = importlib.import_module("gptx.backends.cupy_early")
        monkeypatch.setattr(module, "driver", Driver)
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
    monkeypatch.setattr(cupy.cuda.Device, "compute_capability", "89")
    assert not early.is_possible()
    monkeypatch.undo()
    monkeypatch.setattr(early, "driver", lambda: None)
    assert not early.is_possible()


def test_a_graph_of_early_launches_computes_the_same(
    early: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    launch = Driver.cuLaunchKernelEx
    monkeypatch.setattr(
        Driver, "cuLaunchKernelEx", lambda *args: calls.append(args) or launch(*args)
    )
    texts = []
    for is_early in (False, True):
        backend = make_backend("cupy-cpu")
        monkeypatch.setattr(backend, "early", is_early)
        model = make_model(CASES["124M"], backend)
        texts.append(model.generate([1, 2, 3], max_tokens=6, ignore_eos=True).tokens)
        assert bool(calls) == is_early
    assert texts[0] == texts[1]
