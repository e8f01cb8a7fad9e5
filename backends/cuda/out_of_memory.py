"""What is done and said when a CUDA device runs out of memory."""

from __future__ import annotations

import traceback

import cupy

from gptx.errors import DeviceOutOfMemory

MEMORY_ALLOCATION = 2  # the status, in CUDA's runtime and driver APIs


def out_of_memory(error: BaseException) -> DeviceOutOfMemory | None:
    """What to raise in place of an error of CuPy's; None if it has nothing to do with memory.

    To be called where the error is caught, with the device that ran out as the current one. What
    the failed functions held is let go, and CuPy's pool gives back what nobody uses, so that the
    next call finds it.
    """
    if isinstance(error, cupy.cuda.memory.OutOfMemoryError):
        # Its attributes are private, but pickle has to know what it was made of.
        needed, allocated, limit = error.__reduce__()[1]
        what = f"{needed:,} bytes are needed, {_free(allocated, limit)}"
    elif getattr(error, "status", None) == MEMORY_ALLOCATION and isinstance(
        error, (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)
    ):  # for a kernel or a graph, which do not say how much
        what = f"{error}; of its bytes, {_free()}"
    else:
        return None
    traceback.clear_frames(error.__traceback__)
    cupy.get_default_memory_pool().free_all_blocks()
    return DeviceOutOfMemory(
        f"memory ran out on CUDA device {cupy.cuda.Device().id} ({what}): "
        "use a smaller model, batch, context or dtype"
    )


def _free(allocated: int = 0, limit: int = 0) -> str:
    if limit:
        return f"{limit - allocated:,} of the {limit:,} that CuPy is limited to are free"
    free, total = cupy.cuda.runtime.memGetInfo()
    return f"{free:,} of {total:,} are free"
