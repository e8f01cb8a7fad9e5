"""What kernels ask memory for, warp by warp: of those that NVRTC has compiled (`ptx.py`).

A warp's access to shared memory takes as many cycles as lanes meet in one of its 32 banks, and one
to global memory as many sectors of 32 bytes as its lanes touch. Arrays are taken to begin where a
sector does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

ROOM = 2**21  # accesses
FAR = 2**30  # bytes: another array
RECORD = np.dtype(
    [("address", "u8")]
    + [(name, "u4") for name in ("block", "thread", "line", "n_bytes", "is_shared", "kind")]
)
BANKS, WORD, SECTOR, LANES = 32, 4, 32, 32

_launches: list[Launch] | None = None


class Launch(NamedTuple):
    """The accesses of one launch, by their places in the arguments' memory.

    Attributes
    ----------
    argument, offset
        Of each access to global memory: in which argument, and at which of its bytes (-1: memory
        whose address the kernel has read somewhere, at that address).
    """

    name: str
    records: np.ndarray
    argument: np.ndarray
    offset: np.ndarray


class Cost(NamedTuple):
    """What accesses took, and what they would have taken at the least, in cycles or in sectors."""

    n_bytes: int = 0
    cost: int = 0
    least: int = 0


@contextmanager
def traced() -> Iterator[list[Launch]]:
    """A list that gets the launches made meanwhile."""
    global _launches
    _launches = []
    try:
        yield _launches
    finally:
        _launches = None


def make_room(library: ctypes.CDLL) -> np.ndarray | None:
    """Room for what a launch is going to do, if anybody wants to know."""
    if _launches is None:
        return None
    room = np.empty(ROOM, RECORD)
    _set(library, ctypes.c_void_p, "trace_room", room.ctypes.data)
    _set(library, ctypes.c_size_t, "trace_size", ROOM)
    _set(library, ctypes.c_size_t, "n_traced", 0)
    return room


def note(library: ctypes.CDLL, name: str, room: np.ndarray, pointers: list[int]) -> None:
    """Keep what the launch has done; `pointers` are the arguments' addresses, or 0."""
    assert _launches is not None
    n = ctypes.c_size_t.in_dll(library, "n_traced").value
    assert n <= ROOM, f"{name}: {n} accesses, there is room for {ROOM}"
    _set(library, ctypes.c_void_p, "trace_room", None)
    records = room[:n].copy()
    address = records["address"]
    order = np.argsort(pointers)  # an access is to the argument that begins before it
    starts = np.array(pointers, np.uint64)[order]
    before = np.searchsorted(starts, address, "right") - 1
    far = (address - starts[before] > FAR) | (starts[before] == 0) | (records["is_shared"] == 1)
    argument = np.where(far, -1, order[before])
    offset = np.where(far, address, address - starts[before])
    _launches.append(Launch(name, records, argument, offset))


def _set(library: ctypes.CDLL, kind: Any, name: str, value: Any) -> None:
    kind.in_dll(library, name).value = value


def costs(launch: Launch) -> dict[str | int, Cost]:
    """Of each argument by its number, of other global memory (-1) and of "shared" memory."""
    found: dict[str | int, Cost] = {}
    for i in _requests(launch.records):
        first = launch.records[i[0]]
        size, offsets = int(first["n_bytes"]), launch.offset[i].astype(np.int64)
        n_bytes = size * len(i)
        if first["is_shared"]:
            where: str | int = "shared"
            cost, least = _cycles(offsets, launch.records["thread"][i] % LANES, size)
        else:
            where = int(launch.argument[i[0]])
            cost = len(np.unique(np.concatenate([offsets, offsets + size - 1]) // SECTOR))
            least = -(-len(np.unique(offsets)) * size // SECTOR)
        old = found.get(where, Cost())
        found[where] = Cost(*(a + b for a, b in zip(old, (n_bytes, cost, least), strict=True)))
    return found


def _requests(records: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of the accesses that a warp makes together: the n-th of each lane at one place."""
    place = [records[name] for name in ("line", "thread", "block")]
    order = np.lexsort(place)  # by block, thread, place; in each, as they happened
    same = np.ones(len(order), bool)
    same[0] = False
    for key in place:
        same[1:] &= key[order][1:] == key[order][:-1]
    firsts = np.flatnonzero(~same)
    number = np.arange(len(order)) - np.repeat(firsts, np.diff([*firsts, len(order)]))
    nth = np.empty(len(order), int)
    nth[order] = number
    keys = [nth, records["line"], records["thread"] // LANES, records["block"]]
    order = np.lexsort(keys)
    new = np.zeros(len(order) - 1, bool)
    for key in keys:
        new |= key[order][1:] != key[order][:-1]
    yield from np.split(order, np.flatnonzero(new) + 1)


def _cycles(offsets: np.ndarray, lanes: np.ndarray, size: int) -> tuple[int, int]:
    """Of an access to shared memory: wide ones are made in parts, of 128 bytes together."""
    together = min(LANES, BANKS * WORD // size)
    cost = least = 0
    for part in range(LANES // together):
        mine = offsets[lanes // together == part]
        if len(mine):
            words = np.unique((mine[:, None] + np.arange(0, max(size, WORD), WORD)) // WORD)
            cost += np.bincount(words % BANKS).max()
            least += 1
    return int(cost), least
