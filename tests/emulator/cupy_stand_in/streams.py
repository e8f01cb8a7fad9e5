"""CuPy's devices, streams, graphs and memory pools, as far as the backend uses them.

Work is executed immediately. A stream in capture mode collects kernel launches for a graph, and
rejects all other work on arrays.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

LOCK = threading.RLock()  # guards state that threads share
N_DEVICES = 2
TOTAL_BYTES = 80 * 2**30
GARBAGE = 0xFF  # a byte; they are a NaN in each float type
ALLOCATION_BYTES = 512  # allocations are multiples of it
ATTRIBUTES = {
    "MaxSharedMemoryPerBlock": 48 * 1024,
    "MaxSharedMemoryPerBlockOptin": 227 * 1024,
    "MultiProcessorCount": 2,
}
ERRORS = {
    2: "cudaErrorMemoryAllocation: out of memory",
    101: "cudaErrorInvalidDevice: invalid device ordinal",
    900: "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing",
    901: "cudaErrorStreamCaptureInvalidated: operation failed due to a previous error",
}


class CUDARuntimeError(RuntimeError):
    """An error of the CUDA runtime, by status."""

    def __init__(self, status: int) -> None:
        super().__init__(ERRORS[status])
        self.status = status


class CUDADriverError(RuntimeError):
    """An error of the CUDA driver."""

    def __init__(self, status: int) -> None:
        super().__init__(f"CUDA_ERROR_{status}")
        self.status = status


class OutOfMemoryError(MemoryError):
    """The device has no more memory, or the pool reaches its limit."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes")
        self._args = size, total, limit

    def __reduce__(self) -> Any:
        return type(self), self._args


class _Thread(threading.local):
    """The current device, stream and allocator of a thread."""

    def __init__(self) -> None:
        self.device = 0
        self.devices: list[int] = []
        self.streams: list[Stream] = [Stream.null]
        self.allocators: list[Callable[[int], MemoryPointer]] = [default_pool.malloc]


class Device:
    """One of the devices, which are all alike."""

    def __init__(self, device: Any = None) -> None:
        self.id = current.device if device is None else int(device)

    def __int__(self) -> int:
        return self.id

    def __enter__(self) -> Device:
        if not 0 <= self.id < N_DEVICES:
            raise CUDARuntimeError(101)
        current.devices.append(current.device)
        current.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        current.device = current.devices.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def synchronize(self) -> None:
        """Wait for the device."""
        get_current_stream().synchronize()

    @property
    def compute_capability(self) -> str:
        """Compute capability; "80" has no programmatic dependent launch."""
        return "80"

    @property
    def attributes(self) -> dict[str, int]:
        """Device attributes by name, without the prefix cudaDevAttr."""
        return ATTRIBUTES


class Stream:
    """A stream, which executes launches immediately or captures them."""

    null: Stream
    _numbers = itertools.count(1000)

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: Any = 0
    ) -> None:
        self.ptr = 0 if null else next(self._numbers)
        self.device_id = -1 if null else current.device
        self._captured: list[Callable[[], None]] | None = None
        self._is_invalidated = False
        self.pending_copies: list[DeferredCopy] = []  # to the host
        by_ptr[self.ptr] = self

    def __enter__(self) -> Stream:
        if self.device_id not in (-1, current.device):
            raise RuntimeError("the stream belongs to another device than the current one")
        current.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        current.streams.pop()

    def synchronize(self) -> None:
        """Wait for all work, copies to the host included."""
        reject_in_capture(self)
        finish_copies(self.pending_copies)

    def record(self, event: Event | None = None) -> Event:
        """Record an event on this stream."""
        event = event or Event()
        event.record(self)
        return event

    def begin_capture(self, mode: int | None = None) -> None:
        """Begin to capture launches."""
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self._captured, self._is_invalidated = [], False

    def end_capture(self) -> Graph:
        """Return the captured launches as a graph."""
        captured, self._captured = self._captured, None
        if captured is None or self._is_invalidated:
            raise CUDARuntimeError(901)
        return Graph(captured)

    def is_capturing(self) -> bool:
        """Return True between `begin_capture` and `end_capture`."""
        return self._captured is not None

    def submit(self, launch: Callable[[], None]) -> None:
        """Execute a launch, or capture it."""
        if self._captured is None:
            with LOCK:
                launch()
                for memory in list(unowned):
                    self.pending_copies += memory.take_writes()
        else:
            self._captured.append(launch)


class Graph:
    """Captured launches; a graph keeps no array alive."""

    def __init__(self, launches: list[Callable[[], None]]) -> None:
        self._launches = launches

    def launch(self, stream: Stream | None = None) -> None:
        """Execute all launches."""
        for launch in self._launches:
            (stream or get_current_stream()).submit(launch)

    def upload(self, stream: Stream | None = None) -> None:
        """Prepare the first launch (nothing to do)."""


