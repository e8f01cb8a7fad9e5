"""A stand-in for CuPy that consists of NumPy and the emulator; it runs the CuPy backend on the CPU.

    with installed():
        backend = get_backend("cupy")

Inside the context, `import cupy` returns the stand-in, and `array_api_compat.cupy` is the real
wrapper around it. The stand-in rejects every call that CuPy 14.2 rejects.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from tests.emulator.cupy_stand_in import arrays, kernels, signatures, streams

__all__ = ["installed"]

SAME_AS_NUMPY = """
    bool_ int8 int16 int32 int64 intp uint8 uint16 uint32 uint64 float16 float32 float64 complex64
    complex128 floating integer dtype finfo iinfo isdtype issubdtype can_cast inf nan newaxis pi e
"""
MADE_OF_NUMPY = """
    ndarray array arange asarray ascontiguousarray asfortranarray asnumpy empty empty_like full
    matmul ones zeros zeros_like
"""
CUDA = """
    Device Event Graph MemoryPointer MemoryPool Stream UnownedMemory
    get_current_stream get_elapsed_time using_allocator
"""


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(names)
    return module


def _modules() -> dict[str, ModuleType]:
    """Create the modules of the stand-in, by name."""
    runtime = _module(
        "cupy.cuda.runtime",
        CUDARuntimeError=streams.CUDARuntimeError,
        getDeviceCount=lambda: streams.N_DEVICES,
        getDevice=lambda: streams.current.device,
        getDeviceProperties=lambda device: {"name": f"a stand-in, number {device}".encode()},
        memGetInfo=lambda: (streams.free_bytes(), streams.TOTAL_BYTES),
    )
    memory = _module(
        "cupy.cuda.memory",
        OutOfMemoryError=streams.OutOfMemoryError,
        MemoryPointer=streams.MemoryPointer,
        MemoryPool=streams.MemoryPool,
    )
    driver = _module("cupy.cuda.driver", CUDADriverError=streams.CUDADriverError)
    device = _module("cupy.cuda.device", Device=streams.Device)
    cuda = _module("cupy.cuda", runtime=runtime, memory=memory, driver=driver, device=device)
    for name in CUDA.split():
        setattr(cuda, name, getattr(streams, name))
    linalg = _module("cupy.linalg", lstsq=None)  # array_api_compat reads lstsq
    fft = _module("cupy.fft")
    cupy = _module("cupy", __version__="14.2.0", cuda=cuda, linalg=linalg, fft=fft)
    cupy.get_default_memory_pool = lambda: streams.default_pool
    cupy.RawModule = kernels.RawModule
    for name in SAME_AS_NUMPY.split():
        setattr(cupy, name, getattr(np, name))
    for name in MADE_OF_NUMPY.split():
        setattr(cupy, name, getattr(arrays, name))
    for name in signatures.UFUNCS.split():
        setattr(cupy, name, arrays.make_ufunc(name))
    for line in signatures.SIGNATURES.strip().splitlines():
        setattr(cupy, signatures.parse(line)[0], arrays.make_function(line))
    special = _module("cupyx.scipy.special", erf=arrays.erf)
    scipy = _module("cupyx.scipy", special=special)
    cupyx = _module("cupyx", scipy=scipy, empty_pinned=arrays.empty_pinned)
    made = (cupy, cuda, runtime, memory, driver, device, linalg, fft, cupyx, scipy, special)
    return {module.__name__: module for module in made}


def _is_swapped(name: str) -> bool:
    """Return True for a module that has one version with the stand-in and one with CuPy."""
    return name.split(".")[0] in ("cupy", "cupyx") or name.startswith(
        ("array_api_compat.cupy", "gptx.backends.cuda")
    )


def _swap(modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Replace the swapped modules in `sys.modules`; return the previous ones."""
    before = {name: module for name, module in sys.modules.items() if _is_swapped(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    for name in {**before, **modules}:  # modules are attributes of their package, too
        parent, _, child = name.rpartition(".")
        if parent and not _is_swapped(parent):
            vars(sys.modules[parent]).pop(child, None)
            if name in modules:
                setattr(sys.modules[parent], child, modules[name])
    return before


_stand_in: dict[str, ModuleType] = {}  # and the modules that were imported with it
_replaced: dict[str, ModuleType] = {}  # modules that the stand-in replaces while it is installed
_depth = 0  # number of active contexts


@contextmanager
def installed() -> Iterator[ModuleType]:
    """Install the stand-in in the context; contexts may end in any order."""
    global _depth
    if not _stand_in:
        _stand_in.update(_modules())
    if not _depth:
        _replaced.update(_swap(_stand_in))
    _depth += 1
    try:
        yield _stand_in["cupy"]
    finally:
        _depth -= 1
        if not _depth:
            _stand_in.update(_swap(_replaced))
            _replaced.clear()
