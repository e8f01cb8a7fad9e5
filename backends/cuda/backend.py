"""The CuPy backend for NVIDIA GPUs.

`compiled.py` runs the forward pass. The ops here run without it: they override generic ops that
CuPy computes incorrectly, or that would synchronize with the device. Attention and the gradients
are in `training.py`. Array-API names come from array_api_compat.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat.cupy as xp
import cupy
import cupyx
import numpy as np

from gptx.backends.base import Array, NextTokens
from gptx.backends.cuda.capture import TIMED_LAUNCHES
from gptx.backends.cuda.compiled import CompiledForward
from gptx.backends.cuda.compiler import CUDA_TYPES, ROW_BLOCK, KernelVariant, kernel
from gptx.backends.cuda.host_copy import HostCopy, PendingCopies
from gptx.backends.cuda.out_of_memory import translate_out_of_memory
from gptx.backends.cuda.quantized import QuantizedWeight
from gptx.backends.cuda.sampler import CupySampler
from gptx.backends.cuda.training import TrainingOps
from gptx.backends.fusion import ACTIVATIONS
from gptx.backends.graph import UnsupportedOp
from gptx.backends.positions import Positions
from gptx.errors import BackendError, argument
from gptx.quantization import QuantizedTensor


class CupyBackend(TrainingOps):
    """CuPy arrays on one CUDA device.

    Work is ordered by CuPy's current stream. Threads that share a model have to use the same
    stream, as they do by default.

    Parameters
    ----------
    device
        Number of the CUDA device; None is the current device.

    Attributes
    ----------
    dependent_launch
        True or False: use programmatic dependent launch in graphs, or do not; None selects the
        faster.
    max_graph_macs
        Most multiply-accumulate operations of a layer for a prompt in a CUDA graph. The host needs
        about 200 µs to launch a layer. Above this (estimated) limit, cuBLAS without a graph saves
        more time.
    """

    name = "cupy"
    asynchronous = True
    survives_fork = False  # CUDA contexts do not
    warm_up = 1 + 2 * TIMED_LAUNCHES  # the first call loads kernels; the next ones time graphs
    dependent_launch: bool | None = None
    max_graph_macs = 4 * 10**10
    dtypes = ("float32", "float64", "float16", "bfloat16")

    def __init__(
        self, *, device: int | None = None, dtype: str = "float32", **options: Any
    ) -> None:
        self.mark_used()
        n_devices = _device_count()
        if device is None:
            device = cupy.cuda.Device().id
        if isinstance(device, bool) or not isinstance(device, int) or not 0 <= device < n_devices:
            raise BackendError(f"device is {device!r}, expected a number from 0 to {n_devices - 1}")
        super().__init__(_Namespace(), dtype=dtype, device=cupy.cuda.Device(device), **options)
        self.kernel_variant = KernelVariant(self.dtype, self.cache_dtype, device=device)
        self._pending_copies = PendingCopies()
        self.has_kernels = self.dtype in CUDA_TYPES and self.cache_dtype in CUDA_TYPES

    def compile(self, forward: Callable[..., Array], model: Any) -> Callable[..., Array]:
        if self.compiles and self.has_kernels:
            try:
                return CompiledForward(forward, model)
            except UnsupportedOp:  # a custom forward pass, or widths without kernels
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
        top_logprobs: int = 0,
    ) -> NextTokens:
        options: dict[str, Any] = {"logprobs": logprobs, "top_logprobs": top_logprobs}
        if not isinstance(model.forward, CompiledForward):
            return super().decode(model, ids, positions, cache, sampler, **options)
        sample = functools.partial(self.sample, sampler=sampler, **options)
        return model.forward.decode(ids, positions, cache, sample)

    def pack_weight(self, host: np.ndarray) -> Array:
        # Fortran order: the inputs of each output are consecutive, as in the kernels.
        return cupy.asfortranarray(self.asarray(host))

    def pack_quantized(self, q: QuantizedTensor, *, table: bool = False) -> Any:
        if self.has_kernels:
            return QuantizedWeight.from_host(q, self.kernel_variant)
        return super().pack_quantized(q, table=table)

    def embed(self, ids: Array, table: Any) -> Array:
        if isinstance(table, QuantizedWeight):
            rows = table.take_rows(ids.reshape(-1)).dequantize()
            return rows.reshape(*ids.shape, table.shape[1])
        return super().embed(ids, table)

    def linear(self, x: Array, weight: Any, bias: Array) -> Array:
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize().T
        return super().linear(x, weight, bias)

    def unembed(self, x: Array, table: Any) -> Array:
        if isinstance(table, QuantizedWeight):
            table = table.dequantize()
        return super().unembed(x, table)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        if not self.has_kernels:
            return super().layer_norm(x, weight, bias, eps)
        x = cupy.ascontiguousarray(x)
        out = cupy.empty_like(x)
        n = x.shape[-1]
        normalize = kernel("layer_norm.cu", "layer_norm", self.kernel_variant)
        normalize((x.size // n,), ROW_BLOCK, x, weight, bias, np.float32(eps), out, np.int32(n))
        return out

    def gelu_new(self, x: Array) -> Array:
        return self._activation("gelu_new", x)

    def gelu(self, x: Array) -> Array:
        return self._activation("gelu", x)

    def _activation(self, name: str, x: Array) -> Array:
        if not self.has_kernels:
            return getattr(super(), name)(x)
        x = cupy.ascontiguousarray(x)
        out = cupy.empty_like(x)
        number = np.int32(1 + ACTIVATIONS.index(name))
        activate = kernel("elementwise.cu", "activate", self.kernel_variant)
        activate((-(-x.size // ROW_BLOCK[0]),), ROW_BLOCK, x, out, np.int64(x.size), number)
        return out

    def update_kv(self, buffer: Array, new: Array, positions: Positions) -> Array:
        if positions.aligned:
            buffer[positions.rows, :, positions.stop - new.shape[2] : positions.stop] = new
        else:
            rows = cupy.arange(buffer.shape[0])[positions.rows][:, None]
            buffer[rows, :, positions.index] = new.transpose(0, 2, 1, 3)
        return buffer

    def asarray(self, host: np.ndarray, dtype: str | None = None) -> Array:
        if host.dtype.kind == "f":
            target = getattr(self.xp, dtype or self.dtype)
            return cupy.asarray(self._host_float(host, dtype)).astype(target, copy=False)
        return cupy.asarray(host, dtype=self.int_dtype)

    def sampler(
        self,
        params: Any,
        prompts: list[list[int]],
        streams: list[int],
        vocab_size: int,
        outputs: list[list[int]] | None = None,
    ) -> CupySampler | None:
        # The kernel reads float32 logits, and has no step `typical_p`.
        if self.dtype == "float64" or params.typical_p < 1:
            return None
        return CupySampler(
            self.kernel_variant, self._pending_copies, params, prompts, streams, vocab_size, outputs
        )

    def copy_to_host_async(self, x: Array) -> Any:
        if x.dtype.kind not in "fiub":
            return x
        host = cupyx.empty_pinned(x.shape, x.dtype)
        x.get(out=host, blocking=False)
        return self._pending_copies.track(host)

    def to_numpy(self, x: Any) -> np.ndarray:
        if isinstance(x, HostCopy):
            x.event.synchronize()
            return x.host.copy()  # the sampler reuses the memory
        if x.dtype.kind not in "fiub":  # bfloat16: NumPy has it only with ml_dtypes
            x = x.astype(cupy.float32)
        return cupy.asnumpy(x)

    def zeros(self, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        return cupy.zeros(shape, dtype=getattr(self.xp, dtype or self.dtype))

    def synchronize(self) -> None:
        self.device.synchronize()

    def device_name(self) -> str:
        return str(cupy.cuda.runtime.getDeviceProperties(self.device.id)["name"].decode())

    def peak_memory(self) -> int:
        """Return the bytes that CuPy's pool has allocated; the pool keeps freed memory."""
        with self.device:
            return int(cupy.get_default_memory_pool().total_bytes())

    @contextmanager
    def _scope(self) -> Iterator[None]:
        try:
            with self.device:
                yield
        except Exception as error:
            with self.device:
                problem = translate_out_of_memory(error)
            if problem is None:
                raise
            raise problem from error


class _Namespace:
    """The namespace array_api_compat.cupy, with bfloat16 of ml_dtypes."""

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
            f"CuPy {cupy.__version__} is installed, but no CUDA device is available ({error}): "
            f"check the driver with nvidia-smi, or use {argument('backend', 'numpy')}"
        ) from error
