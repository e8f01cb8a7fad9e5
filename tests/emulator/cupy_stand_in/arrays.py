"""CuPy's arrays and functions, made of NumPy's.

They reject what CuPy rejects: arrays of NumPy, and keywords that only NumPy has.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tests.emulator.cupy_stand_in.signatures import METHODS, parse
from tests.emulator.cupy_stand_in.streams import (
    DeferredCopy,
    Device,
    MemoryPointer,
    current,
    get_current_stream,
    reject_in_capture,
)


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array in the memory of a device."""

    def __init__(
        self,
        shape: Any,
        dtype: Any = float,
        memptr: MemoryPointer | None = None,
        strides: Any = None,
        order: str = "C",
    ) -> None:
        dtype = np.dtype(dtype)
        shape = (operator.index(shape),) if not isinstance(shape, tuple | list) else tuple(shape)
        size = int(np.prod(shape)) * dtype.itemsize
        if memptr is None:
            memptr = current.allocators[-1](size)
        offset = memptr.ptr - memptr.mem.ctypes.data
        self.data = memptr
        self.host: np.ndarray = np.ndarray(shape, dtype, memptr.mem, offset, strides, order)
        self.device = Device()

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides", "flags"):
            return getattr(self.host, name)
        raise AttributeError(f"the stand-in's array has no attribute {name!r}")

    @property
    def T(self) -> ndarray:
        """Axes reversed."""
        return wrap(self.host.T, self)

    def __len__(self) -> int:
        return len(self.host)

    def __getitem__(self, key: Any) -> ndarray:
        return wrap(self.host[unwrap(key)], self)

    def __setitem__(self, key: Any, value: Any) -> None:
        reject_in_capture()
        self.host[unwrap(key)] = unwrap(value)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__" or set(options) - {"out", "dtype", "casting"}:
            return NotImplemented
        return apply(multiply_matrices if ufunc is np.matmul else ufunc, inputs, options)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use .get()")

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> np.ndarray:
        """Copy to the host; a copy that does not block holds garbage until it is synchronized."""
        reject_in_capture()
        result = np.empty_like(self.host, order=order) if out is None else out
        if (result.shape, result.dtype) != (self.shape, self.dtype):
            raise ValueError(f"{self.dtype} {self.shape} into {result.dtype} {result.shape}")
        stream = stream or get_current_stream()
        stream.pending_copies.append(DeferredCopy(self.host.copy(), result))
        if blocking:
            stream.synchronize()
        return result

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        """Copy an array of the host to this array."""
        reject_in_capture()
        if not isinstance(arr, np.ndarray) or arr.dtype != self.dtype:
            raise TypeError(f"set() takes a NumPy array of {self.dtype}")
        if arr.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        self.host[...] = arr

    def fill(self, value: Any) -> None:
        """Set every element."""
        self[...] = value

    def item(self) -> Any:
        """Return the only element, on the host."""
        return self.get().item()

    def tolist(self) -> Any:
        """Return nested lists, on the host."""
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __index__(self) -> int:
        return operator.index(self.get())


def wrap(x: Any, *sources: ndarray) -> Any:
    """Convert NumPy arrays to device arrays: views of the sources' memory, or copies."""
    if isinstance(x, tuple | list):
        return type(x)(wrap(item, *sources) for item in x)
    if not isinstance(x, np.ndarray | np.generic):
        return x
    x = np.asarray(x)
    for source in sources:
        memory, start = source.data.mem, x.ctypes.data - source.data.mem.ctypes.data
        if x.size and 0 <= start < memory.nbytes:
            return ndarray(x.shape, x.dtype, MemoryPointer(memory, start), x.strides)
    reject_in_capture()
    is_fortran = x.flags.f_contiguous and not x.flags.c_contiguous
    new = ndarray(x.shape, x.dtype, order="F" if is_fortran else "C")
    new.host[...] = x
    return new


def unwrap(x: Any) -> Any:
    """Convert device arrays to NumPy arrays; reject arguments that are NumPy arrays."""
    if isinstance(x, ndarray):
        return x.host
    if isinstance(x, tuple | list):
        return type(x)(unwrap(item) for item in x)
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    return x


def apply(function: Callable[..., Any], args: Any, options: dict[str, Any]) -> Any:
    """Call a function of NumPy with device arrays."""
    sources = [x for x in args if isinstance(x, ndarray)]
    out = options.get("out")
    options = {name: unwrap(x) for name, x in options.items()}
    result = function(*(unwrap(x) for x in args), **options)
    if out is not None:
        reject_in_capture()
        return out[0] if isinstance(out, tuple) else out
    return wrap(result, *sources)


