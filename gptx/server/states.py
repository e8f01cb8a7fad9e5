"""States of paused requests, by id, for the calls that continue them."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from typing import Generic, TypeVar

from gptx.server.errors import ApiError

Kept = TypeVar("Kept")


class States(Generic[Kept]):
    """Paused requests; the oldest ones are dropped if there are too many.

    Parameters
    ----------
    max_states
        Number of states that are kept.
    seconds
        Time for which a state is kept.
    """

    def __init__(self, max_states: int, seconds: float) -> None:
        self._max_states = max_states
        self._seconds = seconds
        self._kept: OrderedDict[str, tuple[float, str, Kept]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, state: Kept, salt: str) -> str:
        """Keep a state for the caller with this salt; return its id."""
        id = f"state-{secrets.token_hex(16)}"
        with self._lock:
            self._drop_old()
            self._kept[id] = (time.monotonic(), salt, state)
            while len(self._kept) > self._max_states:
                self._kept.popitem(last=False)
        return id

    def restore(self, id: str, state: Kept, salt: str) -> None:
        """Keep a state that `take` returned, under its id: it could not continue."""
        with self._lock:
            self._kept[id] = (time.monotonic(), salt, state)

    def take(self, id: str, salt: str) -> Kept:
        """Return a state and drop it: it continues once.

        Raises
        ------
        ApiError
            There is no such state of this caller.
        """
        with self._lock:
            self._drop_old()
            found = self._kept.get(id)
            if found is not None and found[1] == salt:
                del self._kept[id]
                return found[2]
        raise ApiError(
            404,
            "state does not exist: it was used, is too old, or was dropped for newer ones; send "
            "the request again without it",
            param="state",
            code="state_not_found",
        )

    def _drop_old(self) -> None:
        limit = time.monotonic() - self._seconds
        while self._kept and next(iter(self._kept.values()))[0] < limit:
            self._kept.popitem(last=False)
