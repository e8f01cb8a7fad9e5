"""Translate the out-of-memory errors of CuPy and CUDA, and free memory after them."""

from __future__ import annotations

import traceback

import cupy

from gptx.errors import DeviceOutOfMemory

OUT_OF_MEMORY_STATUS = 2  # in CUDA's runtime and driver APIs


def translate_out_of_memory(error: BaseException) -> DeviceOutOfMemory | None:
    """Return the error to raise in place of an error of CuPy; None if memory is not its cause.

    Call it where the error is caught, while the device of the error is the current device. It
    clears the locals of the failed functions, and returns unused memory of CuPy's pool to the
    device, so that the next call can allocate it.
    """
    if isinstance(error, cupy.cuda.memory.OutOfMemoryError):
        # The attributes are private, but pickle's protocol provides them.
        needed, allocated, limit = error.__reduce__()[1]
        what = f"{needed:,} bytes are needed; {_free(allocated, limit)}"
    elif getattr(error, "status", None) == OUT_OF_MEMORY_STATUS and isinstance(
        error, (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)
    ):  # of a kernel or graph: CUDA reports no size
        what = f"{error}; {_free()}"
    else:
        return None
    traceback.clear_frames(error.__traceback__)
    cupy.get_default_memory_pool().free_all_blocks()
    return DeviceOutOfMemory(
        f"out of memory on CUDA device {cupy.cuda.Device().id} ({what}): "
        "use a smaller model, batch, context or dtype"
    )


def _free(allocated: int = 0, limit: int = 0) -> str:
    if limit:
        return f"{limit - allocated:,} of CuPy's limit of {limit:,} bytes are free"
    free, total = cupy.cuda.runtime.memGetInfo()
    return f"{free:,} of {total:,} bytes are free"
