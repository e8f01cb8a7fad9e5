"""`gptx serve --replicas N` in child processes, on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

PATIENCE_SECONDS = 300.0  # after which a test gives up; the kernels may have to be compiled
ENDLESS = {"prompt": "ROMEO:", "max_tokens": 10**6, "overflow": "slide", "ignore_eos": True}
STREAM_END = "[DONE]"


def wait_until(is_true: Callable[[], Any]) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        assert time.monotonic() < end, "the condition does not become true"
        time.sleep(0.01)


def read_events(answer: httpx.Response) -> Iterator[Any]:
    """Yield the events of a stream as they arrive; the last one is "[DONE]"."""
    for line in answer.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == STREAM_END else json.loads(data)


class ReplicaServer:
    """A front process and its replicas.

    Attributes
    ----------
    process
        The front process.
    client
        An HTTP client of it.
    lines
        Lines of its standard error.
    """

    def __init__(self, *options: str, model: str = "shakespeare") -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptx", "serve", "-m", model, "--port", "0", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.client = httpx.Client(timeout=PATIENCE_SECONDS)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line.rstrip("\n"))

    def wait_until_ready(self, n: int = 2) -> None:
        """Wait until the server listens and `n` replicas answer."""
        wait_until(lambda: self.found(r"listening at (\S+),") or self.process.poll() is not None)
        [url] = self.found(r"listening at (\S+),")
        self.client.base_url = httpx.URL(url)
        wait_until(lambda: sum(replica["ready"] for replica in self.replicas()) == n)

    def found(self, pattern: str) -> list[str]:
        """Return what a pattern finds in the lines of standard error."""
        return [match[1] for line in list(self.lines) if (match := re.search(pattern, line))]

    def replicas(self) -> list[dict[str, Any]]:
        """Return the state of each replica; none while no replica is ready."""
        return list(self.client.get("/health").json().get("replicas", []))

    def pid(self, number: int) -> int:
        """Return the newest process of a replica."""
        pattern = rf"replica {number} is ready, process (\d+)"
        wait_until(lambda: len(self.found(pattern)) == self.replicas()[number]["starts"])
        return int(self.found(pattern)[-1])

    def kill(self, number: int) -> None:
        """End a replica as `kill -9` does."""
        os.kill(self.pid(number), signal.SIGKILL)

    def wait_for_start(self, number: int, starts: int) -> None:
        """Wait until a process of a replica answers that is at least the `starts`-th one."""

        def is_ready() -> bool:
            found = self.replicas()
            return bool(found) and found[number]["ready"] and found[number]["starts"] >= starts

        wait_until(is_ready)

    def complete(self, **fields: Any) -> httpx.Response:
        """Return the answer of /v1/completions."""
        return self.client.post("/v1/completions", json=fields)

    @contextmanager
    def stream(self, **fields: Any) -> Iterator[Iterator[Any]]:
        """Yield the events of a stream as they arrive; the last one is "[DONE]"."""
        body = {**fields, "stream": True}
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            yield read_events(answer)

    def metric(self, name: str) -> dict[str, float]:
        """Return the value of a metric without other labels, by replica."""
        text = self.client.get("/metrics").text
        pattern = rf'^{name}{{replica="(\d+)"}} (\S+)$'
        return {number: float(value) for number, value in re.findall(pattern, text, re.MULTILINE)}

    def close(self) -> None:
        """End all processes."""
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(PATIENCE_SECONDS)
        finally:
            self.process.kill()
            self._reader.join(PATIENCE_SECONDS)


@contextmanager
def serving(*options: str, n: int = 2) -> Iterator[ReplicaServer]:
    """Serve the embedded model with two replicas, until the end of the context."""
    server = ReplicaServer("--replicas", str(n), *options)
    try:
        server.wait_until_ready(n)
        yield server
    finally:
        server.close()


def is_alive(pid: int) -> bool:
    """Return True if a process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
