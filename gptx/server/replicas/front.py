"""The front process of several replicas: it forwards each request to one of them.

A generation is forwarded to the replica with the fewest waiting requests, then with the longest
common prefix. Other requests, such as uploads, go to the first replica: they belong together.

A request whose replica ends before its answer begins is sent to another one, once. An answer that
has begun ends with an error: an event in a stream, a cut connection otherwise.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from http import HTTPStatus

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from starlette.datastructures import Headers as Read
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from gptx.server.errors import ApiError, Unavailable
from gptx.server.gate import error_response, read_body
from gptx.server.origins import check_caller
from gptx.server.replicas.balancing import blocks_of, ranked
from gptx.server.replicas.process import Replica
from gptx.server.replicas.upstream import Broken, Headers, Unreachable, Upstream, forwarded, get
from gptx.server.settings import Settings
from gptx.server.streams import Client, Disconnected, encode_event, encode_json

MAX_ATTEMPTS = 2  # replicas that a request may lose: it may be the cause of their end
END_SECONDS = 5.0  # for the replicas to end after the last request
PROMPT_FIELDS = ("prompt", "messages", "input", "tokens", "text")
MODELS_FOLDER = "/models/"


class _Lost(Exception):
    """The replica of a request ended before the answer began."""


class Front:
    """The ASGI application of the front process.

    Parameters
    ----------
    command
        Command of a replica, which takes the socket of `process.inherited_sockets`.
    n_replicas
        Number of replicas.
    on_failure
        Function that gets the exit code of a replica that cannot start.

    Attributes
    ----------
    draining
        True to refuse new requests: the server ends.
    active
        Number of requests without their whole answer.
    """

    def __init__(
        self,
        command: Sequence[str],
        n_replicas: int,
        settings: Settings,
        *,
        on_failure: Callable[[int], None],
    ) -> None:
        self.replicas = [Replica(number, command) for number in range(n_replicas)]
        self.draining = False
        self.active = 0
        self._settings = settings
        self._on_failure = on_failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        self.active += 1
        try:
            await self._answer(scope, receive, send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except Disconnected:
            pass
        finally:
            self.active -= 1

    async def _live(self, receive: Receive, send: Send) -> None:
        """Run the replicas from the start of the application to its end."""
        await receive()
        tasks = [asyncio.create_task(replica.keep(self._on_failure)) for replica in self.replicas]
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for replica in self.replicas:
            replica.end()
        _, late = await asyncio.wait(tasks, timeout=END_SECONDS)
        for replica in self.replicas if late else []:
            replica.kill()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self.replicas:
            replica.close()
        await send({"type": "lifespan.shutdown.complete"})

    @property
    def _ready(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.ready]

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        check_caller(scope, self._settings)
        path, method = scope["path"], scope["method"]
        if path in ("/health", "/v1/health"):
            await self._health()(scope, receive, send)
            return
        if self.draining:
            raise Unavailable("the server ends: send the request to another one", "draining")
        if path == "/metrics" and method == "GET":
            response = await self._metrics(scope)
            await response(scope, receive, send)
            return
        is_json = Read(scope=scope).get("content-type", "").startswith("application/json")
        if method == "POST" and is_json and not path.startswith(MODELS_FOLDER):
            body = await read_body(scope, receive, self._settings)
            await self._forward(scope, receive, send, body)
        else:
            await self._forward_to_first(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Forward a request whose body is known to the best replica, or to the next one."""
        blocks, has_state = _describe(body, Read(scope=scope).get("authorization", ""))
        tried: set[int] = set()
        n_lost = 0
        async with Client(receive, send, send_seconds=self._settings.send_seconds) as client:
            while True:
                left = [one for one in self._ready if one.number not in tried]
                replica = next(ranked(left, blocks, self._settings.max_running), None)
                if replica is None or n_lost == MAX_ATTEMPTS:
                    raise _nothing_ready(n_lost)
                tried.add(replica.number)
                # One replica has the state, and the others answer that they do not.
                may_skip = has_state and len(left) > 1
                replica.active += 1
                replica.prefixes.add(blocks)
                try:
                    if await self._pump(replica, scope, client, body, may_skip):
                        return
                except Unreachable:
                    replica.fail()
                except _Lost:
                    replica.fail()
                    n_lost += 1
                finally:
                    replica.active -= 1

    async def _pump(
        self, replica: Replica, scope: Scope, client: Client, body: bytes, may_skip: bool
    ) -> bool:
        """Send a request to a replica, and its answer to the client.

        Returns
        -------
        bool
            False if the answer is 404, and `may_skip`.
        """

        async def parts() -> AsyncIterator[bytes]:
            yield body

        async with Upstream(replica.port) as upstream:
            length = (b"content-length", str(len(body)).encode())
            headers = [*_headers(scope, b"content-length"), length]
            await upstream.send(scope["method"], _target(scope), headers, parts())
            try:
                await upstream.start()
            except Broken as error:
                raise _Lost from error
            if upstream.status == HTTPStatus.SERVICE_UNAVAILABLE:  # a process that has just begun
                raise Unreachable
            if may_skip and upstream.status == HTTPStatus.NOT_FOUND:
                return False
            await self._reply(replica, upstream, client)
            return True

    async def _forward_to_first(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and its body, of any length, to the first replica that is ready."""
        replica = next(iter(self._ready), None)
        if replica is None:
            raise _nothing_ready(0)
        replica.active += 1
        try:
            async with Upstream(replica.port) as upstream:
                headers = _headers(scope)
                if _has_body(scope) and not Read(scope=scope).get("content-length"):
                    headers.append((b"transfer-encoding", b"chunked"))
                body = _body_of(receive) if _has_body(scope) else None
                await upstream.send(scope["method"], _target(scope), headers, body)
                settings = self._settings
                async with Client(receive, send, send_seconds=settings.send_seconds) as client:
                    await upstream.start()
                    await self._reply(replica, upstream, client)
        except (Unreachable, Broken):
            replica.fail()
            raise _nothing_ready(1) from None
        finally:
            replica.active -= 1

    async def _reply(self, replica: Replica, upstream: Upstream, client: Client) -> None:
        """Send the answer of a replica to the client, part by part.

        Raises
        ------
        Disconnected
            The replica ended: an answer that is no stream has no end for the client, either.
        """
        headers = forwarded(upstream.headers, b"date")
        start = {"type": "http.response.start", "status": upstream.status, "headers": headers}
        await client.send(start)
        try:
            async for part in upstream.parts():
                await client.send({"type": "http.response.body", "body": part, "more_body": True})
            last = b""
        except Broken:
            replica.fail()
            if not dict(headers).get(b"content-type", b"").startswith(b"text/event-stream"):
                raise Disconnected from None
            last = encode_event(encode_json(_nothing_ready(1).body()))
        await client.send({"type": "http.response.body", "body": last, "more_body": False})

    def _health(self) -> Response:
        """Return 200 if a replica is ready, and the state of each."""
        if self.draining:
            raise Unavailable("the server ends", "draining")
        facts = [
            {"ready": one.ready, "requests": one.active, "starts": one.starts}
            for one in self.replicas
        ]
        if not self._ready:
            raise Unavailable("the model is being loaded", "loading")
        return JSONResponse({"status": "ok", "replicas": facts})

    async def _metrics(self, scope: Scope) -> Response:
        """Return the metrics of all replicas, each with its number as a label, and of this one."""
        headers = [(n, v) for n, v in scope["headers"] if n == b"authorization"]
        ready = self._ready
        answers = await asyncio.gather(
            *(get(one.port, scope["path"], headers) for one in ready), return_exceptions=True
        )
        texts: dict[int, str] = {}
        for replica, answer in zip(ready, answers, strict=True):
            if isinstance(answer, BaseException):
                replica.fail()
            elif answer[0] != HTTPStatus.OK:  # the caller has no key
                return Response(answer[1], answer[0], media_type="application/json")
            else:
                texts[replica.number] = answer[1].decode()
        if not texts:
            raise _nothing_ready(0)
        return Response(
            generate_latest(_Collected(texts, self.replicas)),
            headers={"Content-Type": CONTENT_TYPE_LATEST},
        )


class _Collected:
    """The metrics of all replicas, in the place of a registry."""

    def __init__(self, texts: dict[int, str], replicas: Sequence[Replica]) -> None:
        self._texts = texts
        self._replicas = replicas

    def collect(self) -> list[Metric]:
        """Return the metrics, each sample with the number of its replica."""
        found: dict[str, Metric] = {}
        for number, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                known = found.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                known.samples += [
                    sample._replace(labels={"replica": str(number), **sample.labels})
                    for sample in family.samples
                ]
        for name, about, values in (
            ("ready", "1 if the replica answers requests.", [x.ready for x in self._replicas]),
            ("requests", "Requests of the replica.", [x.active for x in self._replicas]),
            ("starts", "Processes of the replica so far.", [x.starts for x in self._replicas]),
        ):
            gauge = GaugeMetricFamily(f"gptx_replica_{name}", about, labels=["replica"])
            for number, value in enumerate(values):
                gauge.add_metric([str(number)], float(value))
            found[gauge.name] = gauge
        return list(found.values())


def _nothing_ready(n_lost: int) -> Unavailable:
    """Return the error of a request that no replica can answer."""
    if n_lost:
        return Unavailable("the replica of the request has ended: send it again", "replica_gone")
    return Unavailable("no replica is ready: send the request again", "loading")


def _describe(body: bytes, salt: str) -> tuple[list[bytes], bool]:
    """Return the blocks of a request's prompt, and True if it continues a state.

    An invalid body has no blocks: the replica answers with its error.
    """
    try:
        value = json.loads(body)
        prompt = next((value[name] for name in PROMPT_FIELDS if value.get(name) is not None), "")
        text = prompt if isinstance(prompt, str) else json.dumps(prompt)
        return blocks_of(text, salt), value.get("state") is not None
    except (ValueError, AttributeError, RecursionError):
        return [], False


def _target(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return path + b"?" + query if query else path


def _headers(scope: Scope, *left_out: bytes) -> Headers:
    """Return the headers of a request to a replica, with the client's address."""
    client = (scope.get("client") or ("-",))[0]
    address = (b"x-forwarded-for", client.encode())
    return [*forwarded(scope["headers"], b"x-forwarded-for", b"expect", *left_out), address]


def _has_body(scope: Scope) -> bool:
    headers = Read(scope=scope)
    return "content-length" in headers or "transfer-encoding" in headers


async def _body_of(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return
