"""Events from the engine thread to coroutines, and their wake-ups."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from gptx.generation.results import Chunk
from gptx.server.inbox import Bell, Inbox


def test_a_bell_wakes_all_inboxes_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        loop, bell, calls = asyncio.get_running_loop(), Bell(), []

        def count(function: Callable[..., object], *args: Any) -> None:
            calls.append(function)
            loop.call_soon(function, *args)

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        inboxes = [Inbox(bell, 1, idle_seconds=60) for _ in range(3)]
        for number in range(2):
            for inbox in inboxes:
                inbox.put(Chunk(str(number), number, None))
        bell.ring()
        bell.ring()
        assert len(calls) == 1
        for inbox in inboxes:
            assert [str(event) for event in await inbox.take()] == ["0", "1"]
            inbox.close()

    asyncio.run(run())


def test_a_whole_answer_is_woken_by_its_last_event() -> None:
    async def run() -> None:
        bell = Bell()
        inbox = Inbox(bell, 1, idle_seconds=None)
        taken = asyncio.create_task(inbox.take())
        for _ in range(3):
            inbox.put(Chunk("a", 1, None))
            bell.ring()
            await asyncio.sleep(0)
        assert not taken.done()
        inbox.put(ValueError())
        bell.ring()
        assert len(await taken) == 4

    asyncio.run(run())


def test_an_inbox_reports_idle_times() -> None:
    async def run() -> None:
        inbox = Inbox(Bell(), 1, idle_seconds=0.01)
        assert [await inbox.take() for _ in range(2)] == [[None], [None]]
        inbox.put_later(0, error := ValueError())
        assert error in await inbox.take()
        inbox.close()

    asyncio.run(run())


def test_a_bell_outlives_an_event_loop() -> None:
    bell = Bell()

    async def make() -> Inbox:
        return Inbox(bell, 1, idle_seconds=None)

    asyncio.run(make()).put(ValueError())
    bell.ring()
