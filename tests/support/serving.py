"""A server on loopback, in a thread of this process, and what its tests share."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
from starlette.routing import BaseRoute

from gptx.generation.batching import Batch
from gptx.generation.text_model import Model
from gptx.server.app import make_app
from gptx.server.gate import Gate
from gptx.server.listener import Listener, make_listener
from gptx.server.models import Models
from gptx.server.scheduler import Scheduler
from gptx.server.settings import Settings
from tests.support import short_ticks

short_ticks.install()

PATIENCE_SECONDS = 60.0  # after which a test gives up
NAME = "shakespeare"
ENDLESS = {"prompt": "ROMEO:", "max_tokens": 10**6, "overflow": "slide", "ignore_eos": True}


class Served:
    """A server that listens on loopback.

    Attributes
    ----------
    client
        An HTTP client of it, with the first of its keys.
    models, gate, listener
        Its parts.
    """

    def __init__(
        self,
        models: Models,
        settings: Settings,
        extra_routes: Sequence[BaseRoute] = (),
        preload: bool = False,
    ) -> None:
        self.models = models
        self.gate: Gate = make_app(models, settings, extra_routes=extra_routes, preload=preload)
        self.listener: Listener = make_listener(self.gate, settings, host="127.0.0.1", port=0)
        self._thread = threading.Thread(target=self.listener.run)
        self._thread.start()
        wait_until(lambda: self.listener.started or not self._thread.is_alive())
        self.port = int(self.listener.addresses[0].rpartition(":")[2])
        self.url = f"http://127.0.0.1:{self.port}"
        headers = {"Authorization": f"Bearer {settings.keys[0]}"} if settings.keys else {}
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_SECONDS, headers=headers)

    def close(self) -> None:
        """End the server."""
        self.client.close()
        self.listener.should_exit = True
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()

    @property
    def scheduler(self) -> Scheduler:
        """Scheduler of the model."""
        return self.models.get(NAME)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Send a JSON body, in ASCII: a lone surrogate is possible."""
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return self.client.post(path, content=json.dumps(body), headers=headers, **options)

    def complete(self, prompt: Any = "ROMEO:", **fields: Any) -> dict[str, Any]:
        """Return the answer of /v1/completions; greedy unless `fields` say otherwise."""
        answer = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path: str, **fields: Any) -> list[Any]:
        """Return the events of a stream, the last of which is "[DONE]"."""
        answer = self.post(path, {**fields, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        return read_events(answer.text)

    def error(self, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
        """Return the error of a request that is refused, with its status."""
        answer = self.post(path, fields)
        assert answer.status_code >= 400, answer.text
        return {"status": answer.status_code, **answer.json()["error"]}

    def connect(self) -> socket.socket:
        """Return a connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS)

    def start(self, path: str, body: Any, key: str | None = None) -> socket.socket:
        """Send a request, and return its connection without reading the answer."""
        connection = self.connect()
        connection.sendall(raw_request(path, body, key))
        return connection


def raw_request(path: str, body: Any, key: str | None = None) -> bytes:
    """Return the bytes of a request."""
    data = json.dumps(body).encode()
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{authorization}"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode() + data


def read_events(text: str) -> list[Any]:
    """Return the values of server-sent events."""
    assert text.endswith("\n\n")
    events = []
    for part in text.removesuffix("\n\n").split("\n\n"):
        if part.startswith(":"):
            continue
        data = part.removeprefix("data: ")
        assert data != part
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


def is_near(a: Any, b: Any) -> bool:
    """Compare JSON values; log-probabilities round apart in another batch or after a prefix."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-5
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_near(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(is_near, a, b))
    return bool(a == b)


@contextlib.contextmanager
def serving(model: Model, settings: Settings | None = None, **options: Any) -> Iterator[Served]:
    """Serve a model on loopback within a context."""
    settings = settings or Settings()
    model.logits([1])  # compiles the kernels: no request waits for that
    models = Models(settings=settings)
    models.add(NAME, model)
    served = Served(models, settings, **options)
    try:
        yield served
    finally:
        served.close()


class StepClock:
    """A clock on which each step of the batch takes the same time, whatever the machine does."""

    def __init__(self, step_seconds: float) -> None:
        self.now = 0.0
        self.step_seconds = step_seconds

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def step_clock(scheduler: Scheduler, step_seconds: float = 0.02) -> Iterator[StepClock]:
    """Let a scheduler use a `StepClock` within a context."""
    clock, step = StepClock(step_seconds), Batch.step

    def timed_step(batch: Batch) -> Any:
        clock.now += clock.step_seconds
        return step(batch)

    before = scheduler.clock
    wait_until(lambda: scheduler.idle)
    with held(scheduler):
        scheduler.pace.clear()
        scheduler.clock, Batch.step = clock, timed_step  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        wait_until(lambda: scheduler.idle)
        with held(scheduler):
            scheduler.pace.clear()
            scheduler.clock, Batch.step = before, step  # type: ignore[method-assign]


@contextlib.contextmanager
def held(scheduler: Scheduler) -> Iterator[None]:
    """Hold the engine thread between two steps within a context."""
    reached, go = threading.Event(), threading.Event()

    def wait(model: Model) -> None:
        reached.set()
        go.wait(PATIENCE_SECONDS)

    call = scheduler.call(wait)
    assert reached.wait(PATIENCE_SECONDS)
    try:
        yield
    finally:
        go.set()
        call.result(PATIENCE_SECONDS)


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait for a condition; a test that waits too long fails."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.002)
