"""Count the memory accesses of kernels on the PTX path, warp by warp.

An access of a warp to shared memory takes one cycle for each lane that uses the same of the 32
banks. An access to global memory takes one transaction for each sector of 32 bytes that the lanes
touch. The counter assumes that arrays begin at a sector.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

MAX_ACCESSES = 2**21  # of one launch
MAX_ARRAY_BYTES = 2**30  # an address farther behind an argument belongs to no argument
BANKS, WORD_BYTES, SECTOR_BYTES, LANES = 32, 4, 32, 32
ACCESS = np.dtype(  # struct Traced of race_detector.cpp
    [("address", "u8")]
    + [(name, "u4") for name in ("block", "thread", "line", "n_bytes", "is_shared", "kind")]
)

_launches: list[TracedLaunch] | None = None  # None: no trace is active


class TracedLaunch(NamedTuple):
    """The memory accesses of one launch.

    Attributes
    ----------
    name
        Name of the kernel.
    accesses
        Array [n] of type ACCESS, in the order of execution.
    argument
        Integers [n]: the number of the argument that each access is in; -1 for shared memory and
        for memory that is no argument.
    offset
        Integers [n]: the access's byte offset in its argument; the address if there is none.
    """

    name: str
    accesses: np.ndarray
    argument: np.ndarray
    offset: np.ndarray


class Cost(NamedTuple):
    """Bytes that accesses move, and their actual and minimal cost in cycles or sectors."""

    n_bytes: int = 0
    cost: int = 0
    minimum: int = 0


@contextmanager
def traced_launches() -> Iterator[list[TracedLaunch]]:
    """Trace the launches inside the context; yield the list that receives them."""
    global _launches
    _launches = []
    try:
        yield _launches
    finally:
        _launches = None


def begin_trace(library: ctypes.CDLL) -> np.ndarray | None:
    """Give a library a buffer for the accesses of its next launch, if a trace is active."""
    if _launches is None:
        return None
    buffer = np.empty(MAX_ACCESSES, ACCESS)
    _set(library, ctypes.c_void_p, "trace_buffer", buffer.ctypes.data)
    _set(library, ctypes.c_size_t, "trace_capacity", MAX_ACCESSES)
    _set(library, ctypes.c_size_t, "n_traced", 0)
    return buffer


def end_trace(
    library: ctypes.CDLL, name: str, buffer: np.ndarray, argument_addresses: list[int]
) -> None:
    """Append the launch to the active trace; an address is 0 for arguments that are numbers."""
    assert _launches is not None
    n = ctypes.c_size_t.in_dll(library, "n_traced").value
    assert n <= MAX_ACCESSES, f"{name}: {n} accesses exceed the trace's {MAX_ACCESSES}"
    _set(library, ctypes.c_void_p, "trace_buffer", None)
    accesses = buffer[:n].copy()
    address = accesses["address"]
    order = np.argsort(argument_addresses)  # an access belongs to the argument before it
    starts = np.array(argument_addresses, np.uint64)[order]
    before = np.searchsorted(starts, address, "right") - 1
    is_far = address - starts[before] > MAX_ARRAY_BYTES
    no_argument = is_far | (starts[before] == 0) | (accesses["is_shared"] == 1)
    argument = np.where(no_argument, -1, order[before])
    offset = np.where(no_argument, address, address - starts[before])
    _launches.append(TracedLaunch(name, accesses, argument, offset))


def _set(library: ctypes.CDLL, kind: Any, name: str, value: Any) -> None:
    kind.in_dll(library, name).value = value


def costs(launch: TracedLaunch) -> dict[str | int, Cost]:
    """Add up the costs by argument number, -1 for other global memory, and "shared"."""
    total: dict[str | int, Cost] = {}
    for i in _warp_accesses(launch.accesses):
        first = launch.accesses[i[0]]
        size, offsets = int(first["n_bytes"]), launch.offset[i].astype(np.int64)
        if first["is_shared"]:
            where: str | int = "shared"
            cost, minimum = _shared_cycles(offsets, launch.accesses["thread"][i] % LANES, size)
        else:
            where = int(launch.argument[i[0]])
            cost = len(np.unique(np.concatenate([offsets, offsets + size - 1]) // SECTOR_BYTES))
            minimum = -(-len(np.unique(offsets)) * size // SECTOR_BYTES)
        new = (size * len(i), cost, minimum)
        total[where] = Cost(*(a + b for a, b in zip(total.get(where, Cost()), new, strict=True)))
    return total


def _warp_accesses(accesses: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the indices of the accesses that a warp makes together.

    These are the n-th execution of one line by each lane.
    """
    place = [accesses[name] for name in ("line", "thread", "block")]
    order = np.lexsort(place)  # stable: executions of one line by one thread stay in order
    same = np.ones(len(order), bool)
    same[0] = False
    for key in place:
        same[1:] &= key[order][1:] == key[order][:-1]
    firsts = np.flatnonzero(~same)
    number = np.arange(len(order)) - np.repeat(firsts, np.diff([*firsts, len(order)]))
    nth = np.empty(len(order), int)
    nth[order] = number
    keys = [nth, accesses["line"], accesses["thread"] // LANES, accesses["block"]]
    order = np.lexsort(keys)
    new = np.zeros(len(order) - 1, bool)
    for key in keys:
        new |= key[order][1:] != key[order][:-1]
    yield from np.split(order, np.flatnonzero(new) + 1)


def _shared_cycles(offsets: np.ndarray, lanes: np.ndarray, size: int) -> tuple[int, int]:
    """Return actual and minimal cycles; wide accesses are made in parts of 128 bytes."""
    lanes_per_part = min(LANES, BANKS * WORD_BYTES // size)
    cost = minimum = 0
    for part in range(LANES // lanes_per_part):
        mine = offsets[lanes // lanes_per_part == part]
        if len(mine):
            steps = np.arange(0, max(size, WORD_BYTES), WORD_BYTES)
            words = np.unique((mine[:, None] + steps) // WORD_BYTES)
            cost += np.bincount(words % BANKS).max()
            minimum += 1
    return int(cost), minimum
