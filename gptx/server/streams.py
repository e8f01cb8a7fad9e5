"""From the engine thread to the client: an inbox of events, and server-sent events.

A client that hangs up is noticed in each phase: a task reads `receive()` until the connection ends.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, TypeVar

from starlette.types import Receive, Send

from gptx.generation.results import Chunk
from gptx.server.errors import api_error

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Disconnected(Exception):
    """The client has hung up, or does not read."""


class Inbox:
    """Events of a request, from the engine thread to a coroutine.

    Parameters
    ----------
    n_ends
        Number of continuations, each of which has a last chunk.
    eager
        True to wake the coroutine at each event, False at the last one only.
    """

    def __init__(self, n_ends: int, *, eager: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[Chunk | Exception] = deque()
        self._left = n_ends
        self._eager = eager
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._is_waking = False

    def put(self, event: Chunk | Exception) -> None:
        """Add an event; the engine thread calls it."""
        is_last = isinstance(event, Exception)
        if not is_last and event.finish_reason is not None:  # type: ignore[union-attr]
            self._left -= 1
            is_last = self._left == 0
        with self._lock:
            self._events.append(event)
            if self._is_waking or not (self._eager or is_last):
                return
            self._is_waking = True
        self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self) -> list[Chunk | Exception]:
        """Return the events that arrived, at least one."""
        await self._arrived.wait()
        with self._lock:
            self._arrived.clear()
            self._is_waking = False
            events = list(self._events)
            self._events.clear()
        return events


class Client:
    """The connection of one request.

    Use it as an asynchronous context manager: inside, a task waits for the end of the connection.
    The body of the request has been read.
    """

    def __init__(self, receive: Receive, send: Send, *, send_seconds: float) -> None:
        self._receive = receive
        self._send = send
        self._send_seconds = send_seconds
        self._gone: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Client:
        self._gone = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._gone is not None
        self._gone.cancel()
        await asyncio.gather(self._gone, return_exceptions=True)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def wait(self, result: Awaitable[T], seconds: float | None = None) -> T:
        """Wait for a result while the client is connected.

        Raises
        ------
        Disconnected
            The client has hung up; the awaitable is canceled.
        TimeoutError
            The result takes longer than `seconds`; the awaitable is canceled.
        """
        assert self._gone is not None
        task = asyncio.ensure_future(result)
        try:
            await asyncio.wait(
                {task, self._gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                return task.result()
            if self._gone.done():
                raise Disconnected
            raise TimeoutError
        finally:
            if not task.done():
                task.cancel()

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; a client that does not read it in time counts as one that hung up."""
        assert self._gone is not None
        if self._gone.done():
            raise Disconnected
        try:
            async with asyncio.timeout(self._send_seconds):
                await self._send(dict(message))
        except (TimeoutError, OSError):
            raise Disconnected from None


def encode_event(value: Any) -> bytes:
    """Return the server-sent event of a JSON value."""
    return (
        b"data: "
        + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        + (b"\n\n")
    )


class EventStream:
    """A response of server-sent events, an ASGI application.

    An error before the first event has its own status; a later one is an event.

    Parameters
    ----------
    events
        Parts of the response: JSON values, several at a time.
    ping_seconds
        Time without an event after which a comment is sent.
    """

    def __init__(
        self, client: Client, events: AsyncIterator[list[Any]], *, ping_seconds: float
    ) -> None:
        self._client = client
        self._events = events
        self._ping_seconds = ping_seconds

    async def send(self) -> None:
        """Send all events.

        Raises
        ------
        ApiError
            The first event is an error.
        Disconnected
            The client has hung up.
        """
        client, started = self._client, False
        following = asyncio.ensure_future(anext(self._events, None))
        try:
            while True:
                try:
                    values = await client.wait(asyncio.shield(following), self._ping_seconds)
                    part = None if values is None else b"".join(map(encode_event, values))
                    following = asyncio.ensure_future(anext(self._events, None))
                except TimeoutError:
                    part = PING
                except Disconnected:
                    raise
                except Exception as error:
                    answer = api_error(error)
                    if not started:
                        raise
                    await self._write(encode_event(answer.body()), last=True)
                    return
                if not started:
                    await client.send(
                        {"type": "http.response.start", "status": 200, "headers": HEADERS}
                    )
                    started = True
                if part is None:
                    await self._write(DONE, last=True)
                    return
                await self._write(part)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _write(self, data: bytes, *, last: bool = False) -> None:
        await self._client.send({"type": "http.response.body", "body": data, "more_body": not last})
