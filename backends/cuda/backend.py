"""CuPy: NVIDIA GPUs.

The forward pass is compiled (`cupy_step.py`): kernels of our own, a pass as one CUDA graph. The ops
here run where it is not, and where the generic forms would get wrong or would read the
device for what they do; the array-API names come from array_api_compat.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat.cupy as xp
import cupy
import cupyx
import numpy as np

from gptx.backends.base import Array, Backend, NextTokens
from gptx.backends.cuda.capture import TURNS
from gptx.backends.cuda.compiled import CompiledForward
from gptx.backends.cuda.compiler import ROW, TYPES, Kinds, kernel
from gptx.backends.cuda.host_copy import HostCopies, HostCopy
from gptx.backends.cuda.out_of_memory import out_of_memory
from gptx.backends.cuda.quantized import QuantizedWeight
from gptx.backends.cuda.sampler import CupySampler
from gptx.backends.fusion import ACTIVATIONS
from gptx.backends.graph import UnsupportedOp
from gptx.backends.positions import Positions
from gptx.errors import BackendError
from gptx.quantization import QuantizedTensor


class CupyBackend(Backend):
    """CuPy arrays on one CUDA device; `device` is its number (default: the current one).

    Work is in the order of CuPy's current stream: threads that share a model have to share that,
    as they do unless CuPy is told otherwise.

    Attributes
    ----------
    early
        Whether kernels of a graph may begin before the one ahead has ended, where the device can do
        that (`cupy_early.py`); None: if it is faster.
    most_in_graph
        Multiplications of the matrix unit in a layer up to which a prompt is a CUDA graph. The host
        takes some 200 µs to launch a layer one by one; above this, cuBLAS, which cannot be in a
        graph, gains more. An estimate, until a GPU has shown it.
    """

    name = "cupy"
    asynchronous = True
    warm_up = 1 + 2 * TURNS  # kernels are loaded; then graphs take turns
    early: bool | None = None
    most_in_graph = 4 * 10**10
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
        self.kinds = Kinds(self.dtype, self.cache_dtype, device=device)
        self._arrivals = HostCopies()
        self._has_kernels = self.dtype in TYPES and self.cache_dtype in TYPES

    def compile(self, forward: Callable[..., Array], model: Any) -> Callable[..., Array]:
        if self.compiles and self._has_kernels:
            try:
                return CompiledForward(forward, model)
            except (
                UnsupportedOp
            ):  # a forward pass of someone's own, or widths that kernels do not take
                pass
        return super().compile(forward, model)

    def decode(
        self,
        model: Any,
        ids: Array,
        positions: Positions,
        cache: Any,
        sampler: Any,
        *,
        logprobs: bool = False,
    ) -> NextTokens:
        if not isinstance(model.forward, CompiledForward):
            return super().decode(model, ids, positions, cache, sampler, logprobs=logprobs)
        sample = functools.partial(self.sample, sampler=sampler, logprobs=logprobs)
        return model.forward.decode(ids, positions, cache, sample)

    def pack_weight(self, host: np.ndarray) -> Array:
        # Outputs one after the other, each with its inputs together: what the kernels read.
        return cupy.asfortranarray(self.asarray(host))

    def pack_quantized(self, q: QuantizedTensor, *, table: bool = False) -> Any:
        if self._has_kernels:
            return QuantizedWeight.of(q, self.kinds)
        return super().pack_quantized(q, table=table)

    def embed(self, ids: Array, table: Any) -> Array:
        if isinstance(table, QuantizedWeight):
            rows = table.rows(ids.reshape(-1)).floats()
            return rows.reshape(*ids.shape, table.shape[1])
        return super().embed(ids, table)

    def linear(self, x: Array, weight: Any, bias: Array) -> Array:
        if isinstance(weight, QuantizedWeight):
            weight = weight.floats().T
        return super().linear(x, weight, bias)

    def unembed(self, x: Array, table: Any) -> Array:
        return super().unembed(x, table.floats() if isinstance(table, QuantizedWeight) else table)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        if not self._has_kernels:
            return super().layer_norm(x, weight, bias, eps)
        x = cupy.ascontiguousarray(x)
        out = cupy.empty_like(x)
        n = x.shape[-1]
        launch = kernel("rows.cu", "layer_norm", self.kinds)
        launch((x.size // n,), ROW, x, weight, bias, np.float32(eps), out, np.int32(n))
        return out

    def gelu_new(self, x: Array) -> Array:
        return self._activation("gelu_new", x)

    def gelu(self, x: Array) -> Array:
        return self._activation("gelu", x)

    def _activation(self, name: str, x: Array) -> Array:
        if not self._has_kernels:
            return getattr(super(), name)(x)
        x = cupy.ascontiguousarray(x)
        out = cupy.empty_like(x)
        number = np.int32(1 + ACTIVATIONS.index(name))
        launch = kernel("rows.cu", "activate", self.kinds)
        launch((-(-x.size // ROW[0]),), ROW, x, out, np.int64(x.size), number)
        return out

    def update_kv(self, buffer: Array, new: Array, positions: Positions) -> Array:
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
        q, k, v = (a.astype(self.accumulation_dtype, copy=False) for a in (q, k, v))
        scores = (q * scale) @ k.swapaxes(-1, -2)
        hidden = cupy.arange(k.shape[2]) > positions.index[:, None, :, None]
        heads = self.softmax(cupy.where(hidden, self.accumulation_dtype(-math.inf), scores)) @ v
        return heads.swapaxes(1, 2).reshape(B, T, H * D).astype(self.float_dtype, copy=False)

    def asarray(self, host: np.ndarray, dtype: str | None = None) -> Array:
        if host.dtype.kind == "f":
            wanted = getattr(self.xp, dtype or self.dtype)
            return cupy.asarray(self._host_float(host, dtype)).astype(wanted, copy=False)
        return cupy.asarray(host, dtype=self.int_dtype)

    def sampler(
        self, params: Any, prompts: list[list[int]], streams: list[int], vocab_size: int
    ) -> CupySampler | None:
        if self.dtype == "float64":  # its logits are, too
            return None
        return CupySampler(self.kinds, self._arrivals, params, prompts, streams, vocab_size)

    def copy_to_host_async(self, x: Array) -> Any:
        if x.dtype.kind not in "fiub":
            return x
        host = cupyx.empty_pinned(x.shape, x.dtype)
        x.get(out=host, blocking=False)
        return self._arrivals.expect(host)

    def to_numpy(self, x: Any) -> np.ndarray:
        if isinstance(x, HostCopy):
            x.arrived.synchronize()
            return x.host.copy()  # the sampler writes there again
        if x.dtype.kind not in "fiub":  # bfloat16 is a type of ml_dtypes to NumPy
            x = x.astype(cupy.float32)
        return cupy.asnumpy(x)

    def zeros(self, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        return cupy.zeros(shape, dtype=getattr(self.xp, dtype or self.dtype))

    def synchronize(self) -> None:
        self.device.synchronize()

    def device_name(self) -> str:
        return str(cupy.cuda.runtime.getDeviceProperties(self.device.id)["name"].decode())

    def peak_memory(self) -> int:
        """Bytes that CuPy's pool has taken from the device; it does not shrink by itself."""
        with self.device:
            return int(cupy.get_default_memory_pool().total_bytes())

    @contextmanager
    def scope(self) -> Iterator[None]:
        try:
            with self.device:
                yield
        except Exception as error:
            with self.device:
                problem = out_of_memory(error)
            if problem is None:
                raise
            raise problem from error


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
