"""The server's application in this process, without a socket.

So a line of a batch is checked and answered by the code that answers a request over HTTP.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, NamedTuple, Self

from starlette.types import ASGIApp

from gptx.generation.text_model import Model
from gptx.server.app import make_app
from gptx.server.models import Models
from gptx.server.settings import Settings

MAX_BODY_BYTES = 2**30
Message = MutableMapping[str, Any]


class Response(NamedTuple):
    """The answer to a request.

    Attributes
    ----------
    status
        HTTP status.
    body
        JSON value.
    """

    status: int
    body: Any


class Server:
    """The server of one model, which answers calls of `post`.

    It is an asynchronous context manager: at its end the engine thread ends.

    Parameters
    ----------
    max_queue
        Number of requests that may wait for the engine.
    """

    def __init__(self, model: Model, max_queue: int) -> None:
        settings = Settings(
            max_body_bytes=MAX_BODY_BYTES, max_queue=max_queue, request_seconds=math.inf
        )
        models = Models(settings=settings)
        models.add(model.name, model)
        self._models = models
        self._app = make_app(models, settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._models.close()

    async def post(self, path: str, body: Any) -> Response:
        """Send a request, and return its answer; a cancel of the caller cancels it."""
        return await post(self._app, path, body)


async def post(app: ASGIApp, path: str, body: Any) -> Response:
    """Send one request, and return its answer; a cancel ends the request."""
    data = json.dumps(body).encode()
    left = [{"type": "http.request", "body": data, "more_body": False}]
    status = 0
    parts: list[bytes] = []

    async def receive() -> Message:
        if left:
            return left.pop()
        await asyncio.Event().wait()  # the client never hangs up
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
        ],
        "client": None,
        "server": None,
        "state": {},
    }
    await app(scope, receive, send)
    return Response(status, json.loads(b"".join(parts)))
