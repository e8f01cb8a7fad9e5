"""From the engine thread to the event loop: the events of a request, and one wake-up for a step."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable

from gptx.generation.results import Chunk

Event = Chunk | Exception | None  # None: no event has arrived for a while


class Bell:
    """The inboxes that have new events since the last ring.

    Only the engine thread uses it. It rings once for a step: each call into an event loop writes to
    a socket, at which the engine thread hands over the interpreter.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, set[Inbox]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, inbox: Inbox) -> None:
        """Add an inbox, whose coroutine runs in this loop."""
        self._waiting.setdefault(loop, set()).add(inbox)

    def ring(self) -> None:
        """Wake the coroutines of all inboxes."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        for loop, inboxes in waiting.items():
            with contextlib.suppress(RuntimeError):  # a closed loop has no clients
                loop.call_soon_threadsafe(_wake, inboxes)


def _wake(inboxes: Iterable[Inbox]) -> None:
    for inbox in inboxes:
        inbox.wake()


class Inbox:
    """Events of a request, from the engine thread to a coroutine.

    Parameters
    ----------
    bell
        Bell of the engine thread.
    n_ends
        Number of continuations, each of which has a last chunk.
    idle_seconds
        Time without an event after which None is one. None to wake the coroutine at the last event
        only.
    """

    def __init__(self, bell: Bell, n_ends: int, *, idle_seconds: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._bell = bell
        self._events: deque[Event] = deque()
        self._left = n_ends
        self._idle_seconds = idle_seconds
        self._arrived = asyncio.Event()
        self._last_time = self._loop.time()
        self._timers: list[asyncio.TimerHandle] = []
        if idle_seconds is not None:
            self._timers.append(self._loop.call_later(idle_seconds, self._tick))

    def put(self, event: Chunk | Exception) -> None:
        """Add an event, which arrives when the bell rings; the engine thread calls it."""
        is_last = isinstance(event, Exception)
        if isinstance(event, Chunk) and event.finish_reason is not None:
            self._left -= 1
            is_last = self._left == 0
        self._events.append(event)
        if is_last or self._idle_seconds is not None:
            self._bell.add(self._loop, self)

    def put_later(self, seconds: float, event: Exception) -> None:
        """Add an event after this time, if the inbox is still open."""
        self._timers.append(self._loop.call_later(seconds, self._put_now, event))

    def _put_now(self, event: Event) -> None:
        self._events.append(event)
        self.wake()

    def _tick(self) -> None:
        """Add None after a time without events: one timer for all, which runs again."""
        assert self._idle_seconds is not None
        rest = self._last_time + self._idle_seconds - self._loop.time()
        if rest <= 0:
            self._put_now(None)
            rest = self._idle_seconds
        self._timers[0] = self._loop.call_later(rest, self._tick)

    def wake(self) -> None:
        """Wake the coroutine; the event loop calls it."""
        self._arrived.set()

    async def take(self) -> list[Event]:
        """Return the events that arrived, at least one."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            # The engine thread may add events meanwhile, whose bell has not rung.
            events = [self._events.popleft() for _ in range(len(self._events))]
            if events:
                self._last_time = self._loop.time()
                return events

    def close(self) -> None:
        """End the timers."""
        for timer in self._timers:
            timer.cancel()
