"""The NumPy backend: NumPy ops on BLAS threads, and compiled kernels if Numba is installed.

With one token a step, products are bound by memory bandwidth, and the rest is call overhead.
Therefore these ops work in place and in few calls. With Numba the whole forward pass is one call
(`compiled.py`), and quantized weights stay quantized (`quantized.py`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from gptx.backends.base import Backend
from gptx.backends.cpu.interface.instructions import FLOAT32, GELU, GELU_NEW, RELU
from gptx.backends.cpu.memory import Pool, Recycler, allocate_aligned
from gptx.backends.graph import UnsupportedOp
from gptx.backends.positions import Positions
from gptx.errors import BackendError
from gptx.quantization import QuantizedTensor

Array = np.ndarray


MIN_ROWS = 32  # that are computed on threads: with fewer, calls cost more than threads gain


class NumpyBackend(Backend):
    """NumPy arrays. Memory-mapped float32 weights are used without a copy."""

    name = "numpy"
    has_threads = True
    dtypes = ("float32", "float64")  # NumPy emulates float16, one number at a time

    def __init__(self, **options: Any) -> None:
        if options.get("device") not in (None, "cpu"):
            raise BackendError(
                f"device is {options['device']!r}, expected 'cpu' for the numpy backend"
            )
        super().__init__(np, **options)
        self._has_quantized_weights = False
        self._weights = Pool()
        self.recycler = Recycler()

    @property
    def on_rows(self) -> Any:
        """The ops on many rows, imported when they are first used."""
        from gptx.backends.cpu.training.ops import TrainingOps

        return TrainingOps(self)

    def override(self, name: str) -> Callable[..., Any] | None:
        if self.is_generic:
            return None
        return super().override(name) or getattr(self.on_rows, name, None)

    @cached_property
    def _has_kernels(self) -> bool:
        """True if Numba is installed, whose code the modules of this package run for float32."""
        return self.dtype == "float32" and importlib.util.find_spec("numba") is not None

    def has_many_rows(self, x: Array) -> bool:
        """Test for enough rows to split."""
        return x.size >= MIN_ROWS * x.shape[-1] and x.dtype == self.float_dtype

    def is_compiled(self) -> bool:
        if not self._has_kernels:
            return False
        from gptx.backends.cpu import machine_code
        from gptx.backends.cpu.interface.variant import variant_name

        return machine_code.is_compiled(variant_name([FLOAT32], self.cache_dtype == "float16"))

    def compile(self, forward: Callable[..., Array], model: Any) -> Callable[..., Array]:
        # Quantized weights have loaded the kernels already.
        worthwhile = self.compiles or self._has_quantized_weights
        if worthwhile and self._has_kernels:
            from gptx.backends.cpu.compiled import CompiledForward

            try:
                return CompiledForward(forward, model, self.threads)
            except UnsupportedOp:  # the forward pass is not GPT-2's
                pass
        return super().compile(forward, model)

    def pack_quantized(self, q: QuantizedTensor, *, table: bool = False) -> Any:
        if self._has_kernels:
            from gptx.backends.cpu.quantized import QuantizedWeight

            self._has_quantized_weights = True
            return QuantizedWeight(q, self._weights, self.threads)
        return super().pack_quantized(q, table=table)

    def embed(self, ids: Array, table: Any) -> Array:
        self.recycler.next_pass()
        return super().embed(ids, table) if isinstance(table, Array) else table.take_rows(ids)

    def unembed(self, x: Array, table: Any) -> Array:
        if isinstance(table, Array):
            return super().unembed(x, table)
        return table.multiply(x, None, self.threads)

    def asarray(self, host: Array, dtype: str | None = None) -> Array:
        return np.asarray(
            host, dtype=(dtype or self.dtype) if host.dtype.kind == "f" else self.int_dtype
        )

    def to_numpy(self, x: Array) -> Array:
        return x

    def zeros(self, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        return allocate_aligned(shape, dtype or self.dtype, np.zeros)

    def linear(self, x: Array, weight: Any, bias: Array) -> Array:
        if not isinstance(weight, Array):
            return weight.multiply(x, bias, self.threads)
        if self.has_many_rows(x):
            return self.on_rows.linear_rows(x, weight, bias)
        if len(x) > 1:  # one GEMM over all rows; NumPy would loop over B
            y = (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], -1)
        else:
            y = x @ weight
        y += bias
        return y

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        if self.has_many_rows(x):
            return self.on_rows.layer_norm_rows(x, weight, bias, eps)
        n = x.shape[-1]
        y = x - np.add.reduce(x, axis=-1, keepdims=True) / n
        y /= np.sqrt(np.vecdot(y, y)[..., None] / n + eps)
        y *= weight
        y += bias
        return y

    def gelu_new(self, x: Array) -> Array:
        if self.has_many_rows(x):
            return self.on_rows.activate_rows(GELU_NEW, x)
        y = x * x
        y *= 0.044715 * math.sqrt(2 / math.pi)
        y += math.sqrt(2 / math.pi)
        y *= x
        np.tanh(y, out=y)
        y += 1.0
        y *= x
        y *= 0.5
        return y

    def gelu(self, x: Array) -> Array:
        return self.on_rows.activate_rows(GELU, x) if self.has_many_rows(x) else super().gelu(x)

    def relu(self, x: Array) -> Array:
        if self.has_many_rows(x):
            return self.on_rows.activate_rows(RELU, x)
        return np.maximum(x, 0.0)

    def softmax(self, x: Array) -> Array:
        return _softmax(x.copy())

    def largest(self, x: Array, n: int) -> Array:
        # A sort of the whole vocabulary takes as long as a decode step of a small model.
        found = np.argpartition(x, x.shape[-1] - n, axis=-1)[:, x.shape[-1] - n :]
        order = np.argsort(-np.take_along_axis(x, found, axis=-1), axis=-1)
        return np.take_along_axis(found, order, axis=-1)

    def update_kv(self, buffer: Array, new: Array, positions: Positions) -> Array:
        if positions.aligned:
            buffer[positions.rows, :, positions.stop - new.shape[2] : positions.stop] = new
        else:
            rows = np.arange(len(buffer))[positions.rows][:, None]
            buffer[rows, :, positions.index] = new.transpose(0, 2, 1, 3)
        return buffer

    def attention(self, q: Array, k: Array, v: Array, positions: Positions, scale: float) -> Array:
        B, H, T, D = q.shape
        if B * T >= MIN_ROWS and positions.has_only_new(k):
            return self.on_rows.attention_rows(q, k, v, scale)
        scores = (q * scale) @ k.swapaxes(-1, -2)
        if T > 1 or not positions.aligned:  # a single aligned token attends to all positions
            hidden = np.arange(k.shape[2]) > positions.index[:, None, :, None]
            np.copyto(scores, -math.inf, where=hidden)
        heads = _softmax(scores) @ v
        return heads.swapaxes(1, 2).reshape(B, T, H * D)


def _softmax(x: Array) -> Array:
    """Return the softmax over the last axis, computed in place."""
    x -= np.maximum.reduce(x, axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= np.add.reduce(x, axis=-1, keepdims=True)
    return x