def multiply_matrices(a: np.ndarray, b: np.ndarray, out: Any = None) -> np.ndarray:
    """Multiply like cuBLAS: sums in float32 or wider, bfloat16 in 2-D only, never in a capture."""
    reject_in_capture()
    if a.dtype != b.dtype:
        a, b = (x.astype(np.result_type(a, b)) for x in (a, b))
    if a.dtype == ml_dtypes.bfloat16 and max(a.ndim, b.ndim) > 2:
        raise TypeError("No matching signature found for a batched matmul of bfloat16")
    wide = a.dtype if a.dtype.itemsize > 2 else np.float32
    product = np.matmul(a.astype(wide, copy=False), b.astype(wide, copy=False))
    return product.astype(a.dtype, copy=False)


def make_function(line: str) -> Callable[..., Any]:
    """Wrap a function of NumPy; check its arguments by CuPy's signature."""
    name, signature = parse(line)

    def call(*args: Any, **options: Any) -> Any:
        signature.bind(*args, **options)  # raises TypeError
        return apply(getattr(np, name), args, options)

    return call


def make_ufunc(name: str) -> Callable[..., Any]:
    """Wrap a universal function of NumPy."""

    def call(*args: Any, out: Any = None, dtype: Any = None) -> Any:
        options = {"out": out, "dtype": dtype}
        return apply(getattr(np, name), args, {n: x for n, x in options.items() if x is not None})

    return call


def make_method(line: str) -> Callable[..., Any]:
    """Wrap a method of NumPy's arrays; check its arguments by CuPy's signature."""
    name, signature = parse(line)

    def call(self: ndarray, *args: Any, **options: Any) -> Any:
        signature.bind(*args, **options)
        return wrap(getattr(self.host, name)(*unwrap(args), **unwrap(options)), self)

    return call


for line in METHODS.strip().splitlines():
    setattr(ndarray, parse(line)[0], make_method(line))


def asarray(
    a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None, blocking: bool = False
) -> ndarray:
    """Return a device array; copy if necessary."""
    host = a.host if isinstance(a, ndarray) else np.asarray(a)
    result = np.asarray(host, dtype, order, copy=copy)
    if not isinstance(a, ndarray):
        reject_in_capture()
        return wrap(result)
    return a if result is host else wrap(result, a)


def array(
    obj: Any,
    dtype: Any = None,
    copy: bool = True,
    order: Any = "K",
    subok: bool = False,
    ndmin: int = 0,
    *,
    blocking: bool = False,
) -> ndarray:
    """Return a new device array."""
    return asarray(obj, dtype, order, copy=copy or None)


def asnumpy(
    a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True
) -> np.ndarray:
    """Return a NumPy array."""
    if isinstance(a, ndarray):
        return a.get(stream, order, out, blocking)
    return np.asarray(a)


def ascontiguousarray(a: ndarray, dtype: Any = None) -> ndarray:
    """Return an array in C order."""
    return asarray(a, dtype, "C")


def asfortranarray(a: ndarray, dtype: Any = None) -> ndarray:
    """Return an array in Fortran order."""
    return asarray(a, dtype, "F")


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    """Return an array that holds garbage."""
    return ndarray(shape, dtype, order=order)


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    """Return an array of one value."""
    new = ndarray(shape, np.asarray(fill_value).dtype if dtype is None else dtype, order=order)
    new.fill(fill_value)
    return new


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    """Return zeros."""
    return full(shape, 0, dtype, order)


def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    """Return ones."""
    return full(shape, 1, dtype, order)


def empty_like(
    prototype: ndarray, dtype: Any = None, order: str = "K", subok: None = None, shape: Any = None
) -> ndarray:
    """Return an array of the same layout that holds garbage."""
    like = np.empty_like(prototype.host, dtype, order, shape=shape)
    return ndarray(like.shape, like.dtype, strides=like.strides)


def zeros_like(
    a: ndarray, dtype: Any = None, order: str = "K", subok: None = None, shape: Any = None
) -> ndarray:
    """Return zeros of the same layout."""
    new = empty_like(a, dtype, order, subok, shape)
    new.fill(0)
    return new


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    """Return evenly spaced numbers."""
    return wrap(
        np.arange(0 if stop is None else start, start if stop is None else stop, step, dtype)
    )


def matmul(x1: ndarray, x2: ndarray) -> ndarray:
    """Multiply matrices."""
    return x1 @ x2


def empty_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
    """cupyx.empty_pinned: page-locked memory of the host."""
    return np.empty(shape, dtype, order)


def erf(x: ndarray) -> ndarray:
    """cupyx.scipy.special.erf."""
    return wrap(np.vectorize(math.erf, otypes=[x.dtype])(x.host))
