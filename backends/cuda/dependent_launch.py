"""Programmatic dependent launch: overlap the start of a kernel with the end of the one before it.

It needs compute capability 9.0. The blocks of a kernel become resident when all blocks of the
kernel before it have called `trigger_dependent_launch` or ended. They load data that no kernel
writes, and wait in `grid_dependency_sync` (`kernels/device.cuh`) until the kernel before has ended
and its writes are visible. CuPy has no such launches, so this module calls the CUDA driver.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import cupy
import numpy as np

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # enum CUlaunchAttributeID in cuda.h
MIN_COMPUTE_CAPABILITY = 90


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("n_attributes", ctypes.c_uint),
    )


class LaunchRejected(RuntimeError):
    """The driver supports programmatic dependent launch, but rejects this launch."""


@cache
def driver() -> Any:
    """Return the CUDA driver's library, or None if it is older than CUDA 11.8."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        launch = library.cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    pointer = ctypes.c_void_p
    launch.argtypes = ctypes.POINTER(LaunchConfig), pointer, pointer, pointer
    launch.restype = ctypes.c_int
    return library


def is_supported() -> bool:
    """Return True if the current device and its driver support such launches."""
    capability = int(cupy.cuda.Device().compute_capability)
    return capability >= MIN_COMPUTE_CAPABILITY and driver() is not None


def launch(
    function: int,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    shared_bytes: int,
    stream: int,
) -> None:
    """Launch a kernel on a stream; other parameters are those of `compiler.Kernel`.

    Parameters
    ----------
    function, stream
        Handles: a CUfunction and a CUstream.

    Raises
    ------
    LaunchRejected
        The driver returns an error.
    """
    values = [_argument(x) for x in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
    attribute = LaunchAttribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
    config = LaunchConfig(
        grid=(*grid, 1, 1)[:3],
        block=(*block, 1, 1)[:3],
        shared_bytes=shared_bytes,
        stream=stream,
        attributes=ctypes.pointer(attribute),
        n_attributes=1,
    )
    error = driver().cuLaunchKernelEx(config, function, pointers, None)
    if error:
        raise LaunchRejected(f"cuLaunchKernelEx failed with error {error}")


def _argument(x: Any) -> Any:
    """Return ctypes memory with an array's address, a null pointer or a scalar's bytes."""
    if x is None:
        return ctypes.c_void_p(0)
    if isinstance(x, np.generic):
        return (ctypes.c_char * x.nbytes).from_buffer_copy(x.tobytes())
    return ctypes.c_void_p(x.data.ptr)
