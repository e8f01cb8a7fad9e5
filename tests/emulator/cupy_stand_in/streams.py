"""CuPy's devices, streams, graphs and memory pools, as far as the backend uses them.

Everything is done at once, except in a capture: there, launches of kernels are noted, and run when
the graph is launched. Whatever else would work on arrays then is refused.
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

LOCK = threading.RLock()  # of what all threads share
N_DEVICES = 2
TOTAL_BYTES = 80 * 2**30
GARBAGE = 0xFF  # as bytes: a NaN in each of the float types
ROUNDING = 512  # bytes: what the pool hands out comes in multiples of it
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
    """An error of the CUDA runtime, by its number."""

    def __init__(self, status: int) -> None:
        super().__init__(ERRORS[status])
        self.status = status


class CUDADriverError(RuntimeError):
    """An error of the CUDA driver."""

    def __init__(self, status: int) -> None:
        super().__init__(f"CUDA_ERROR_{status}")
        self.status = status


class OutOfMemoryError(MemoryError):
    """A pool gets no more memory, or may not have it."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes")
        self._made_of = size, total, limit

    def __reduce__(self) -> Any:
        return type(self), self._made_of


class _Thread(threading.local):
    """What is current in a thread."""

    def __init__(self) -> None:
        self.device = 0
        self.devices: list[int] = []
        self.streams: list[Stream] = [Stream.null]
        self.allocators: list[Callable[[int], MemoryPointer]] = [default_pool.malloc]


class Device:
    """One of the devices, which differ in nothing."""

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
        """Of the architecture: one for which nothing goes past CuPy, to the driver."""
        return "80"

    @property
    def attributes(self) -> dict[str, int]:
        """CUDA's, by their names without cudaDevAttr."""
        return ATTRIBUTES


class Stream:
    """A stream: what is launched is done at once, or noted while it captures."""

    null: Stream
    _numbers = itertools.count(1000)

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: Any = 0
    ) -> None:
        self.ptr = 0 if null else next(self._numbers)
        self.device_id = -1 if null else current.device
        self._noted: list[Callable[[], None]] | None = None
        self._is_spoiled = False
        self.arriving: list[Callable[[], None]] = []  # copies to the host
        by_ptr[self.ptr] = self

    def __enter__(self) -> Stream:
        if self.device_id not in (-1, current.device):
            raise RuntimeError("the stream is of another device than the current one")
        current.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        current.streams.pop()

    def synchronize(self) -> None:
        """Wait for what was launched."""
        refuse_in_capture(self)
        arrive(self.arriving)

    def record(self, event: Event | None = None) -> Event:
        """Note the time."""
        event = event or Event()
        event.record(self)
        return event

    def begin_capture(self, mode: int | None = None) -> None:
        """Note launches instead of doing them."""
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self._noted, self._is_spoiled = [], False

    def end_capture(self) -> Graph:
        """What was noted."""
        noted, self._noted = self._noted, None
        if noted is None or self._is_spoiled:
            raise CUDARuntimeError(901)
        return Graph(noted)

    def is_capturing(self) -> bool:
        """Whether launches are noted."""
        return self._noted is not None

    def do(self, launch: Callable[[], None]) -> None:
        """Launch now, or note it."""
        if self._noted is None:
            with LOCK:
                launch()
                for memory in list(unowned):
                    self.arriving += memory.written()
        else:
            self._noted.append(launch)


class Graph:
    """Launches that were noted. It keeps no array alive."""

    def __init__(self, launches: list[Callable[[], None]]) -> None:
        self._launches = launches

    def launch(self, stream: Stream | None = None) -> None:
        """Do them all."""
        for launch in self._launches:
            (stream or get_current_stream()).do(launch)

    def upload(self, stream: Stream | None = None) -> None:
        """Prepare the first launch."""


