"""The gate before all routes: hosts, origins, keys, limits of bodies, the end, lines of the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptx.errors import GptxError
from gptx.server.errors import ApiError, Unavailable, api_error
from gptx.server.keys import Keys
from gptx.server.logs import Record
from gptx.server.metrics import Metrics
from gptx.server.origins import check_caller
from gptx.server.settings import Settings
from gptx.server.streams import Disconnected

SALT, RECORD = "gptx.salt", "gptx.record"  # keys of a scope
PUBLIC = ("/", "/health", "/favicon.ico")
PUBLIC_FOLDER = "/page/"  # static files
HUNG_UP = 499  # nginx's status of a client that hung up, in the log only
CLOSE = {"Connection": "close"}
logger = logging.getLogger("gptx.server")


class Gate:
    """An ASGI application around the others, which lets requests in.

    Attributes
    ----------
    draining
        True to refuse new requests: the server ends.
    active
        Number of requests without their whole answer.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._keys = Keys(settings.keys)
        self.draining = False
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = (scope.get("client") or ("-",))[0]
        record = Record(scope["method"], scope["path"], host)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        self.active += 1
        try:
            await self._answer(scope, receive, watched, record)
        finally:
            self.active -= 1
            if record.hung_up:
                record.status = record.status or HUNG_UP
                self._metrics.canceled.inc()
            self._measure(scope, record)
            record.write(self._settings.log_format)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        scope[RECORD] = record
        try:
            check_caller(scope, self._settings)
            if scope["path"] != "/health" and self.draining:
                raise Unavailable("the server ends: send the request to another one", "draining")
            scope[SALT] = self._let_in(scope)
            await self._app(scope, receive, send)
        except asyncio.CancelledError:  # the server ends
            record.status = record.status or 503
            raise
        except Exception as error:
            if not isinstance(error, ApiError | GptxError):
                logger.exception("a request failed")
            if not record.status:
                await error_response(error, record)(scope, receive, send)

    def _let_in(self, scope: Scope) -> str:
        """Return the word of the caller; raise ApiError for one without a valid key."""
        path = scope["path"]
        salt = self._keys.salt(Headers(scope=scope).get("authorization"))
        if salt is not None:
            return salt
        if scope["method"] in ("GET", "HEAD") and (
            path in PUBLIC or (path.startswith(PUBLIC_FOLDER) and ".." not in path)
        ):
            return ""
        raise ApiError(
            401,
            "the API key is missing or wrong: send `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer", **CLOSE},
        )

    def _measure(self, scope: Scope, record: Record) -> None:
        metrics, route = self._metrics, scope.get("route")
        path = getattr(route, "path", "other")  # the paths of callers have no limit
        metrics.requests.labels(path, str(record.status)).inc()
        metrics.seconds.observe(record.seconds)
        if record.first_token_seconds is not None:
            metrics.first_token.observe(record.first_token_seconds)
        if record.usage is not None:
            metrics.prompt_tokens.inc(record.usage["prompt_tokens"])
            metrics.generated_tokens.inc(record.usage["completion_tokens"])
            metrics.cached_tokens.inc(record.usage["prompt_tokens_details"]["cached_tokens"])


def error_response(error: BaseException, record: Record | None = None) -> JSONResponse:
    """Return the response for an error; its message is in the log, too."""
    answer = api_error(error)
    if record is not None:
        record.error = answer.message
    return JSONResponse(answer.body(), answer.status, answer.headers)


async def read_body(scope: Scope, receive: Receive, settings: Settings) -> bytes:
    """Return the body of a request.

    Raises
    ------
    ApiError
        It is too large, arrives too slowly, or is of another type than JSON.
    Disconnected
        The client hung up.
    """
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another origin cannot send it unasked
        raise ApiError(
            415, f"the type of the body is {kind[:100] or 'missing'}, expected application/json: "
            "send `Content-Type: application/json`", code="unsupported_media_type", headers=CLOSE,
        )  # fmt: skip
    limit = settings.max_body_bytes
    too_large = ApiError(
        413, f"the body has more than {limit} bytes, which is the limit: send less",
        code="body_too_large", headers=CLOSE,
    )  # fmt: skip
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {settings.body_seconds:g} s",
            code="body_timeout", headers=CLOSE,
        ) from None  # fmt: skip


def shown_prompt(values: Mapping[str, Any]) -> Any:
    """Return the prompt of a request, for a log with prompts."""
    return values.get("prompt", values.get("messages", values.get("input")))
