"""Launch a kernel that may begin before the one ahead of it has ended.

CUDA calls it programmatic dependent launch (compute capability 9.0 and above): the kernel's blocks
take their places as soon as those of the kernel ahead call `let_next_start`, load what never
changes, and stop at `wait_for_previous` (`cuda/device.cuh`) until that kernel has ended and what it
wrote can be seen. CuPy does not offer it, so this calls the driver.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import cupy
import numpy as np

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of enum CUlaunchAttributeID in cuda.h


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


class Refused(RuntimeError):
    """The driver has such launches, and does not take this one."""


@cache
def driver() -> Any:
    """The CUDA driver's library; None where it has no such launch (before CUDA 11.8)."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        launch = library.cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    launch.argtypes = ctypes.POINTER(Config), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
    launch.restype = ctypes.c_int
    return library


def is_possible() -> bool:
    """Whether the current device and its driver have such launches."""
    return int(cupy.cuda.Device().compute_capability) >= 90 and driver() is not None


def launch(
    function: int,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    shared_bytes: int,
    stream: int,
) -> None:
    """Launch a kernel (a CUfunction) on a stream, by its address; the rest as in `Kernel`.

    Raises
    ------
    Refused
        The driver does.
    """
    values = [_value(x) for x in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
    attribute = Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
    config = Config(
        grid=(*grid, 1, 1)[:3],
        block=(*block, 1, 1)[:3],
        shared_bytes=shared_bytes,
        stream=stream,
        attributes=ctypes.pointer(attribute),
        n_attributes=1,
    )
    error = driver().cuLaunchKernelEx(config, function, pointers, None)
    if error:
        raise Refused(f"cuLaunchKernelEx failed with error {error}")


def _value(x: Any) -> Any:
    """An argument in memory: an array's address, a null pointer or a NumPy scalar's bytes."""
    if x is None:
        return ctypes.c_void_p(0)
    if isinstance(x, np.generic):
        return (ctypes.c_char * x.nbytes).from_buffer_copy(x.tobytes())
    return ctypes.c_void_p(x.data.ptr)
