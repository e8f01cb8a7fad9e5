"""The ASGI application: routes, their fields, errors, start and end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gptx.errors import GptxError
from gptx.server.api import tokens
from gptx.server.api.calls import Call, Limits, collect, stream_answer, whole_answer
from gptx.server.api.chat import chat_call, chat_fields
from gptx.server.api.completions import completion_call, completion_fields
from gptx.server.api.embeddings import embedding_fields, embeddings
from gptx.server.api.fields import BODY, parse
from gptx.server.api.inference import INFERENCE, infer
from gptx.server.api.openapi import Endpoint, docs_page, openapi
from gptx.server.api.parameters import check_state, least
from gptx.server.errors import ApiError, Unavailable, too_long
from gptx.server.gate import RECORD, SALT, Gate, error_response, read_body, shown_prompt
from gptx.server.metrics import CONTENT_TYPE, Metrics
from gptx.server.models import Models
from gptx.server.scheduler import Scheduler
from gptx.server.settings import Settings
from gptx.server.states import States
from gptx.server.streams import Client, Disconnected, send_events

Make = Callable[[Scheduler, str, dict[str, Any], Settings], Call]
Answer = Response | AsyncGenerator[bytes, None]  # the events of a stream
THREADS = 4  # which encode long prompts
MAX_INLINE_CHARACTERS = 2000  # of a prompt that the event loop encodes, in less than 1 ms
logger = logging.getLogger("gptx.server")


class Api:
    """The handlers of the routes, and what they share."""

    def __init__(self, models: Models, settings: Settings, metrics: Metrics) -> None:
        self.models = models
        self.settings = settings
        self.metrics = metrics
        self.states: States[Call] = States(settings.max_states, settings.state_seconds)
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="gptx-http")
        self.endpoints = self._endpoints()
        self.documented = list(self.endpoints)
        self._document: dict[str, Any] | None = None

    def _endpoints(self) -> list[Endpoint]:
        """Return the endpoints with a JSON body."""
        settings = self.settings
        completion, chat = completion_fields(settings), chat_fields(settings)
        return [
            Endpoint("/v1/completions", "Continue prompts.", completion,
                     partial(self.generate, completion_call)),
            Endpoint("/v1/chat/completions", "Answer messages.", chat,
                     partial(self.generate, chat_call)),
            Endpoint("/v1/embeddings", "Return a vector for each text.",
                     embedding_fields(settings), self.embed),
            Endpoint("/model_inference", "Continue token ids greedily.", INFERENCE, self.infer),
            Endpoint("/tokenize", "Return the tokens of a text.", tokens.TOKENIZE,
                     partial(self.with_info, tokens.tokenize)),
            Endpoint("/detokenize", "Return the text of tokens.", tokens.DETOKENIZE,
                     partial(self.with_info, tokens.detokenize)),
        ]  # fmt: skip

    def routes(self) -> list[Route]:
        """Return all routes."""
        return [
            *(Route(one.path, JsonRoute(one, self.settings), methods=["POST"])
              for one in self.endpoints),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/tokenizer_info", self.show_tokenizer),
            Route("/health", self.health),
            Route("/v1/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", self.show_openapi),
            Route("/docs", self.show_docs),
        ]  # fmt: skip

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    async def find(self, name: str | None) -> tuple[str, Scheduler]:
        """Return the name and the scheduler of a model; one of the store is loaded if necessary."""
        wanted = self.models.default if name is None else name
        if wanted is not None and (scheduler := self.models.loaded.get(wanted)) is not None:
            return wanted, scheduler
        found = await self.in_thread(self.models.check_name, name)
        if found not in self.models.loaded and self.models.is_stored(found):
            await self.in_thread(self.models.setup, found)
        return found, self.models.get(found)

    async def generate(self, make: Make, scope: Scope, values: dict[str, Any]) -> Answer:
        """Answer a request of completions or chat; `make` checks its fields."""
        settings, salt, record = self.settings, scope[SALT], scope[RECORD]
        name, scheduler = await self.find(values.get("model"))
        if (state := values.get("state")) is not None:
            check_state(values)
            call = self.states.take(state, salt)
        else:
            # Other clients wait neither for long prompts nor for the templates of chats.
            prompt = values.get("prompt")
            if "messages" not in values and len(str(prompt)) < MAX_INLINE_CHARACTERS:
                call = make(scheduler, name, values, settings)
            else:
                call = await self.in_thread(make, scheduler, name, values, settings)
        streamed = values.get("stream", False)
        budget = least(values.get("budget"), settings.budget)
        limits = Limits(salt, settings.request_seconds, budget)
        if call.copies > call.n and (streamed or limits.budget is not None):
            what = "a stream" if streamed else "a budget"
            raise ApiError(
                400, f"best_of is {call.copies}, above n: the best ones are known at the end, "
                f"which {what} does not wait for", param="best_of", code="invalid_value",
            )  # fmt: skip
        call.begin(state)
        if not streamed:
            deltas = await collect(call, limits, self.states, record)
            return JSONResponse(whole_answer(call, deltas))
        usage = values.get("stream_options", {}).get("include_usage", False)
        return stream_answer(
            call,
            limits,
            self.states,
            record,
            include_usage=usage,
            ping_seconds=settings.ping_seconds,
        )

    async def embed(self, scope: Scope, values: dict[str, Any]) -> Answer:
        """Answer a request of embeddings."""
        name, scheduler = await self.find(values.get("model"))
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                answer = await embeddings(scheduler, name, values)
        except TimeoutError:
            raise too_long(self.settings.request_seconds) from None
        return JSONResponse(answer)

    async def infer(self, scope: Scope, values: dict[str, Any]) -> Answer:
        """Answer a call of `model_inference`."""
        _, scheduler = await self.find(values.get("model"))
        settings = self.settings
        budget = least(values.get("budget"), settings.budget)
        limits = Limits(scope[SALT], settings.request_seconds, budget)
        status, answer = await infer(
            scheduler, values, limits, settings, self.states, scope[RECORD]
        )
        return JSONResponse(answer, status)

    async def with_info(
        self,
        function: Callable[..., Any],
        scope: Scope,
        values: dict[str, Any],
    ) -> Answer:
        """Answer a request that needs the tokenizer only."""
        _, scheduler = await self.find(values.get("model"))
        answer = await self.in_thread(function, scheduler.model.info, values)
        return JSONResponse(answer)

    async def list_models(self, request: HttpRequest) -> Response:
        """Return the list of models."""
        names = await self.in_thread(self.models.names)
        return JSONResponse({"object": "list", "data": [self.models.facts(name) for name in names]})

    async def show_model(self, request: HttpRequest) -> Response:
        """Return the description of one model."""
        name = await self.in_thread(self.models.check_name, request.path_params["name"])
        return JSONResponse(self.models.facts(name))

    async def show_tokenizer(self, request: HttpRequest) -> Response:
        """Return the special tokens and the sizes of the tokenizer."""
        _, scheduler = await self.find(request.query_params.get("model"))
        return JSONResponse(await self.in_thread(tokens.tokenizer_info, scheduler.model.info))

    async def health(self, request: HttpRequest) -> Response:
        """Return 200 if requests are answered, and 503 while loading and without an engine."""
        if not self.models.ready:
            raise Unavailable("the model is being loaded", "loading")
        if not all(one.healthy for one in self.models.loaded.values()):
            raise Unavailable("the engine has ended: restart the server", "engine_gone")
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: HttpRequest) -> Response:
        """Return the metrics."""
        return Response(
            self.metrics.text(), media_type=None, headers={"Content-Type": CONTENT_TYPE}
        )

    async def show_openapi(self, request: HttpRequest) -> Response:
        """Return the OpenAPI document."""
        self._document = self._document or openapi(self.documented)
        return JSONResponse(self._document)

    async def show_docs(self, request: HttpRequest) -> Response:
        """Return the page of all fields."""
        return HTMLResponse(docs_page(self.documented))


class JsonRoute:
    """An ASGI application: a JSON object in, checked by a table of fields; JSON or events out."""

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        self.endpoint = endpoint
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            values = await self._read(scope, receive)
            async with Client(receive, send, send_seconds=self._settings.send_seconds) as client:
                answer = await self.endpoint.handler(scope, values)
                if isinstance(answer, Response):
                    await answer(scope, receive, client.send)
                else:
                    await send_events(client, answer)
        except Disconnected:
            scope[RECORD].hung_up = True

    async def _read(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        fields = self.endpoint.fields
        values: dict[str, Any] = fields.read(
            BODY, parse(await read_body(scope, receive, self._settings))
        )
        if self._settings.log_prompts:
            scope[RECORD].prompt = shown_prompt(values)
        return values if "state" in values else {**fields.defaults, **values}


def make_app(
    models: Models,
    settings: Settings | None = None,
    *,
    extra_routes: Iterable[BaseRoute] = (),
    preload: bool = False,
    on_failure: Callable[[Exception], None] | None = None,
) -> Gate:
    """Return the application of a server.

    Parameters
    ----------
    models
        The served models; they are closed at the end of the application.
    settings
        Limits and settings.
    extra_routes
        Routes of other modules. Their functions may raise `ApiError` and `GptxError`. A GET of "/"
        or of a path below "/page/" needs no key.
    preload
        True to load the default model at the start, in a thread.
    on_failure
        Function that is called if that fails.
    """
    settings = settings or Settings()
    metrics = Metrics(models)
    api = Api(models, settings, metrics)
    extra_routes = list(extra_routes)
    api.documented += [
        route.endpoint.endpoint
        for route in extra_routes
        if isinstance(route, Route) and isinstance(route.endpoint, JsonRoute)
    ]

    def load() -> None:
        try:
            models.setup()
        except Exception as error:
            logger.error("the model cannot be loaded: %s", error)
            if on_failure is not None:
                on_failure(error)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if preload:
            asyncio.get_running_loop().run_in_executor(api.threads, load)
        yield
        models.close()
        api.threads.shutdown(wait=False, cancel_futures=True)

    async def refuse(request: HttpRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            messages = {404: "path does not exist: /docs has all", 405: "method is not allowed"}
            message = f"{request.url.path[:100]}: {messages.get(error.status_code, error.detail)}"
            error = ApiError(error.status_code, message, code="not_found", headers=error.headers)
        return error_response(error, request.scope[RECORD])

    app: ASGIApp = Starlette(
        routes=[*api.routes(), *extra_routes],
        lifespan=lifespan,
        exception_handlers={ApiError: refuse, GptxError: refuse, HTTPException: refuse},
    )
    if settings.cors:
        app = CORSMiddleware(
            app, settings.cors, allow_methods=["GET", "POST", "PATCH", "HEAD", "DELETE"],
            allow_headers=["*"], expose_headers=["*"],
        )  # fmt: skip
    return Gate(app, settings, metrics)
