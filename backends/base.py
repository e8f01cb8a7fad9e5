"""The generic backend: every op of the model, in the Python array API only.

These definitions are the reference. A faster backend overrides an op by name, with the same
signature and meaning, and is tested against the definition here. This file is not tuned for speed.

Shapes: B sequences, T new tokens, S cache positions, H heads, D head width, C = H·D = n_embd,
V vocabulary. Standard: https://data-apis.org/array-api/2024.12
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np

from gptx.backends.positions import Positions
from gptx.errors import BackendError, DeviceOutOfMemory, argument
from gptx.process import ForkSafeLock
from gptx.quantization import QuantizedTensor, dequantize

Array = Any  # an array of the backend's namespace

# Held while a backend uses its number of BLAS threads, which is one setting of the process.
_blas_lock = ForkSafeLock()

OPS = (
    "embed",
    "linear",
    "unembed",
    "layer_norm",
    "gelu_new",
    "gelu",
    "relu",
    "split_heads",
    "update_kv",
    "attention",
    "softmax",
)
# Methods whose overrides `generic=True` turns off.
OVERRIDABLE = (
    *OPS,
    "pack_weight",
    "pack_quantized",
    "is_compiled",
    "compile",
    "sampler",
    "decode",
    "largest",
)


class NextTokens(NamedTuple):
    """The next token of each of B sequences, on the device and copied to the host.

    Attributes
    ----------
    ids
        Token ids [B] on the device; -1 where a logit is not finite.
    host_ids
        The copy of `ids` to the host, as `Backend.copy_to_host_async` returns it.
    logprobs, host_logprobs
        Log-probabilities [B, 1 + N] of the tokens and of the N most probable ones, and their copy
        to the host; None without logprobs.
    top_ids, host_top_ids
        Token ids [B, N] of the most probable ones, and their copy to the host; None if N is 0.
    """

    ids: Array
    host_ids: Any
    logprobs: Array | None = None
    host_logprobs: Any = None
    top_ids: Array | None = None
    host_top_ids: Any = None


class HostTokens(NamedTuple):
    """The next token of each of B sequences, on the host.

    Attributes
    ----------
    ids
        Token ids [B].
    logprobs
        Log-probability of each token, in nats; None if not requested.
    top_logprobs
        For each sequence: token id -> log-probability, of the N most probable tokens in descending
        order; None if N is 0. The value of a chosen token is the same float in both.
    """

    ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None


class Backend:
    """Every op in the array API only, and the runtime for them.

    Parameters
    ----------
    xp
        Array-API namespace.
    dtype
        Type of weights and activations. Norms and softmax are computed in float32, or in float64
        if `dtype` is float64.
    device
        Device of the namespace; None is its default.
    threads
        Number of threads of BLAS and of the backend's own kernels; None leaves it to them.
    generic
        Turn off every override of a subclass.
    compile
        Let `compile` compile the forward pass.
    cache_dtype
        Type of keys and values in the cache: `dtype` (None), or "float16".

    Attributes
    ----------
    name
        Name in the registry, for messages and results.
    dtypes
        Values of `dtype` that the backend supports.
    has_threads
        True if the backend takes `threads`.
    asynchronous
        True if ops return before the device has computed them.
    survives_fork
        False if a forked child cannot use the library after its parent has (see `mark_used`).
    warm_up
        Number of calls before the same call takes its usual time.
    is_generic
        True if every override is turned off.
    accumulation_dtype
        Type of sums over a row: float32 or float64.
    float_dtype, int_dtype
        The namespace's types of floats (`dtype`) and of indices.
    on_device
        Keywords with which the namespace makes an array on the device.

    Raises
    ------
    BackendError
        The namespace or the backend does not support an option.
    """

    name = "generic"
    dtypes: tuple[str, ...] = ("float32", "float64", "float16", "bfloat16")
    has_threads = False
    asynchronous = False
    survives_fork = True
    warm_up = 1
    is_generic = False

    _used_by: ClassVar[dict[str, int]] = {}  # name of a backend -> process that has used it

    def __init__(
        self,
        xp: Any,
        *,
        dtype: str = "float32",
        device: Any = None,
        threads: int | None = None,
        generic: bool = False,
        compile: bool = True,
        cache_dtype: str | None = None,
    ) -> None:
        if dtype not in self.dtypes or not hasattr(xp, dtype):
            raise BackendError(
                f"{argument('dtype')} is {dtype!r}, the {self.name} backend computes in "
                f"{', '.join(d for d in self.dtypes if hasattr(xp, d))} "
                "(weights stored in another type are converted)"
            )
        if threads is not None and not self.has_threads:
            raise BackendError(
                f"{argument('threads')} is {threads}, but the {self.name} backend has no setting "
                "for threads: omit it"
            )
        if cache_dtype not in (None, dtype, "float16") or not hasattr(xp, cache_dtype or dtype):
            raise BackendError(
                f"{argument('cache_dtype')} is {cache_dtype!r}, expected 'float16' (if the "
                f"library has it) or the {argument('dtype')}, {dtype!r}"
            )
        self.xp = xp
        self.dtype = dtype
        self.cache_dtype = cache_dtype or dtype
        self.device = device
        self.threads = threads
        self.compiles = compile
        self.float_dtype = getattr(xp, dtype)
        self.on_device = {} if device is None else {"device": device}  # MLX takes no such keyword
        try:
            # The default integers: some libraries index with no other type.
            self.int_dtype = xp.asarray(0, **self.on_device).dtype
        except Exception as error:  # each library raises another class
            raise BackendError(f"device is {device!r}, which does not exist ({error})") from error
        # Sums over a row lose too much precision in 16 bits.
        self.accumulation_dtype = xp.float64 if dtype == "float64" else xp.float32
        self._blas: Any = None
        if generic:
            self.__class__ = _generic_class(cast("Any", type(self)))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.dtype}>"

    def is_compiled(self) -> bool:
        """Test for kernels that `compile` finds on the disk, so that it takes no time."""
        return False

    def override(self, name: str) -> Callable[..., Any] | None:
        """Return this backend's faster version of a function that is defined outside of the class.

        Examples are the gradients (`gptx.backends.gradients`) and the optimizer. None if the
        backend has no method of this name, and for a backend with `generic=True`.
        """
        return None if self.is_generic else getattr(self, name, None)

    # Ops

    def embed(self, ids: Array, table: Array) -> Array:
        """Return the rows of `table` [N, C] for `ids` [B, T], [B, T, C]."""
        xp = self.xp
        rows = xp.take(table, xp.reshape(ids, (-1,)), axis=0)
        return xp.reshape(rows, (*ids.shape, table.shape[1]))

    def linear(self, x: Array, weight: Array, bias: Array) -> Array:
        """Return x [B, T, I] @ weight [I, O] + bias [O], [B, T, O]."""
        xp = self.xp
        # In two dimensions it is one product over all rows; in three, a loop over B.
        y = xp.matmul(xp.reshape(x, (-1, weight.shape[0])), weight) + bias
        return xp.reshape(y, (*x.shape[:-1], weight.shape[1]))

    def unembed(self, x: Array, table: Array) -> Array:
        """Return the logits: x [B, T, C] times the rows of `table` [V, C], [B, T, V].

        Their type is float32 or float64, their precision that of the backend's dtype: in bfloat16
        the largest ones may be equal.
        """
        xp = self.xp
        y = xp.matmul(xp.reshape(x, (-1, table.shape[1])), xp.matrix_transpose(table))
        return xp.astype(xp.reshape(y, (*x.shape[:-1], table.shape[0])), self.accumulation_dtype)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Return (x - mean) / sqrt(variance + eps) * weight + bias over the last axis of x."""
        xp = self.xp
        y = xp.astype(x, self.accumulation_dtype)
        y = y - xp.mean(y, axis=-1, keepdims=True)
        y = y / xp.sqrt(xp.mean(y * y, axis=-1, keepdims=True) + eps)
        return xp.astype(y, self.float_dtype) * weight + bias

    def gelu_new(self, x: Array) -> Array:
        """Return GELU in its tanh form (https://arxiv.org/abs/1606.08415, section 2)."""
        xp = self.xp
        y = xp.astype(x, self.accumulation_dtype)
        y = 0.5 * y * (1.0 + xp.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y)))
        return xp.astype(y, self.float_dtype)

    def gelu(self, x: Array) -> Array:
        """Return GELU in its exact form, x · Φ(x)."""
        y = self.xp.astype(x, self.accumulation_dtype)
        return self.xp.astype(y * self.normal_cdf(y), self.float_dtype)

    def normal_cdf(self, x: Array) -> Array:
        """Return Φ(x), the cumulative distribution of the standard normal distribution.

        The array API has no erf: this is formula 7.1.26 of Abramowitz and Stegun, with an error
        below 1.5e-7.
        """
        xp = self.xp
        z = xp.abs(x) * math.sqrt(0.5)
        t = 1.0 / (1.0 + 0.3275911 * z)
        p = t * (
            0.254829592
            + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
        )
        half_tail = 0.5 * p * xp.exp(-z * z)  # 1 - Φ(|x|)
        return xp.where(x < 0, half_tail, 1.0 - half_tail)

    def relu(self, x: Array) -> Array:
        """Return max(x, 0)."""
        return self.xp.where(x > 0, x, self.xp.zeros_like(x))

    def split_heads(self, qkv: Array, n_head: int) -> tuple[Array, Array, Array]:
        """Split [B, T, 3C] into queries, keys and values, each [B, H, T, D]."""
        xp = self.xp
        B, T, C3 = qkv.shape
        x = xp.reshape(qkv, (B, T, 3, n_head, C3 // 3 // n_head))
        x = xp.permute_dims(x, (2, 0, 3, 1, 4))  # [3, B, H, T, D]
        return x[0, ...], x[1, ...], x[2, ...]

    def update_kv(self, buffer: Array, new: Array, positions: Positions) -> Array:
        """Write `new` [B, H, T, D] to `buffer` [N, H, S, D] at `positions`; return the buffer.

        The buffer has N slots, and `positions.slots` those of the B sequences. The result is either
        `buffer`, changed in place, or a new array.
        """
        xp = self.xp
        S, T = buffer.shape[2], new.shape[2]
        first, last = positions.index[:, :1], positions.index[:, -1:]  # [B, 1]
        if positions.slots is not None:  # from B sequences to N slots
            row, n_new = np.zeros((2, buffer.shape[0]), np.int64)
            row[positions.slots] = np.arange(len(positions.slots))
            n_new[positions.slots] = 1
            sequence, has_new = self.asarray(row), self.asarray(n_new)[:, None] > 0
            new, first, last = (xp.take(x, sequence, axis=0) for x in (new, first, last))
            last = xp.where(has_new, last, first - 1)
        position = self.arange(S)[None, :]  # [1, S]
        source = xp.clip(position - first, 0, T - 1)[:, None, :, None]  # [N, 1, S, 1]
        source = xp.broadcast_to(source, buffer.shape)
        is_new = ((position >= first) & (position <= last))[:, None, :, None]
        return xp.where(is_new, xp.take_along_axis(new, source, axis=2), buffer)

    def attention(self, q: Array, k: Array, v: Array, positions: Positions, scale: float) -> Array:
        """Return causal attention, softmax(scale · q·kᵀ) · v, [B, T, H·D].

        q [B, H, T, D], k and v [B, H, S, D]. Each token attends to its own position and to those
        before it.
        """
        xp = self.xp
        B, H, T, D = q.shape
        scores = xp.matmul(q * scale, xp.matrix_transpose(k))  # [B, H, T, S]
        visible = self.visible(k, positions)  # [B, 1, T, S]
        scores = xp.where(visible, xp.astype(scores, self.accumulation_dtype), -math.inf)
        heads = xp.matmul(xp.astype(self.softmax(scores), self.float_dtype), v)  # [B, H, T, D]
        return xp.reshape(xp.permute_dims(heads, (0, 2, 1, 3)), (B, T, H * D))

    def visible(self, k: Array, positions: Positions) -> Array:
        """Return the causal mask of keys k [B, H, S, D]: booleans [B, 1, T, S], True to attend."""
        return self.arange(k.shape[2]) <= positions.index[:, None, :, None]

    def softmax(self, x: Array) -> Array:
        """Return exp(x) / sum(exp(x)) over the last axis."""
        xp = self.xp
        e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
        return e / xp.sum(e, axis=-1, keepdims=True)

    def log_softmax(self, x: Array) -> Array:
        """Return log(softmax(x)) over the last axis, in x's dtype."""
        xp = self.xp
        x = x - xp.max(x, axis=-1, keepdims=True)
        return x - xp.log(xp.sum(xp.exp(x), axis=-1, keepdims=True))

    def largest(self, x: Array, n: int) -> Array:
        """Return the indices of the n largest numbers of each row of x [B, V], [B, n].

        They are in descending order; of equal numbers, any may be first or left out.
        """
        return self.xp.argsort(-x, axis=-1)[:, :n]

    # Weights and the compiled forward pass

    def pack_weight(self, host: np.ndarray) -> Array:
        """Copy the weight [I, O] of a linear layer to the device, in the layout of `linear`."""
        return self.asarray(host)

    def pack_quantized(self, q: QuantizedTensor, *, table: bool = False) -> Any:
        """Copy a quantized matrix [O, I] to the device, as `linear`, `embed` and `unembed` take it.

        Here it becomes floats: [I, O] for a linear layer, [O, I] for a `table` of `embed` and
        `unembed`. A backend whose ops compute with quantized values overrides this and those ops.
        """
        w = dequantize(q)
        return self.asarray(w if table else w.T)

    def compile(self, forward: Callable[..., Array], model: Any) -> Callable[..., Array]:
        """Return `forward` (`gptx.model.forward`) with `model` as its first argument, compiled.

        Here it is not compiled. An override traces `forward` (see `gptx.backends.graph`). If the
        result has an attribute `skips_padding` that is true, a pass with `last_only` computes the
        new tokens of ragged sequences only (`Positions.counts`), so any may be batched.
        """
        # A copy: the model stores the result, so a reference to the model would be a cycle, which
        # keeps the weights in memory until Python's garbage collector runs.
        return functools.partial(forward, replace(model))

    # Decode steps: the engine calls `decode`, then `read_tokens`

    def sampler(
        self,
        params: Any,
        prompts: list[list[int]],
        streams: list[int],
        vocab_size: int,
        outputs: list[list[int]] | None = None,
    ) -> Any:
        """Return the backend's own sampler, or None, as here, for the generic one.

        Parameters and methods are those of `gptx.generation.sampling.Sampler`.
        """
        return None

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
        """Run one decode step: add a token to each sequence, and sample the token after it.

        Parameters
        ----------
        model
            A `gptx.model.Transformer`.
        ids
            Token ids [B] on the device: the newest token of each sequence.
        positions
            Positions of these tokens: `cache.extend([1] * B)`.
        sampler
            A sampler, see `sample`.
        logprobs
            Compute the log-probabilities of the new tokens, too.
        top_logprobs
            N: compute those of the N most probable tokens, too.
        """
        logits = model.forward(self.xp.reshape(ids, (-1, 1)), positions, cache)
        return self.sample(logits[:, -1, :], sampler, logprobs=logprobs, top_logprobs=top_logprobs)

    def sample(
        self, logits: Array, sampler: Any, *, logprobs: bool = False, top_logprobs: int = 0
    ) -> NextTokens:
        """Sample a token from each row of logits [B, V], and start the copies to the host.

        `sampler(logits)` returns token ids [B] on the device and their asynchronous copy to the
        host.
        """
        tokens = NextTokens(*sampler(logits))
        return self.with_logprobs(tokens, logits, top_logprobs) if logprobs else tokens

    def with_logprobs(self, tokens: NextTokens, logits: Array, top_logprobs: int = 0) -> NextTokens:
        """Return tokens [B] with their log-probabilities after logits [B, V], and N more.

        All values of a row are of one array: that of the token itself is the same float among the
        most probable ones.
        """
        xp, ids = self.xp, tokens.ids
        index, top_ids = xp.where(ids < 0, xp.zeros_like(ids), ids)[:, None], None
        if top_logprobs:
            top_ids = xp.astype(self.largest(logits, top_logprobs), ids.dtype)
            index = xp.concat([index, top_ids], axis=-1)
        picked = xp.take_along_axis(self.log_softmax(logits), index, axis=-1)
        host_top_ids = None if top_ids is None else self.copy_to_host_async(top_ids)
        return tokens._replace(
            logprobs=picked,
            host_logprobs=self.copy_to_host_async(picked),
            top_ids=top_ids,
            host_top_ids=host_top_ids,
        )

    def read_tokens(self, tokens: NextTokens) -> HostTokens:
        """Wait for the tokens of a step."""
        ids = self.to_numpy(tokens.host_ids).tolist()
        if tokens.logprobs is None:
            return HostTokens(ids)
        values = self.to_numpy(tokens.host_logprobs)
        logprobs = values[:, 0].tolist()
        if tokens.top_ids is None:
            return HostTokens(ids, logprobs)
        rows = zip(self.to_numpy(tokens.host_top_ids).tolist(), values.tolist(), strict=True)
        return HostTokens(
            ids, logprobs, [dict(zip(top, row[1:], strict=True)) for top, row in rows]
        )

    def keep_tokens(self, tokens: NextTokens, rows: list[int]) -> NextTokens:
        """Return the tokens of the sequences `rows` only."""
        index = self.asarray(np.asarray(rows))

        def keep(x: Array | None) -> tuple[Array | None, Any]:
            if x is None:
                return None, None
            kept = self.xp.take(x, index, axis=0)
            return kept, self.copy_to_host_async(kept)

        return NextTokens(*keep(tokens.ids), *keep(tokens.logprobs), *keep(tokens.top_ids))

    # Runtime

    def asarray(self, host: np.ndarray, dtype: str | None = None) -> Array:
        """Copy a NumPy array to the device, or share its memory if possible.

        Floats become `dtype` (default: the backend's), integers the library's default integers.
        """
        if host.dtype.kind == "f":
            wanted = getattr(self.xp, dtype or self.dtype)
            host = self._host_float(host, dtype)
            return self.xp.asarray(host, dtype=wanted, **self.on_device)
        return self.xp.asarray(host, dtype=self.int_dtype, **self.on_device)

    def _host_float(self, host: np.ndarray, dtype: str | None) -> np.ndarray:
        wanted = dtype or self.dtype
        return host if wanted == "bfloat16" else host.astype(wanted, copy=False)

    def to_numpy(self, x: Array) -> np.ndarray:
        """Copy an array, or a result of `copy_to_host_async`, to the host.

        It waits for the array. bfloat16 becomes float32.
        """
        if self.dtype == "bfloat16" and x.dtype == self.float_dtype:
            x = self.xp.astype(x, self.xp.float32)
        return np.from_dlpack(x)

    def copy_to_host_async(self, x: Array) -> Array:
        """Start to compute `x` and to copy it to the host; return an argument for `to_numpy`.

        `to_numpy` then waits for `x` only, not for later work of the device.
        """
        return x

    def zeros(self, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        """Return an array of zeros; the default dtype is the backend's."""
        return self.xp.zeros(shape, dtype=getattr(self.xp, dtype or self.dtype), **self.on_device)

    def arange(self, n: int) -> Array:
        """Return the integers 0 to n - 1, [n]."""
        return self.xp.arange(n, dtype=self.int_dtype, **self.on_device)

    def synchronize(self) -> None:
        """Wait for the device to finish its work; a lazy library may not have started all of it."""

    def peak_memory(self) -> int:
        """Return the peak memory of this process so far, in bytes."""
        return peak_resident_memory()

    def device_name(self) -> str:
        """Return the name of the device, for example "NVIDIA H200"; "" for the CPU or unknown."""
        return ""

    @classmethod
    def check_process(cls) -> None:
        """Check that this process can use the library.

        Raises
        ------
        BackendError
            A parent process used it before the fork that made this process.
        """
        used_by = Backend._used_by.get(cls.name)
        if used_by is not None and used_by != os.getpid():
            raise BackendError(
                f"the {cls.name} backend was used in process {used_by} before os.fork() made this "
                "process, in which it cannot compute: use it only after the fork, or start "
                "processes with multiprocessing's 'spawn'"
            )

    def mark_used(self) -> None:
        """Mark the library as used by this process: it has started threads or opened a device.

        For libraries that do not survive a fork. In a child they would wait forever, or fail.
        """
        if not self.survives_fork:
            Backend._used_by.setdefault(self.name, os.getpid())

    def scope(self) -> AbstractContextManager[None]:
        """Return a context manager for all calls: it sets the BLAS threads and the device.

        Raises
        ------
        BackendError
            This process cannot use the library, see `check_process`.
        DeviceOutOfMemory
            In place of the library's own error when memory runs out.
        """
        if not self.survives_fork:
            self.check_process()
        return self._scope()

    @contextmanager
    def _scope(self) -> Iterator[None]:
        try:
            # No warnings of a NaN or an infinity: the sampler reports them.
            with np.errstate(all="ignore"), self.blas_threads(self.threads):
                yield
        except MemoryError as error:
            if isinstance(error, DeviceOutOfMemory):
                raise
            raise DeviceOutOfMemory(
                f"out of memory on the {self.name} backend ({error}): "
                "use a smaller model, batch or context"
            ) from error

    @contextmanager
    def blas_threads(self, threads: int | None) -> Iterator[None]:
        """Set the number of threads of BLAS within the context; None leaves it unchanged."""
        if threads is None:
            yield
            return
        with _blas_lock:
            before = [library.get_num_threads() for library in self.blas_libraries()]
            try:
                self._set_blas([threads] * len(before), before)
                yield
            finally:
                self._set_blas(before, [threads] * len(before))

    def blas_libraries(self) -> list[Any]:
        """Return the loaded BLAS libraries whose number of threads can be set."""
        if self._blas is None:  # the search for them takes milliseconds
            import threadpoolctl

            found = threadpoolctl.ThreadpoolController().select(user_api="blas")
            self._blas = found.lib_controllers
        return self._blas

    def _set_blas(self, wanted: list[int], now: list[int]) -> None:
        # threadpoolctl's `limit()` takes 20 µs, too long for a decode step.
        for library, n, current in zip(self._blas, wanted, now, strict=True):
            if n != current:
                library.set_num_threads(n)


@functools.cache
def _generic_class(cls: Any) -> type[Backend]:
    """Return a subclass with the generic definition of every method of `OVERRIDABLE`."""
    methods = {name: getattr(Backend, name) for name in OVERRIDABLE}
    return type(cls.__name__, (cls,), {**methods, "is_generic": True})


def peak_resident_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; 0 if unknown."""
    try:
        # On Linux, ru_maxrss starts with the value of the parent process.
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
