"""Hostile connections beside good ones, and long load."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from gptx.generation.text_model import Model
from gptx.server.listener import raise_file_limit
from gptx.server.settings import Settings
from tests.support.cli import posix
from tests.support.serving import ENDLESS, Served, raw_request, serving, wait_until

pytestmark = [pytest.mark.soak, posix]
N_HOSTILE = 1000
N_GOOD = 8
N_REQUESTS = 20  # of each good client
PATH = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "ROMEO:", "max_tokens": 12, "temperature": 0}


def silent(connection: socket.socket) -> None:
    """Send nothing."""


def slow_head(connection: socket.socket) -> None:
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: ")


def slow_body(connection: socket.socket) -> None:
    connection.sendall(raw_request(PATH, BODY)[:-9])


def oversized(connection: socket.socket) -> None:
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999999999\r\n\r\n" + b" " * 1000
    )


def huge_head(connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\n" + b"X-A: " + b"a" * 40_000)


def malformed(connection: socket.socket) -> None:
    connection.sendall(bytes(range(256)) + b"\r\n\r\n")


def hang_up(connection: socket.socket) -> None:
    connection.sendall(raw_request(PATH, {**ENDLESS, "stream": True}))
    connection.close()


def no_reader(connection: socket.socket) -> None:
    connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20)


def bad_json(connection: socket.socket) -> None:
    connection.sendall(raw_request(PATH, "[" * 1000))


KINDS: list[Callable[[socket.socket], None]] = [
    silent, slow_head, slow_body, oversized, huge_head, malformed, hang_up, no_reader, bad_json,
]  # fmt: skip


def good_clients(served: Served, expected: list[Any]) -> float:
    """Run the good clients; return the seconds that they took."""
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(N_REQUESTS):
            answer = served.post(PATH, BODY)
            if answer.status_code != 200 or answer.json()["choices"] != expected:
                wrong.append(answer.text)

    threads = [threading.Thread(target=work) for _ in range(N_GOOD)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    return time.perf_counter() - start


def test_good_clients_beside_a_thousand_hostile_ones(
    shakespeare: Model, record_property: Callable[[str, object], None]
) -> None:
    raise_file_limit(4 * N_HOSTILE)
    settings = Settings(header_seconds=5, body_seconds=5, keep_alive_seconds=5, send_seconds=5)
    with serving(shakespeare, settings) as served, contextlib.ExitStack() as connections:
        expected = served.complete(**BODY)["choices"]
        alone = good_clients(served, expected)
        numbers = random.Random(0)
        for _ in range(N_HOSTILE):
            connection = connections.enter_context(served.connect())
            with contextlib.suppress(OSError):  # the server has closed it already
                numbers.choice(KINDS)(connection)
        beside = good_clients(served, expected)
        record_property("seconds alone", alone)
        record_property("seconds beside hostile clients", beside)
        print(f"good clients: {alone:.2f} s alone, {beside:.2f} s beside {N_HOSTILE} hostile ones")
        wait_until(lambda: len(served.listener.server_state.connections) <= N_GOOD + 2)
        connections.close()
        wait_until(lambda: served.scheduler.idle)
        assert served.complete(**BODY)["choices"] == expected
