"""The choice of a replica: the fewest waiting requests, then the longest common prefix."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

BLOCK_CHARACTERS = 64  # a shorter common prefix saves next to nothing
MAX_BLOCKS = 64  # of a prompt
MAX_KNOWN_BLOCKS = 16 * 1024  # of a replica


def blocks_of(text: str, salt: str) -> list[bytes]:
    """Return a checksum of each prefix of a text, one block longer than the one before.

    Two texts share as many checksums as they share blocks; texts of other salts share none.
    """
    found: list[bytes] = []
    checksum = hashlib.blake2b(salt.encode(errors="replace"), digest_size=8)
    for start in range(0, len(text) - BLOCK_CHARACTERS + 1, BLOCK_CHARACTERS):
        if len(found) == MAX_BLOCKS:
            break
        checksum.update(text[start : start + BLOCK_CHARACTERS].encode(errors="replace"))
        found.append(checksum.digest())
    return found


class Prefixes:
    """Prefixes of the newest prompts that a replica has read."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def add(self, blocks: Sequence[bytes]) -> None:
        """Add the blocks of a prompt; the oldest ones are dropped."""
        for block in reversed(blocks):  # the first block of a prompt is dropped last
            self._known[block] = None
            self._known.move_to_end(block)
        while len(self._known) > MAX_KNOWN_BLOCKS:
            self._known.popitem(last=False)

    def common(self, blocks: Sequence[bytes]) -> int:
        """Return how many blocks a prompt shares with one of those before."""
        for n, block in enumerate(blocks):
            if block not in self._known:
                return n
        return len(blocks)

    def clear(self) -> None:
        """Forget all prompts: the replica has started anew."""
        self._known.clear()


class Candidate(Protocol):
    """A replica as the choice sees it.

    Attributes
    ----------
    number
        Number of the replica, from 0.
    active
        Number of its requests.
    prefixes
        Prefixes that it has read.
    """

    number: int
    active: int
    prefixes: Prefixes


C = TypeVar("C", bound=Candidate)


def ranked(replicas: Sequence[C], blocks: Sequence[bytes], slots: int) -> Iterator[C]:
    """Yield the replicas in the order in which a request tries them.

    Parameters
    ----------
    slots
        Number of requests that a replica computes at a time; the others of it wait.
    """

    def key(replica: C) -> tuple[int, int, int, int]:
        waiting = max(0, replica.active - slots)
        return waiting, -replica.prefixes.common(blocks), replica.active, replica.number

    yield from sorted(replicas, key=key)
