"""CuPy's RawModule and RawKernel on the emulator."""

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
INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # enum CUlaunchAttributeID


class RawModule:
    """Kernels of one source, compiled at the first call of `get_function`."""

    def __init__(
        self,
        *,
        code: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        enable_cooperative_groups: bool = False,
        name_expressions: Any = None,
    ) -> None:
        assert HEADER in code, "a kernel's source has to begin with device.cuh"
        assert isinstance(options, tuple)
        macros = [option.removeprefix("-D") for option in options if option.startswith("-D")]
        assert {*options} - {f"-D{macro}" for macro in macros} <= {"-std=c++17"}
        self._code = _with_line_directives(code.replace(HEADER, ""))
        self._macros = dict(macro.split("=") for macro in macros)

    def get_function(self, name: str) -> RawKernel:
        """Return a kernel by name."""
        return RawKernel(compile_text(self._code, self._macros), name)


def _with_line_directives(code: str) -> str:
    """Mark where each file begins, so that a fault names a file and line."""
    for path in KERNELS.glob("*.cu*"):
        text = path.read_text("utf-8")
        code = code.replace(text, f'#line 1 "{path.name}"\n{text}')
    return code


class Function:
    """A CUfunction; `ptr` is its handle."""

    def __init__(self, kernel: RawKernel) -> None:
        self.ptr = id(self)
        self.raw_kernel = kernel
        functions[self.ptr] = self


class RawKernel:
    """A kernel that checks the types of its arguments."""

    def __init__(self, module: Any, name: str) -> None:
        assert name in module.kernels, f"named symbol not found: {name}"
        self._module, self.name = module, name
        self._shared_bytes = ATTRIBUTES["MaxSharedMemoryPerBlock"]
        self.kernel = Function(self)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """Most bytes of dynamic shared memory of a launch."""
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
        dependent: bool = False,
    ) -> None:
        """Launch on a stream.

        `dependent` marks a programmatic dependent launch, in which each thread has to call
        grid_dependency_sync.
        """
        for size in (grid, block):
            if not isinstance(size, tuple):
                raise TypeError(f"a grid and a block are tuples, not {size!r}")
        if shared_mem > self._shared_bytes:
            raise CUDADriverError(INVALID_VALUE)
        sizes = [tuple(max(1, operator.index(n)) for n in (*s, 1, 1)[:3]) for s in (grid, block)]
        values = [_borrow(arg) for arg in args]
        self._module.check_arguments(self.name, [value() for value in values])

        def launch() -> None:
            before = self._module.n_waits
            self._module.launch(self.name, *sizes, [value() for value in values], shared_mem)
            n_threads = math.prod((*sizes[0], *sizes[1]))
            waited = self._module.n_waits - before
            assert not dependent or waited == n_threads, (
                f"{self.name}: {waited} of {n_threads} threads call grid_dependency_sync"
            )

        (stream or get_current_stream()).submit(launch)


def _borrow(arg: Any) -> Callable[[], Any]:
    """Return a function that returns the argument; it does not keep an array alive."""
    if arg is None or isinstance(arg, np.generic):
        return lambda: arg
    if not isinstance(arg, ndarray):
        raise TypeError(f"Unsupported type {type(arg)}: the C type would not be plain")
    memory = weakref.ref(arg.data.mem)
    offset = arg.data.ptr - arg.data.mem.ctypes.data
    layout = arg.shape, arg.dtype

    def array() -> np.ndarray:
        alive = memory()
        assert alive is not None, "the memory of a kernel's argument is freed"
        return np.ndarray(layout[0], layout[1], alive, offset, strides)

    strides = arg.strides
    return array


class Driver:
    """The functions of libcuda that the backend calls without CuPy; they receive addresses."""

    def cuLaunchKernelEx(self, config: Any, function: int, pointers: Any, extra: None) -> int:
        """Launch a kernel by its handle; `pointers` has the addresses of the arguments."""
        attributes = [config.attributes[i] for i in range(config.n_attributes)]
        if [(a.id, a.value) for a in attributes] != [(PROGRAMMATIC_STREAM_SERIALIZATION, 1)]:
            return INVALID_VALUE
        kernel = functions[function].raw_kernel
        types = kernel._module.kernels[kernel.name]
        args = [_read(pointers[i], expected) for i, expected in enumerate(types)]
        stream = streams.by_ptr[config.stream or 0]
        sizes = tuple(config.grid), tuple(config.block)
        kernel(*sizes, args, shared_mem=config.shared_bytes, stream=stream, dependent=True)
        return 0


def _read(pointer: int, expected: str) -> Any:
    """Read an argument from memory: a number, or an address as an array."""
    if "*" not in expected:
        dtype = np.dtype(expected)
        return np.frombuffer(ctypes.string_at(pointer, dtype.itemsize), dtype)[0]
    address = ctypes.c_void_p.from_address(pointer).value
    if address is None:
        return None
    start = max(start for start in streams.memories if start <= address)
    memory = streams.memories[start]
    name = expected.partition("*")[2]
    dtype = np.dtype({"void": "uint8", "bfloat16": ml_dtypes.bfloat16}.get(name, name))
    n = (start + memory.nbytes - address) // dtype.itemsize
    assert n > 0, f"no allocation contains {address:#x}"
    return ndarray((n,), dtype, streams.MemoryPointer(memory, address - start))


functions: weakref.WeakValueDictionary[int, Function] = weakref.WeakValueDictionary()
