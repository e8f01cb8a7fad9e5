"""The end of `gptx serve` by signals, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.cli import posix
from tests.support.serving import ENDLESS, PATIENCE_SECONDS, read_events, wait_until

pytestmark = posix
BODY = {**ENDLESS, "max_tokens": 300, "stream": True}


class Process:
    """A server in a process, which listens once it is made."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "gptx", "serve", "-m", "shakespeare", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stderr is not None
        self.lines: Iterator[str] = iter(self.process.stderr)
        line = next(one for one in self.lines if one.startswith("listening at "))
        self.client = httpx.Client(base_url=line.split()[2].rstrip(","), timeout=PATIENCE_SECONDS)
        wait_until(lambda: self.client.get("/health").status_code == 200)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def post(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": "a", **fields})


@contextmanager
def process(*options: str) -> Iterator[Process]:
    one = Process(*options)
    try:
        yield one
    finally:
        one.client.close()
        one.process.kill()
        one.process.communicate()


def test_running_requests_finish_after_sigterm() -> None:
    """vllm #24885, PR #36666: they were dropped."""
    with process("--drain", "60") as server:
        with server.client.stream("POST", "/v1/completions", json=BODY) as answer:
            parts = answer.iter_text()
            text = next(parts)
            server.signal(signal.SIGTERM)
            wait_until(lambda: server.post(max_tokens=1).status_code == 503)
            text += "".join(parts)
        events = read_events(text)
        assert events[-1] == "[DONE]"
        assert events[-2]["choices"][0]["finish_reason"] == "length"
        assert len(events) > 200
        assert server.process.wait(PATIENCE_SECONDS) == 0


def test_a_second_signal_ends_the_server_at_once() -> None:
    with (
        process() as server,
        server.client.stream(
            "POST", "/v1/completions", json={**BODY, "max_tokens": 10**6}
        ) as answer,
    ):
        next(answer.iter_text())
        server.signal(signal.SIGTERM)
        wait_until(lambda: server.post(max_tokens=1).status_code == 503)
        server.signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_SECONDS) == 143


def test_the_time_to_finish_has_a_limit() -> None:
    with (
        process("--drain", "0.2") as server,
        server.client.stream(
            "POST", "/v1/completions", json={**BODY, "max_tokens": 10**6}
        ) as answer,
    ):
        next(answer.iter_text())
        server.signal(signal.SIGINT)
        assert server.process.wait(PATIENCE_SECONDS) == 0


def test_an_idle_server_ends_with_0_and_its_log_is_json(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alpha\n")
    with process("--log-format", "json", "--api-key-file", os.fspath(keys)) as server:
        assert server.post().status_code == 401
        server.client.headers["Authorization"] = "Bearer alpha"
        assert server.post(max_tokens=1).status_code == 200
        server.signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_SECONDS) == 0
        lines = [json.loads(one) for one in server.lines if one.startswith("{")]
    assert [one["status"] for one in lines if one["path"] == "/v1/completions"] == [401, 200]
