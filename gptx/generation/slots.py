"""Slots of the KV cache: free or in use, and the tokens that each one has.

A slot that a sequence has left keeps its tokens until another sequence takes it. So the slots are
also the prefix cache: a prompt that begins like one before takes those keys and values. A slot that
was never used has no memory of the system yet, so some are used again before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from gptx.kv_cache import KVCache


@dataclass(eq=False)
class Slot:
    """One slot of the cache.

    Attributes
    ----------
    index
        Index in the cache.
    tokens
        Token ids whose keys and values it has; a sequence in it can have more.
    salt
        Only prompts with the same salt can share its tokens.
    in_use
        True while a sequence is in it.
    last_used
        Number of the newest use; 0 before the first one.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    salt: str = ""
    in_use: bool = False
    last_used: int = 0


class Slots:
    """The slots of a cache.

    Parameters
    ----------
    cache
        The KV cache.
    n_prefixes
        Number of free slots that keep their tokens while there are unused ones. A prompt takes the
        keys and values of the tokens that it shares with any slot; None for no such sharing.
    """

    def __init__(self, cache: KVCache, n_prefixes: int | None) -> None:
        self._cache, self._share, self._n_prefixes = cache, n_prefixes is not None, n_prefixes or 0
        self._slots = [Slot(i) for i in range(len(cache.lengths))]
        self._uses = count(1)

    @property
    def n_used(self) -> int:
        """Number of slots with a sequence."""
        return sum(slot.in_use for slot in self._slots)

    def take(self, ids: list[int], n: int, salt: str) -> tuple[list[Slot], int]:
        """Take n free slots; return them, and the number of tokens of `ids` that the first one has.

        These are the longest common prefix of `ids` and the tokens of any slot with this salt. The
        last of `ids` does not count: its logits have to be computed. The caller has checked that n
        slots are free.
        """
        best, n_shared = None, 0
        for slot in self._slots if self._share else ():
            if slot.salt == salt and (shared := common_prefix(slot.tokens, ids)) > n_shared:
                best, n_shared = slot, shared
        free = self._free()
        if best is not None and not best.in_use:
            free.remove(best)
            # Tokens after the shared ones can serve other prompts: copy, if another slot is free.
            if n_shared == len(best.tokens) or len(free) < n:
                free.insert(0, best)
        taken = free[:n]
        if best is not None and taken[0] is not best:
            self._cache.copy(n_shared, [taken[0].index], slot=best.index)
        for slot in taken:
            slot.tokens, slot.salt, slot.in_use = [], salt, True
            self._cache.lengths[slot.index] = 0
        taken[0].tokens = ids[:n_shared]
        self._cache.lengths[taken[0].index] = n_shared
        return taken, n_shared

    def _free(self) -> list[Slot]:
        """Return the free slots; the first ones are to be used first."""
        free = sorted((s for s in self._slots if not s.in_use), key=lambda s: s.last_used)
        unused = [slot for slot in free if not slot.last_used]
        used = free[len(unused) :]
        n_surplus = max(0, len(used) - self._n_prefixes)
        return used[:n_surplus] + unused + used[n_surplus:]

    def release(self, slot: Slot, tokens: list[int]) -> None:
        """Free a slot, which has the keys and values of `tokens`."""
        slot.in_use, slot.last_used = False, next(self._uses)
        slot.tokens = tokens if self._share else []
        self._cache.trim(slot.index, len(tokens))


def common_prefix(known: list[int], ids: list[int]) -> int:
    """Return the number of tokens at the start of `ids`, without its last one, that are known."""
    n = min(len(known), len(ids) - 1)
    if known[:n] == ids[:n]:
        return n
    return next(i for i in range(n) if known[i] != ids[i])
