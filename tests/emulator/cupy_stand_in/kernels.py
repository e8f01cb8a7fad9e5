"""CuPy's RawModule on the emulator of `cuda_on_cpu`."""

from __future__ import annotations

import ctypes
import math
import operator
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tests.emulator import KERNELS, compile_text
from tests.emulator.cupy_stand_in import streams
from tests.emulator.cupy_stand_in.arrays import ndarray
from tests.emulator.cupy_stand_in.streams import (
    ATTRIBUTES,
    CUDADriverError,
    Stream,
    get_current_stream,
)

HEADER = (KERNELS / "device.cuh").read_text("utf-8")
INVALID_VALUE = 1  # the driver's error
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # its attribute of a launch


class RawModule:
    """Kernels, compiled when the first is asked for."""

    def __init__(
        self,
        *,
        code: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        enable_cooperative_groups: bool = False,
        name_expressions: Any = None,
    ) -> None:
        assert HEADER in code, "the emulator has its own device.cuh, in place of this one"
        assert isinstance(options, tuple)
        macros = [option.removeprefix("-D") for option in options if option.startswith("-D")]
        assert {*options} - {f"-D{macro}" for macro in macros} <= {"-std=c++17"}
        self._code = _named(code.replace(HEADER, ""))
        self._macros = dict(macro.split("=") for macro in macros)

    def get_function(self, name: str) -> RawKernel:
        """A kernel by its name."""
        return RawKernel(compile_text(self._code, self._macros), name)


def _named(code: str) -> str:
    """Say where each file of the kernels begins: a fault is told by its file and line."""
    for path in KERNELS.glob("*.cu*"):
        text = path.read_text("utf-8")
        code = code.replace(text, f'#line 1 "{path.name}"\n{text}')
    return code


class Function:
    """What the driver knows of a kernel: `ptr` is its handle."""

    def __init__(self, kernel: RawKernel) -> None:
        self.ptr = id(self)
        self.raw_kernel = kernel
        functions[self.ptr] = self


class RawKernel:
    """A kernel; its arguments are held to its parameters' types."""

    def __init__(self, module: Any, name: str) -> None:
        assert name in module.kernels, f"named symbol not found: {name}"
        self._module, self.name = module, name
        self._shared_bytes = ATTRIBUTES["MaxSharedMemoryPerBlock"]
        self.kernel = Function(self)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """What a launch may ask for."""
        return self._shared_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, n_bytes: int) -> None:
        if n_bytes > ATTRIBUTES["MaxSharedMemoryPerBlockOptin"]:
            raise CUDADriverError(INVALID_VALUE)
        self._shared_bytes = n_bytes

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Any,
        *,
        shared_mem: int = 0,
        stream: Stream | None = None,
        early: bool = False,
    ) -> None:
        """Launch on a stream; `early`, if by the driver: then every thread has to wait."""
        for size in (grid, block):
            if not isinstance(size, tuple):
                raise TypeError(f"a grid and a block are tuples, not {size!r}")
        if shared_mem > self._shared_bytes:
            raise CUDADriverError(INVALID_VALUE)
        sizes = [tuple(max(1, operator.index(n)) for n in (*s, 1, 1)[:3]) for s in (grid, block)]
        values = [_borrow(arg) for arg in args]
        self._module.check(self.name, [value() for value in values])

        def launch() -> None:
            before = self._module.n_waits
            self._module.launch(self.name, *sizes, [value() for value in values], shared_mem)
            n_threads = math.prod((*sizes[0], *sizes[1]))
            waited = self._module.n_waits - before
            assert not early or waited == n_threads, f"{self.name}: {waited} of {n_threads} wait"

        (stream or get_current_stream()).do(launch)


def _borrow(arg: Any) -> Callable[[], Any]:
    """An argument as it will be at a launch: it is not kept alive."""
    if arg is None or isinstance(arg, np.generic):
        return lambda: arg
    if not isinstance(arg, ndarray):
        raise TypeError(f"Unsupported type {type(arg)}: the C type would not be plain")
    memory = weakref.ref(arg.data.mem)
    offset = arg.data.ptr - arg.data.mem.ctypes.data
    layout = arg.shape, arg.dtype

    def array() -> np.ndarray:
        alive = memory()
        assert alive is not None, "the memory of a kernel's argument was given back"
        return np.ndarray(layout[0], layout[1], alive, offset, strides)

    strides = arg.strides
    return array


class Driver:
    """What is used of the driver's library itself, past CuPy: all that it gets are addresses."""

    def cuLaunchKernelEx(self, config: Any, function: int, pointers: Any, extra: None) -> int:
        """Launch a kernel by its handle; the arguments are where `pointers` points to."""
        attributes = [config.attributes[i] for i in range(config.n_attributes)]
        if [(a.id, a.value) for a in attributes] != [(PROGRAMMATIC_STREAM_SERIALIZATION, 1)]:
            return INVALID_VALUE
        kernel = functions[function].raw_kernel
        types = kernel._module.kernels[kernel.name]
        args = [_read(pointers[i], wanted) for i, wanted in enumerate(types)]
        stream = streams.by_ptr[config.stream or 0]
        sizes = tuple(config.grid), tuple(config.block)
        kernel(*sizes, args, shared_mem=config.shared_bytes, stream=stream, early=True)
        return 0


def _read(pointer: int, wanted: str) -> Any:
    """An argument of a type from where it is: a number, or an address within some memory."""
    if "*" not in wanted:
        dtype = np.dtype(wanted)
        return np.frombuffer(ctypes.string_at(pointer, dtype.itemsize), dtype)[0]
    address = ctypes.c_void_p.from_address(pointer).value
    if address is None:
        return None
    start = max(start for start in streams.memories if start <= address)
    memory = streams.memories[start]
    name = wanted.partition("*")[2]
    dtype = np.dtype({"void": "uint8", "bfloat16": ml_dtypes.bfloat16}.get(name, name))
    n = (start + memory.nbytes - address) // dtype.itemsize
    assert n > 0, f"no memory is at {address:#x}"
    return ndarray((n,), dtype, streams.MemoryPointer(memory, address - start))


functions: weakref.WeakValueDictionary[int, Function] = weakref.WeakValueDictionary()
