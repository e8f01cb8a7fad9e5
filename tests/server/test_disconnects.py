"""Clients that hang up, in each phase, and clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gptx.generation.text_model import Model
from gptx.server.settings import Settings
from gptx.server.streams import Client, Disconnected
from tests.support.serving import (
    ENDLESS,
    PATIENCE_SECONDS,
    Served,
    held,
    raw_request,
    serving,
    wait_until,
)

PATH = "/v1/completions"


def is_closed(connection: socket.socket) -> bool:
    """Wait for the end of a connection without an answer."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@contextlib.contextmanager
def loop_held(served: Served) -> Iterator[None]:
    """Hold the event loop within a context."""
    assert served.listener._loop is not None
    reached, go = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        go.wait(PATIENCE_SECONDS)

    served.listener._loop.call_soon_threadsafe(wait)
    assert reached.wait(PATIENCE_SECONDS)
    try:
        yield
    finally:
        go.set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(served: Served, stream: bool) -> None:
    """llama.cpp #24496; vllm-mlx PR #457 and starlette #297: only streams noticed it."""
    before = served.scheduler
    connection = served.start(PATH, {**ENDLESS, "stream": stream})
    wait_until(lambda: before.running == 1)
    connection.close()
    wait_until(lambda: before.running == 0)
    assert served.complete(max_tokens=2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_in_the_queue_is_never_computed(
    served: Served, stream: bool
) -> None:
    """llama.cpp #13262."""
    scheduler = served.scheduler
    with held(scheduler):
        connection = served.start(PATH, {**ENDLESS, "stream": stream})
        wait_until(lambda: scheduler.waiting == 1)
        connection.close()
        wait_until(lambda: scheduler.waiting == 0)
    assert scheduler.running == 0


def test_a_crowd_that_has_hung_up_already_takes_no_place(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good clients got "the queue is full": the event loop had read all requests before an end."""
    submitted = []
    submit = served.scheduler.submit

    def watched(*args: Any, **options: Any) -> Any:
        submitted.append(args)
        return submit(*args, **options)

    monkeypatch.setattr(served.scheduler, "submit", watched)
    with loop_held(served):
        for _ in range(50):
            served.start(PATH, ENDLESS).close()
    assert served.complete(max_tokens=2)
    assert len(submitted) == 1


def test_a_client_that_hangs_up_while_its_prompt_is_read(
    served: Served, shakespeare: Model
) -> None:
    """llama.cpp #7418, ik_llama.cpp #1020: many prompts, which take several steps."""
    scheduler = served.scheduler
    body = {"prompt": [[5] * 250] * 64, "max_tokens": 1, "logprobs": 0, "echo": True}
    connection = served.start(PATH, body)
    wait_until(lambda: scheduler.running == 1)
    connection.close()
    wait_until(lambda: scheduler.running == 0)


def test_a_hundred_clients_that_hang_up_in_a_stream(served: Served) -> None:
    """mlx-lm #677: the BrokenPipeError of one client ended the server."""
    body = {"prompt": "ROMEO:", "max_tokens": 200, "stream": True}
    for _ in range(100):
        with served.start(PATH, body) as connection:
            assert connection.recv(12) == b"HTTP/1.1 200"
    wait_until(lambda: served.scheduler.idle)
    assert served.complete(max_tokens=2)


def test_a_client_that_hangs_up_before_its_body(served: Served) -> None:
    for data in (b"", b"POST", raw_request(PATH, {"prompt": "a"})[:-5]):
        with served.connect() as connection:
            connection.sendall(data)
    wait_until(lambda: served.gate.active == 0)
    assert served.complete(max_tokens=2)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize"])
def test_other_calls_of_a_client_that_hangs_up(served: Served, path: str) -> None:
    body: dict[str, Any] = (
        {"input": ["a"] * 100} if path == "/v1/embeddings" else {"prompt": "a " * 10**5}
    )
    served.start(path, body).close()
    wait_until(lambda: served.gate.active == 0)
    assert served.complete(max_tokens=2)


def test_a_client_that_does_not_read_is_dropped(shakespeare: Model) -> None:
    settings = Settings(send_seconds=0.2)
    with serving(shakespeare, settings) as served, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        wait_until(lambda: served.gate.active == 1)
        wait_until(lambda: not served.listener.server_state.connections)
        assert served.client.get("/health").status_code == 200


def test_a_part_that_is_not_read_in_time_ends_the_request() -> None:
    async def receive() -> dict[str, str]:
        await asyncio.sleep(PATIENCE_SECONDS)
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        await asyncio.sleep(PATIENCE_SECONDS)

    async def run() -> None:
        with pytest.raises(Disconnected):
            async with Client(receive, send, send_seconds=0.01) as client:
                await client.send({"type": "http.response.body"})

    asyncio.run(run())


def test_a_client_ends_only_what_it_has_to() -> None:
    """The end of the connection is no end of the task, and the end of the task no hang-up."""

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def endless() -> dict[str, str]:
        await asyncio.sleep(PATIENCE_SECONDS)
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        pass

    async def late_end() -> dict[str, str]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    entered = []

    async def wait(receive: Any) -> None:
        async with Client(receive, send, send_seconds=PATIENCE_SECONDS):
            entered.append(receive)
            await asyncio.sleep(PATIENCE_SECONDS)

    async def run() -> None:
        for end in (receive, late_end):
            with pytest.raises(Disconnected):
                await wait(end)
        assert entered == [late_end]
        await asyncio.sleep(0)  # the cancellation is over
        async with Client(late_end, send, send_seconds=PATIENCE_SECONDS) as client:
            await client.send({"type": "http.response.body"})
            await asyncio.sleep(0.02)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await wait(endless)

    asyncio.run(run())


def test_slow_heads_and_idle_connections_are_closed(shakespeare: Model) -> None:
    settings = Settings(header_seconds=0.2, keep_alive_seconds=0.2)
    with serving(shakespeare, settings) as served:
        silent, slow, idle = (served.connect() for _ in range(3))
        slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n")
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(12) == b"HTTP/1.1 200"
        for connection in (silent, slow):
            assert is_closed(connection)
        wait_until(lambda: not served.listener.server_state.connections)
        for connection in (silent, slow, idle):
            connection.close()


def test_a_slow_body_is_408(shakespeare: Model) -> None:
    settings = Settings(body_seconds=0.1)
    with serving(shakespeare, settings) as served, served.connect() as connection:
        connection.sendall(raw_request(PATH, {"prompt": "a"})[:-3])
        assert connection.recv(12) == b"HTTP/1.1 408"


def test_a_request_has_a_time_limit(shakespeare: Model) -> None:
    with serving(shakespeare, Settings(request_seconds=0.2)) as served:
        error = served.error(**ENDLESS)
        assert (error["status"], error["code"]) == (504, "timeout")
        events = served.events(PATH, **ENDLESS)
        assert events[-1]["error"]["code"] == "timeout"
        wait_until(lambda: served.scheduler.running == 0)


def test_connections_have_a_limit(shakespeare: Model) -> None:
    with serving(shakespeare, Settings(max_connections=3)) as served:
        some = [served.connect() for _ in range(3)]
        wait_until(lambda: len(served.listener.server_state.connections) == 3)
        with served.connect() as further:
            assert is_closed(further)
        for connection in some:
            connection.close()
        wait_until(lambda: not served.listener.server_state.connections)
        assert served.client.get("/health").status_code == 200


def test_the_queue_has_a_limit_for_clients(shakespeare: Model) -> None:
    """vllm #41250, omlx #785, Guardrails #2332: an overload had no clear answer."""
    with serving(shakespeare, Settings(max_queue=2)) as served:
        body = {"prompt": "ROMEO:", "max_tokens": 2}
        with held(served.scheduler):
            waiting = []
            for n in range(2):
                waiting.append(served.start(PATH, body))
                wait_until(lambda n=n: served.scheduler.waiting == n + 1)  # type: ignore[misc]
            answer = served.post(PATH, body)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["type"] == "rate_limit_error"
        for connection in waiting:
            assert connection.recv(12) == b"HTTP/1.1 200"
            connection.close()