class Event:
    """A CUDA event."""

    def __init__(
        self, block: bool = False, disable_timing: bool = False, interprocess: bool = False
    ) -> None:
        self._timing = not disable_timing
        self._time: float | None = None
        self._pending_copies: list[DeferredCopy] = []

    def record(self, stream: Stream | None = None) -> None:
        """Record the time, and the copies that are pending."""
        stream = stream or get_current_stream()
        with LOCK:
            self._pending_copies = stream.pending_copies[:]
        stream.submit(self._record_time)

    def _record_time(self) -> None:
        self._time = time.perf_counter()

    @property
    def done(self) -> bool:
        """True, because work is executed immediately."""
        return True

    def synchronize(self) -> None:
        """Wait for the event."""
        reject_in_capture()
        finish_copies(self._pending_copies)


class DeferredCopy:
    """A copy to the host; the target holds garbage until `finish`."""

    def __init__(self, source: np.ndarray, target: np.ndarray) -> None:
        self._source: np.ndarray | None = source
        self._target = target
        target.reshape(-1).view(np.uint8)[...] = GARBAGE

    def finish(self) -> None:
        """Copy, unless it is done."""
        if self._source is not None:
            self._target[...] = self._source
        self._source = None


def finish_copies(copies: list[DeferredCopy]) -> None:
    """Finish all copies, and clear the list."""
    while copies:
        copies.pop(0).finish()


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Return the milliseconds between two events."""
    for event in (start_event, end_event):
        if event._time is None or not event._timing:
            raise ValueError("an event has no time")
    return 1e3 * (end_event._time - start_event._time)


def get_current_stream(device_id: int = -1) -> Stream:
    """Return the current stream of this thread."""
    return current.streams[-1]


def reject_in_capture(stream: Stream | None = None) -> None:
    """Invalidate a capture of the stream, as work does that cannot be captured."""
    stream = stream or get_current_stream()
    if stream.is_capturing():
        stream._is_invalidated = True
        raise CUDARuntimeError(900)


class UnownedMemory:
    """Memory of the host that kernels write to; an event makes the writes visible."""

    def __init__(self, ptr: int, size: int, owner: np.ndarray, device_id: int = -1) -> None:
        assert (ptr, size) == (owner.ctypes.data, owner.nbytes)
        self._host = owner.reshape(-1).view(np.uint8)
        self.bytes = self._host.copy()  # the device's view
        self._taken = self.bytes.copy()
        with LOCK:
            unowned.add(self)

    def take_writes(self) -> list[DeferredCopy]:
        """Return the changes since the last call as a copy to the host."""
        changed = np.flatnonzero(self.bytes != self._taken) // 8 * 8  # whole int64
        if not changed.size:
            return []
        part = slice(changed[0], changed[-1] + 8)
        self._taken[part] = self.bytes[part]
        return [DeferredCopy(self.bytes[part].copy(), self._host[part])]


class MemoryPointer:
    """An address in memory `mem`, a NumPy array of bytes, which it keeps alive."""

    def __init__(self, mem: np.ndarray | UnownedMemory, offset: int) -> None:
        self._owner = mem
        self.mem = mem.bytes if isinstance(mem, UnownedMemory) else mem
        self.ptr = self.mem.ctypes.data + offset

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ctypes.data + offset)


class MemoryPool:
    """A memory pool that counts bytes; allocations hold garbage."""

    def __init__(self, allocator: Any = None) -> None:
        self._used = self._held = self._limit = 0
        pools.add(self)

    def malloc(self, size: int) -> MemoryPointer:
        """Allocate at least `size` bytes."""
        size = -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES
        held = max(self._held, self._used + size)
        if held > max(self._held, self._limit or free_bytes() + self._held):
            raise OutOfMemoryError(size, self._held, self._limit)
        self._held, self._used = held, self._used + size
        memory = np.full(size, GARBAGE, np.uint8)
        memories[memory.ctypes.data] = memory
        weakref.finalize(memory, self._free, size).atexit = False
        return MemoryPointer(memory, 0)

    def _free(self, size: int) -> None:
        self._used -= size

    def used_bytes(self) -> int:
        """Return the bytes that arrays use."""
        return self._used

    def total_bytes(self) -> int:
        """Return the bytes that the pool has taken from the device."""
        return self._held

    def free_all_blocks(self, stream: Stream | None = None) -> None:
        """Return unused bytes to the device."""
        self._held = self._used

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        """Limit the bytes that the pool takes from the device; 0 is no limit."""
        self._limit = int(fraction * TOTAL_BYTES) if size is None and fraction else size or 0

    def get_limit(self) -> int:
        """Return the limit."""
        return self._limit


def free_bytes() -> int:
    """Return the bytes of the device that no pool has taken."""
    return TOTAL_BYTES - sum(pool.total_bytes() for pool in pools)


@contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer] | None = None) -> Iterator[None]:
    """Allocate from another pool."""
    current.allocators.append(allocator or default_pool.malloc)
    try:
        yield
    finally:
        current.allocators.pop()


pools: weakref.WeakSet[MemoryPool] = weakref.WeakSet()
memories: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
unowned: weakref.WeakSet[UnownedMemory] = weakref.WeakSet()
by_ptr: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
Stream.null = Stream(null=True)
default_pool = MemoryPool()
current = _Thread()
