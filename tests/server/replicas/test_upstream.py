"""Requests to a replica: answers in parts, and connections that end too early."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from gptx.server.replicas.upstream import Broken, Unreachable, Upstream, forwarded, get

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


async def body(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def ask(answer: bytes) -> tuple[int, list[bytes], bytes]:
    """Send a POST to a server with this answer; return status, parts, and what it got."""
    got = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        got = await reader.readuntil(b"0\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def run() -> tuple[int, list[bytes], bytes]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, Upstream(server.sockets[0].getsockname()[1]) as upstream:
            headers = [(b"host", b"x"), (b"transfer-encoding", b"chunked")]
            await upstream.send("POST", b"/path?q=1", headers, body(b"ab", b"", b"c"))
            await upstream.start()
            parts = [part async for part in upstream.parts()]
            return upstream.status, parts, got

    return asyncio.run(run())


def test_a_request_and_its_answer() -> None:
    answer = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n1\r\n!\r\n0\r\n\r\n"
    status, parts, got = ask(answer)
    assert (status, b"".join(parts)) == (200, b"hi!")
    assert got.startswith(b"POST /path?q=1 HTTP/1.1\r\n")
    assert got.endswith(b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")
    assert b"connection: close" in got.lower()


def test_an_interim_answer_is_skipped() -> None:
    answer = b"HTTP/1.1 103 Early Hints\r\n\r\n" + HEAD + b"Content-Length: 2\r\n\r\nhi"
    assert ask(answer)[:2] == (200, [b"hi"])


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        HEAD,
        HEAD + b"Content-Length: 5\r\n\r\nhi",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n",
        b"nonsense\r\n\r\n",
    ],
)
def test_an_answer_that_ends_too_early(answer: bytes) -> None:
    with pytest.raises(Broken):
        ask(answer)


def test_a_port_without_a_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(Unreachable):
        asyncio.run(get(port, "/health", []))


def test_headers_of_a_connection_are_not_forwarded() -> None:
    headers = [(b"Host", b"x"), (b"Connection", b"close"), (b"TE", b"x"), (b"Date", b"now")]
    assert forwarded(headers, b"date") == [(b"Host", b"x")]
