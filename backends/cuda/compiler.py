"""CUDA kernels: `cuda/*.cu`, compiled for the device at hand when they are first asked for.

CuPy keeps what it compiled on disk. Each file is a module of its own, after the two headers; macros
say which types it is compiled for, so that a kernel has one plain name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cupy

from gptx.backends.cuda import dependent_launch as cupy_early

FOLDER = Path(__file__).parent / "kernels"
HEADERS = ("device.cuh", "activation.cuh")
PARTS = {"gemv.cu": ("linear_input.cuh",)}  # further headers of a file
TYPES = {"float32": "float", "float16": "half_t", "bfloat16": "bf16_t"}
ROW = (256,)  # threads of a block that works on one row


class Kinds(NamedTuple):
    """What kernels are compiled for.

    Attributes
    ----------
    dtype, cache_dtype
        Names of the types of activations, and of cached keys and values.
    head
        D, the width of a head.
    bits, group
        Of a weight's codes and of its groups; 0 and 0 if weights are of the type `dtype`.
    device
        The number of the CUDA device, which has to be the current one.
    """

    dtype: str
    cache_dtype: str = "float32"
    head: int = 64
    bits: int = 0
    group: int = 0
    device: int = 0

    @property
    def real(self) -> Any:
        """The type of activations, as CuPy's arrays have it."""
        if self.dtype == "bfloat16":
            import ml_dtypes

            return ml_dtypes.bfloat16
        return getattr(cupy, self.dtype)

    def macros(self, code: str) -> tuple[str, ...]:
        """The compiler's options for the macros that `code` uses, and no others: files that differ
        in nothing are compiled once."""
        values = {
            "REAL": TYPES[self.dtype],
            "CACHE": TYPES[self.cache_dtype],
            "HEAD": self.head,
            "BITS": self.bits,
            "GROUP": self.group,
        }
        return tuple(f"-D{name}={value}" for name, value in values.items() if name in code)


def source(file: str) -> str:
    """The code of one module: the headers and `file` of the folder `cuda`."""
    names = *HEADERS, *PARTS.get(file, ()), file
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names)


@cache
def _module(file: str, kinds: Kinds) -> Any:
    code = source(file)
    return cupy.RawModule(code=code, options=("-std=c++17", *kinds.macros(code)))


class Kernel:
    """One kernel: called with its grid and block, and the arguments that its source names."""

    def __init__(self, file: str, name: str, kinds: Kinds) -> None:
        self._function = _module(file, kinds).get_function(name)
        self._shared_bytes = 48 * 1024  # what a block may have without being asked

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        *args: Any,
        shared_bytes: int = 0,
        early: bool = False,
    ) -> None:
        """Launch on the current stream.

        Parameters
        ----------
        grid, block
            Blocks, and threads of a block, along x, y and z.
        args
            CuPy arrays for pointers (None for a null one); NumPy scalars of the very type that the
            kernel declares.
        shared_bytes
            Dynamic shared memory of a block.
        early
            Let it begin before the kernel ahead has ended (see `cupy_early.py`).
        """
        if shared_bytes > self._shared_bytes:
            self._function.max_dynamic_shared_size_bytes = shared_bytes
            self._shared_bytes = shared_bytes
        if early:
            stream = cupy.cuda.get_current_stream().ptr
            pointer = self._function.kernel.ptr
            cupy_early.launch(pointer, grid, block, args, shared_bytes, stream)
        else:
            self._function(tuple(grid), tuple(block), args, shared_mem=shared_bytes)


@cache
def kernel(file: str, name: str, kinds: Kinds) -> Kernel:
    """A kernel by its file in the folder `cuda` and its name, compiled for `kinds`."""
    return Kernel(file, name, kinds)
