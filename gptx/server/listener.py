"""The listening server: connections with time limits, and its end by signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptx.server.settings import Settings

CHECKS = 4  # of a connection within its shortest time limit
TICK_SECONDS = 0.05  # between two looks for the end of all requests
BACKLOG = 2048
MAX_HEAD_BYTES = 32 * 1024
OTHER_FILES = 128  # open files of the process that are no connections
SIGNALS = (signal.SIGINT, signal.SIGTERM)
logger = logging.getLogger("gptx.server")


class Connection(H11Protocol):
    """A connection that ends if its client is too slow.

    Limits: the time for the head of a request, the time without a request, and the time in which
    the client has to read a part of the answer.
    """

    settings = Settings()  # replaced in a subclass for each server

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._unread = 0
        self._check: asyncio.TimerHandle | None = None
        if len(self.connections) > self.settings.max_connections:
            transport.abort()
            return
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._check is not None:
            self._check.cancel()
        super().connection_lost(exc)

    def _arm(self) -> None:
        settings = self.settings
        shortest = min(settings.header_seconds, settings.keep_alive_seconds, settings.send_seconds)
        self._check = self.loop.call_later(shortest / CHECKS, self._end_if_idle)

    def _end_if_idle(self) -> None:
        """Abort a connection that waits for a slow client; `close` would wait for it, too."""
        now, unread = self.loop.time(), self.transport.get_write_buffer_size()
        answers = self.cycle is not None and not self.cycle.response_complete
        if unread < self._unread or (answers and unread == 0):
            self._idle_since = now
        self._unread = unread
        limit = self.settings.header_seconds
        if unread:
            limit = self.settings.send_seconds
        elif self.cycle is not None:
            limit += self.settings.keep_alive_seconds
        if now - self._idle_since > limit:
            self.transport.abort()
            return
        self._arm()


class Application(Protocol):
    """An ASGI application that a `Listener` ends.

    Attributes
    ----------
    draining
        True to refuse new requests.
    active
        Number of requests without their whole answer.
    """

    draining: bool
    active: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class Listener(uvicorn.Server):
    """A uvicorn server that finishes running requests after a first signal.

    New requests get 503 until then. A second signal ends the process at once.
    """

    def __init__(self, gate: Application, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._gate = gate
        self._settings = settings
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for address in self.addresses if sockets is None else []:  # not those of a replica
            logger.info("listening at http://%s, documentation at /docs", address)

    @property
    def addresses(self) -> list[str]:
        """Addresses with ports, once the server listens."""
        found = [one.getsockname() for server in self.servers for one in server.sockets]
        return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                for host, port, *_ in found]  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the main thread; the exit code after them is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at once at the second one."""
        if self._gate.draining or self._loop is None:
            os._exit(128 + sig)
        self._gate.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        logger.info(
            "ending: running requests have %g s; a second signal ends them",
            self._settings.drain_seconds,
        )
        self._drain = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        """Wait for running requests, and then end the server."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                while self._gate.active:
                    await asyncio.sleep(TICK_SECONDS)
        self.should_exit = True


def raise_file_limit(max_connections: int) -> None:
    """Raise the limit of open files of the process to what so many connections need."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def make_listener(gate: Application, settings: Settings, *, host: str, port: int) -> Listener:
    """Return the server of an application; `run` runs it."""
    protocol = type("Connection", (Connection,), {"settings": settings})
    config = uvicorn.Config(
        gate,
        host=host,
        port=port,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        backlog=BACKLOG,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=max(1, round(settings.keep_alive_seconds)),
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    return Listener(gate, config, settings)
