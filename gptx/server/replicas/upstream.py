"""A request to a replica: one connection for each, whose end cancels the request there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

import h11

HOST = "127.0.0.1"
READ_BYTES = 64 * 1024
MAX_HEAD_BYTES = 64 * 1024
Headers = list[tuple[bytes, bytes]]

# Headers of one connection, which a proxy does not forward (RFC 9110, section 7.6.1).
OF_A_CONNECTION = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip


class Unreachable(Exception):
    """The replica did not take the connection, or is not ready: it has done nothing."""


class Broken(Exception):
    """The connection ended before the end of the answer."""


def forwarded(headers: Iterable[tuple[bytes, bytes]], *left_out: bytes) -> Headers:
    """Return the headers without those of a connection and those to leave out."""
    dropped = OF_A_CONNECTION | set(left_out)
    return [(name, value) for name, value in headers if name.lower() not in dropped]


class Upstream:
    """A request to a replica, and its answer.

    It is an asynchronous context manager that closes the connection.

    Attributes
    ----------
    status, headers
        Status and headers of the answer, after `start`.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection = h11.Connection(
            our_role=h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES
        )
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.status = 0
        self.headers: Headers = []

    async def __aenter__(self) -> Upstream:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.transport.abort()  # also an unfinished request

    async def send(
        self, method: str, target: bytes, headers: Headers, body: AsyncIterator[bytes] | None = None
    ) -> None:
        """Connect, and send a request; None is no body.

        Raises
        ------
        Unreachable, Broken
        """
        try:
            self._reader, self._writer = await asyncio.open_connection(HOST, self._port)
        except OSError as error:
            raise Unreachable(str(error)) from error
        sent = [*headers, (b"connection", b"close")]
        await self._write(h11.Request(method=method, target=target, headers=sent))
        if body is not None:
            async for data in body:
                if data:
                    await self._write(h11.Data(data=data))
        await self._write(h11.EndOfMessage())

    async def _write(self, event: h11.Event) -> None:
        assert self._writer is not None
        # A replica may answer, and close, before it has the whole body.
        with contextlib.suppress(ConnectionError):
            self._writer.write(self._connection.send(event) or b"")
            await self._writer.drain()

    async def start(self) -> None:
        """Read the status and the headers of the answer.

        Raises
        ------
        Broken
        """
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                self.status, self.headers = event.status_code, list(event.headers)
                return

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the parts of the answer's body as they arrive.

        Raises
        ------
        Broken
        """
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                yield bytes(event.data)

    async def _next(self) -> h11.Event:
        assert self._reader is not None
        try:
            while (event := self._connection.next_event()) is h11.NEED_DATA:
                self._connection.receive_data(await self._reader.read(READ_BYTES))
        except (OSError, h11.RemoteProtocolError) as error:
            raise Broken(str(error)) from error
        if isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            raise Broken("the connection was closed")
        assert isinstance(event, h11.Event)
        return event


async def get(port: int, path: str, headers: Headers) -> tuple[int, bytes]:
    """Return the status and the body of a GET.

    Raises
    ------
    Unreachable, Broken
    """
    async with Upstream(port) as request:
        await request.send("GET", path.encode(), [(b"host", HOST.encode()), *headers])
        await request.start()
        return request.status, b"".join([part async for part in request.parts()])