class Event:
    """A time."""

    def __init__(
        self, block: bool = False, disable_timing: bool = False, interprocess: bool = False
    ) -> None:
        self._timing = not disable_timing
        self._time: float | None = None
        self._arriving: list[Callable[[], None]] = []

    def record(self, stream: Stream | None = None) -> None:
        """Note it, and which copies have been asked for."""
        stream = stream or get_current_stream()
        with LOCK:
            self._arriving = stream.arriving[:]
        stream.do(self._note)

    def _note(self) -> None:
        self._time = time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether it has come."""
        return True

    def synchronize(self) -> None:
        """Wait for it."""
        refuse_in_capture()
        arrive(self._arriving)


class Arriving:
    """A copy to the host, which is done once when it is called."""

    def __init__(self, source: np.ndarray, target: np.ndarray) -> None:
        self._source: np.ndarray | None = source
        self._target = target
        target.reshape(-1).view(np.uint8)[...] = GARBAGE

    def __call__(self) -> None:
        if self._source is not None:
            self._target[...] = self._source
        self._source = None


def arrive(copies: list[Callable[[], None]]) -> None:
    """Finish copies to the host, each once."""
    while copies:
        copies.pop(0)()


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds from one to the other."""
    for event in (start_event, end_event):
        if event._time is None or not event._timing:
            raise ValueError("an event without a time")
    return 1e3 * (end_event._time - start_event._time)


def get_current_stream(device_id: int = -1) -> Stream:
    """The one that is used where none is named."""
    return current.streams[-1]


def refuse_in_capture(stream: Stream | None = None) -> None:
    """Spoil a capture of the current stream, as what cannot be captured does."""
    stream = stream or get_current_stream()
    if stream.is_capturing():
        stream._is_spoiled = True
        raise CUDARuntimeError(900)


class UnownedMemory:
    """Memory of the host that kernels write to: what they have written comes with an event."""

    def __init__(self, ptr: int, size: int, owner: np.ndarray, device_id: int = -1) -> None:
        assert (ptr, size) == (owner.ctypes.data, owner.nbytes)
        self._host = owner.reshape(-1).view(np.uint8)
        self.bytes = self._host.copy()  # as the device sees them
        self._known = self.bytes.copy()
        with LOCK:
            unowned.add(self)

    def written(self) -> list[Arriving]:
        """What has changed since the last call, on its way to the host."""
        changed = np.flatnonzero(self.bytes != self._known) // 8 * 8  # of whole numbers
        if not changed.size:
            return []
        part = slice(changed[0], changed[-1] + 8)
        self._known[part] = self.bytes[part]
        return [Arriving(self.bytes[part].copy(), self._host[part])]


class MemoryPointer:
    """A place in memory, which it keeps alive: `mem` is a NumPy array of bytes."""

    def __init__(self, mem: np.ndarray | UnownedMemory, offset: int) -> None:
        self._owner = mem
        self.mem = mem.bytes if isinstance(mem, UnownedMemory) else mem
        self.ptr = self.mem.ctypes.data + offset

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ctypes.data + offset)


class MemoryPool:
    """Counts the bytes; what it hands out is filled with garbage."""

    def __init__(self, allocator: Any = None) -> None:
        self._used = self._held = self._limit = 0
        pools.add(self)

    def malloc(self, size: int) -> MemoryPointer:
        """Memory of at least so many bytes."""
        size = -(-size // ROUNDING) * ROUNDING
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
        """In arrays."""
        return self._used

    def total_bytes(self) -> int:
        """Taken from the device."""
        return self._held

    def free_all_blocks(self, stream: Stream | None = None) -> None:
        """Give back to the device what no array has."""
        self._held = self._used

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        """Take no more than so many bytes from the device; 0 is no limit."""
        self._limit = int(fraction * TOTAL_BYTES) if size is None and fraction else size or 0

    def get_limit(self) -> int:
        """What `set_limit` has set."""
        return self._limit


def free_bytes() -> int:
    """Of the device, what no pool has taken."""
    return TOTAL_BYTES - sum(pool.total_bytes() for pool in pools)


@contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer] | None = None) -> Iterator[None]:
    """Take memory from another pool."""
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
