"""CuPy: NVIDIA GPUs.

The ops here are the ones that the generic forms would get wrong or would read the device for; the
array-API names come from array_api_compat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy as np

from gptx.backends.base import Array, Backend, Positions
from gptx.errors import BackendError, DeviceOutOfMemory


class CupyBackend(Backend):
    """CuPy arrays on one CUDA device; `device` is its number (default: the current one)."""

    name = "cupy"
    dtypes = ("float32", "float64", "float16", "bfloat16")

    def __init__(
        self, *, device: int | None = None, dtype: str = "float32", **options: Any
    ) -> None:
        n_devices = _device_count()
        if device is None:
            device = cupy.cuda.Device().id
        if isinstance(device, bool) or not isinstance(device, int) or not 0 <= device < n_devices:
            raise BackendError(f"device is {device!r}, expected a number from 0 to {n_devices - 1}")
        super().__init__(_Namespace(), dtype=dtype, device=cupy.cuda.Device(device), **options)

    def gelu(self, x: Array) -> Array:
        from cupyx.scipy.special import erf

        y = x.astype(self.wide)
        return (y * 0.5 * (1.0 + erf(y * math.sqrt(0.5)))).astype(self.float)

    def write(self, buffer: Array, new: Array, positions: Positions) -> Array:
        if positions.aligned:
            buffer[:, :, positions.stop - new.shape[2] : positions.stop] = new
        else:
            rows = cupy.arange(buffer.shape[0])[:, None]
            buffer[rows, :, positions.index] = new.transpose(0, 2, 1, 3)
        return buffer

    def attention(self, q: Array, k: Array, v: Array, positions: Positions, scale: float) -> Array:
        # A matmul of more than two dimensions fails in bfloat16 and runs float16 as float32 in
        # CuPy 14.2: here both are computed in float32 outright.
        B, H, T, D = q.shape
        q, k, v = (a.astype(self.wide, copy=False) for a in (q, k, v))
        scores = (q * scale) @ k.swapaxes(-1, -2)
        hidden = cupy.arange(k.shape[2]) > positions.index[:, None, :, None]
        heads = self.softmax(cupy.where(hidden, self.wide(-math.inf), scores)) @ v
        return heads.swapaxes(1, 2).reshape(B, T, H * D).astype(self.float, copy=False)

    def asarray(self, host: np.ndarray, dtype: str | None = None) -> Array:
        if host.dtype.kind == "f":
            wanted = getattr(self.xp, dtype or self.dtype)
            return cupy.asarray(self._host_float(host, dtype)).astype(wanted, copy=False)
        return cupy.asarray(host, dtype=self.int)

    def to_numpy(self, x: Array) -> np.ndarray:
        if x.dtype.kind not in "fiub":  # bfloat16 is a type of ml_dtypes to NumPy
            x = x.astype(cupy.float32)
        return cupy.asnumpy(x)

    def zeros(self, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        return cupy.zeros(shape, dtype=self.float if dtype in (None, self.dtype) else dtype)

    def synchronize(self) -> None:
        self.device.synchronize()

    def peak_memory(self) -> int:
        """Bytes that CuPy's pool has taken from the device; it does not shrink by itself."""
        with self.device:
            return int(cupy.get_default_memory_pool().total_bytes())

    @contextmanager
    def scope(self) -> Iterator[None]:
        try:
            with self.device:
                yield
        except cupy.cuda.memory.OutOfMemoryError as error:
            with self.device:
                cupy.get_default_memory_pool().free_all_blocks()
                free, total = cupy.cuda.runtime.memGetInfo()
            raise DeviceOutOfMemory(
                f"memory ran out on CUDA device {self.device.id} ({error}; {free} of {total} bytes "
                "free): use a smaller model, batch or dtype"
            ) from error


class _Namespace:
    """array_api_compat.cupy, and bfloat16, which CuPy takes from ml_dtypes."""

    def __getattr__(self, name: str) -> Any:
        if name == "bfloat16":
            try:
                import ml_dtypes
            except ImportError:
                raise AttributeError(name) from None
            return ml_dtypes.bfloat16
        return getattr(xp, name)


def _device_count() -> int:
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(
            f"CuPy {cupy.__version__} is installed, but no CUDA device answers ({error}): "
            "check the driver with nvidia-smi, or use backend='numpy'"
        ) from error
