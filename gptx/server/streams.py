"""Server-sent events, and the connection of a request: clients that hang up or do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any

from starlette.types import Message, Receive, Send

from gptx.server.errors import api_error

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
TURNS = 4  # of the event loop, after which an end that is in the connection's buffer has an effect
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Disconnected(Exception):
    """The client has hung up, or does not read."""


class Client:
    """The connection of one request.

    Use it as an asynchronous context manager in the task of the request, whose body has been read.
    Inside, the end of the connection cancels whatever the task waits for, and the context raises
    Disconnected. So does a message that the client does not read in time. Entering raises it for a
    client that has hung up already: a crowd of those would fill the queue.

    Parameters
    ----------
    receive, send
        Channels of the ASGI server.
    send_seconds
        Time in which the client has to read a message.
    """

    def __init__(self, receive: Receive, send: Send, *, send_seconds: float) -> None:
        self._receive = receive
        self._send = send
        self._send_seconds = send_seconds
        self._is_gone = False
        self._deadline = math.inf  # of the message that is being sent

    async def __aenter__(self) -> Client:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._watcher = asyncio.create_task(self._watch())
        self._timer = self._loop.call_later(self._send_seconds, self._check)
        try:
            for _ in range(TURNS):
                await asyncio.sleep(0)
        except asyncio.CancelledError as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._watcher.cancel()
        if self._is_gone and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise Disconnected from None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._end()

    def _check(self) -> None:
        """End the request if its message is late: one timer for all messages, which runs again."""
        now = self._loop.time()
        if now >= self._deadline:
            self._end()
        else:
            next_time = min(self._deadline, now + self._send_seconds)
            self._timer = self._loop.call_at(next_time, self._check)

    def _end(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            self._task.cancel()

    async def send(self, message: Message) -> None:
        """Send a message; the last one ends the watch, as the connection may serve other requests.

        Raises
        ------
        Disconnected
            The connection has ended.
        """
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._watcher.cancel()
        self._deadline = self._loop.time() + self._send_seconds
        try:
            await self._send(message)
        except OSError:
            raise Disconnected from None
        self._deadline = math.inf


def encode_json(value: Any) -> bytes:
    """Return a JSON value as UTF-8, without spaces."""
    return ENCODER.encode(value).encode()


def encode_event(data: bytes) -> bytes:
    """Return the server-sent event of one line."""
    return b"data: " + data + b"\n\n"


async def send_events(client: Client, parts: AsyncGenerator[bytes, None]) -> None:
    """Send a response of server-sent events, and close the generator of its parts.

    An error before the first part has its own status; a later one is an event.

    Parameters
    ----------
    parts
        Events, several at a time; a part without any is sent as a comment, which keeps the
        connection open.

    Raises
    ------
    ApiError, GptxError
        The first part is an error.
    Disconnected
        The connection has ended.
    """
    has_begun = False
    async with contextlib.aclosing(parts):
        while True:
            try:
                part = await anext(parts, None)
                is_last = part is None
                data = DONE if part is None else part or PING
            except Exception as error:
                if not has_begun:
                    raise
                is_last = True
                data = encode_event(encode_json(api_error(error).body()))
            if not has_begun:
                has_begun = True
                await client.send(
                    {"type": "http.response.start", "status": 200, "headers": HEADERS}
                )
            await client.send(
                {"type": "http.response.body", "body": data, "more_body": not is_last}
            )
            if is_last:
                return
