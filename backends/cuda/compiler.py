"""Compile the CUDA kernels of `kernels/*.cu` with NVRTC at their first use.

Each file is a separate module: device.cuh, activation.cuh, the file's own headers, then the file.
Macros select the types, so a kernel has one name for all types. CuPy caches compiled modules on
disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cupy

from gptx.backends.cuda import dependent_launch

KERNELS_FOLDER = Path(__file__).parent / "kernels"
HEADERS = ("device.cuh", "activation.cuh")
EXTRA_HEADERS = {
    "gemv.cu": ("gemv_input.cuh",),
    "layer_norm.cu": ("reductions.cuh",),
    "sampler.cu": ("philox.cuh",),
    "training_elementwise.cu": ("reductions.cuh", "philox.cuh"),
    "training_optimizer.cu": ("reductions.cuh",),
    "training_rows.cu": ("reductions.cuh",),
}
CUDA_TYPES = {"float32": "float", "float16": "half_t", "bfloat16": "bf16_t"}
ROW_BLOCK = (256,)  # threads of a block that computes one row
DEFAULT_SHARED_BYTES = 48 * 1024  # of a block, without a function attribute


class KernelVariant(NamedTuple):
    """The types and sizes that a kernel is compiled for.

    Attributes
    ----------
    dtype, cache_dtype
        Names of the types of activations, and of cached keys and values.
    head_dim
        D, the width of a head.
    bits, group_size
        Bits of a quantized value, and values in a group; 0 if weights have the type `dtype`.
    device
        Number of the CUDA device, which has to be the current device.
    """

    dtype: str
    cache_dtype: str = "float32"
    head_dim: int = 64
    bits: int = 0
    group_size: int = 0
    device: int = 0

    @property
    def array_dtype(self) -> Any:
        """The dtype of arrays of activations."""
        if self.dtype == "bfloat16":
            import ml_dtypes

            return ml_dtypes.bfloat16
        return getattr(cupy, self.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 4 if self.dtype == "float32" else 2

    def options(self, code: str) -> tuple[str, ...]:
        """Return compiler options that define the macros which `code` contains.

        Other macros are left out, so that variants with equal code share a compiled module.
        """
        macros = {
            "REAL": CUDA_TYPES[self.dtype],
            "CACHE": CUDA_TYPES[self.cache_dtype],
            "HEAD": self.head_dim,
            "BITS": self.bits,
            "GROUP": self.group_size,
        }
        return tuple(f"-D{name}={value}" for name, value in macros.items() if name in code)


def source(file: str) -> str:
    """Return the code of one module: the headers, then `file`."""
    names = *HEADERS, *EXTRA_HEADERS.get(file, ()), file
    return "\n".join((KERNELS_FOLDER / name).read_text(encoding="utf-8") for name in names)


@cache
def _module(file: str, variant: KernelVariant) -> Any:
    code = source(file)
    return cupy.RawModule(code=code, options=("-std=c++17", *variant.options(code)))


class Kernel:
    """One compiled kernel."""

    def __init__(self, file: str, name: str, variant: KernelVariant) -> None:
        self._function = _module(file, variant).get_function(name)
        self._max_shared_bytes = DEFAULT_SHARED_BYTES

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        *args: Any,
        shared_bytes: int = 0,
        dependent: bool = False,
    ) -> None:
        """Launch on the current stream.

        Parameters
        ----------
        grid, block
            Number of blocks, and of threads in a block, along x, y and z.
        args
            CuPy arrays for pointers (None for null); NumPy scalars of exactly the type that the
            kernel declares.
        shared_bytes
            Bytes of dynamic shared memory of a block.
        dependent
            Use programmatic dependent launch (see `dependent_launch.py`).
        """
        if shared_bytes > self._max_shared_bytes:
            self._function.max_dynamic_shared_size_bytes = shared_bytes
            self._max_shared_bytes = shared_bytes
        if dependent:
            stream = cupy.cuda.get_current_stream().ptr
            pointer = self._function.kernel.ptr
            dependent_launch.launch(pointer, grid, block, args, shared_bytes, stream)
        else:
            self._function(tuple(grid), tuple(block), args, shared_mem=shared_bytes)


@cache
def kernel(file: str, name: str, variant: KernelVariant) -> Kernel:
    """Return the kernel `name` of `kernels/<file>`, compiled for a variant."""
    return Kernel(file, name, variant)
