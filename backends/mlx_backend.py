"""The MLX backend: the GPU of Apple silicon, the CPU on other machines.

MLX (>= 0.32.3) has the names of the array API and lacks some keywords (`device=`, `copy=`). It is
lazy: `to_numpy` makes it compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from gptx.backends.base import Array
from gptx.backends.mlx_training import MlxTraining
from gptx.backends.positions import Positions
from gptx.errors import BackendError, DeviceOutOfMemory
from gptx.quantization import QuantizedTensor

MIN_VERSION = (0, 32, 3)


class QuantizedWeight(NamedTuple):
    """A quantized matrix [O, I]: the parts of a `QuantizedTensor` as MLX arrays."""

    weight: Array
    scales: Array
    biases: Array
    group_size: int
    bits: int

    def times(self, x: Array) -> Array:
        """Return x [..., I] times the matrix, [..., O]."""
        parts = self.weight, self.scales, self.biases
        return mx.quantized_matmul(x, *parts, group_size=self.group_size, bits=self.bits)

    def rows(self, ids: Array) -> Array:
        """Return the rows `ids` [B, T] as floats [B, T, I]."""
        weight, scales, biases = (
            mx.take(part, ids, axis=0) for part in (self.weight, self.scales, self.biases)
        )
        return mx.dequantize(weight, scales, biases, group_size=self.group_size, bits=self.bits)


class MlxBackend(MlxTraining):
    """MLX arrays; `device` is "cpu", "gpu" or None for the default of MLX."""

    name = "mlx"
    asynchronous = True
    survives_fork = False  # a child has none of MLX's threads, which the first evaluation starts
    dtypes = ("float32", "float16", "bfloat16")

    def __init__(self, *, device: str | None = None, **options: Any) -> None:
        version: str = vars(mx)["__version__"]
        numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
        if numbers < MIN_VERSION:  # the matrix_transpose of older versions reverses all axes
            raise BackendError(
                f"MLX {version} is too old, expected {'.'.join(map(str, MIN_VERSION))}: "
                "pip install --upgrade mlx"
            )
        if device not in (None, "cpu", "gpu"):
            raise BackendError(f"device is {device!r}, the mlx backend expects 'cpu' or 'gpu'")
        if device == "gpu" and not mx.is_available(mx.gpu):
            raise BackendError("device is 'gpu', but MLX finds no GPU: use 'cpu'")
        self._stream = mx.default_device() if device is None else mx.Device(getattr(mx, device))
        super().__init__(mx, **options)

    def embed(self, ids: Array, table: Array) -> Array:
        return table.rows(ids) if isinstance(table, QuantizedWeight) else super().embed(ids, table)

    def linear(self, x: Array, weight: Array, bias: Array) -> Array:
        if isinstance(weight, QuantizedWeight):
            return weight.times(x) + bias
        return super().linear(x, weight, bias)

    def unembed(self, x: Array, table: Array) -> Array:
        if isinstance(table, QuantizedWeight):
            return mx.astype(table.times(x), self.accumulation_dtype)
        return super().unembed(x, table)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return mx.fast.layer_norm(x, weight, bias, eps)

    def gelu(self, x: Array) -> Array:
        y = mx.astype(x, mx.float32)
        return mx.astype(y * 0.5 * (1.0 + mx.erf(y * math.sqrt(0.5))), self.float_dtype)

    def relu(self, x: Array) -> Array:
        return mx.maximum(x, 0.0)

    def softmax(self, x: Array) -> Array:
        return mx.softmax(x, axis=-1, precise=True)

    def update_kv(self, buffer: Array, new: Array, positions: Positions) -> Array:
        if positions.aligned:
            buffer[positions.rows, :, positions.stop - new.shape[2] : positions.stop] = new
        else:
            rows = mx.arange(buffer.shape[0])[positions.rows][:, None]
            buffer[rows, :, positions.index] = mx.permute_dims(new, (0, 2, 1, 3))
        return buffer

    def attention(self, q: Array, k: Array, v: Array, positions: Positions, scale: float) -> Array:
        B, H, T, D = q.shape
        mask: Any
        if positions.aligned:
            mask = "causal" if T > 1 else None
        else:
            mask = mx.arange(k.shape[2]) <= positions.index[:, None, :, None]
        heads = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return mx.permute_dims(heads, (0, 2, 1, 3)).reshape(B, T, H * D)

    def asarray(self, host: np.ndarray, dtype: str | None = None) -> Array:
        if host.dtype.kind == "f":
            return mx.array(self._host_float(host, dtype)).astype(getattr(mx, dtype or self.dtype))
        return mx.array(host.astype(np.int32))  # MLX's default integers

    def pack_quantized(self, q: QuantizedTensor, *, table: bool = False) -> Any:
        scales, biases = self.asarray(q.scales), self.asarray(q.offsets)
        return QuantizedWeight(mx.array(q.weight), scales, biases, q.group_size, q.bits)

    def to_numpy(self, x: Array) -> np.ndarray:
        self.mark_used()
        return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)

    def copy_to_host_async(self, x: Array) -> Array:
        self.mark_used()
        async_eval: Any = mx.async_eval  # MLX declares it without types
        async_eval(x)
        return x

    def zeros(self, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        return mx.zeros(shape, dtype=getattr(mx, dtype or self.dtype))

    def synchronize(self) -> None:
        self.mark_used()
        mx.synchronize(mx.default_stream(self._stream))

    def peak_memory(self) -> int:
        return int(mx.get_peak_memory())

    @contextmanager
    def _scope(self) -> Iterator[None]:
        try:
            with mx.stream(self._stream):
                yield
        except (MemoryError, RuntimeError) as error:
            text = str(error)
            if isinstance(error, DeviceOutOfMemory) or "alloc" not in text:
                raise
            raise DeviceOutOfMemory(
                f"out of memory on the mlx backend ({text.splitlines()[0]}): "
                "use a smaller model, batch or context"
            ) from error
