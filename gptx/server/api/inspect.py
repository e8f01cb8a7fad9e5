"""`POST /inspect`: tokens, probabilities, attention and logit lens of a text, for the page.

The engine thread reads the text in chunks, so that other requests have their steps in between.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from gptx.generation.logprobs import Top
from gptx.generation.model_info import ModelInfo
from gptx.generation.text_model import Model
from gptx.server.api.fields import Choice, Field, Many, Record, Text, Whole
from gptx.server.api.openapi import Endpoint
from gptx.server.api.parameters import MAX_COUNT, MAX_IDS, ignored_fields, model_field
from gptx.server.api.reading import EMBEDDINGS, Reading, stream_of
from gptx.server.api.writing import token_bytes
from gptx.server.app import JsonRoute
from gptx.server.errors import ApiError
from gptx.server.models import Models
from gptx.server.page_files import page_routes
from gptx.server.scheduler import Scheduler

T = TypeVar("T")
Pairs = list[tuple[int, float]]  # token ids and log-probabilities, the most probable first

PARTS = ("model", "tokens", "logprobs", "attention", "lens")
COMPUTED = {"logprobs", "attention", "lens"}
MAX_TOP = 100
DEFAULT_TOP = 10
MAX_PATTERN_BYTES = 2**26  # of one answer, before base64
MAX_LENS_TOKENS = 2**17  # layers · positions · top of one answer
DECIMALS = 6  # of log-probabilities

INSPECT = Record(
    (
        model_field(),
        Field("prompt", Text(1), "Text to read; <|endoftext|> in it is plain text."),
        Field("tokens", Many(Whole(0, MAX_COUNT), MAX_IDS, 1), "Token ids, in place of a text."),
        Field(
            "what",
            Many(Choice(PARTS), len(PARTS), 1),
            "Parts of the answer. model: sizes. tokens: ids, texts, bytes. logprobs: those of the "
            "tokens, and what comes next. attention: pattern of one layer. lens: the most "
            "probable next tokens of each layer.",
            ["tokens", "logprobs"],
        ),
        Field(
            "top",
            Whole(1, MAX_TOP),
            "Number of most probable tokens at each position.",
            DEFAULT_TOP,
        ),
        Field(
            "layers",
            Many(Whole(0, MAX_COUNT), 2**16, 1),
            "Numbers of layers, from 0: one for attention, any for lens. By default, lens has "
            "the embeddings and all layers.",
        ),
        Field(
            "positions",
            Many(Whole(0, MAX_COUNT), 2, 2),
            "First position of lens, and the one after the last; by default all.",
        ),
        *ignored_fields(),
    )
)


def endpoint(models: Models) -> Endpoint:
    """Return the endpoint `/inspect`."""

    async def inspect(scope: Scope, values: dict[str, Any]) -> Response:
        name = await asyncio.to_thread(models.check_name, values.get("model"))
        if name not in models.loaded and models.is_stored(name):
            await asyncio.to_thread(models.setup, name)
        answer = await inspection(models.get(name), values)
        return await asyncio.to_thread(JSONResponse, answer)  # of many megabytes, maybe

    about = "Return tokens, probabilities, attention and logit lens of a text."
    return Endpoint("/inspect", about, INSPECT, inspect)


def routes(models: Models) -> list[BaseRoute]:
    """Return the routes of the page: its files, and `POST /inspect`."""
    inspect = endpoint(models)
    handler = JsonRoute(inspect, models.settings)
    return [Route(inspect.path, handler, methods=["POST"]), *page_routes()]


async def inspection(scheduler: Scheduler, values: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request, whose fields `INSPECT` has read.

    Raises
    ------
    ApiError, GptxError
        A field does not fit the model, or the model computed a NaN or an infinity.
    """
    info, parts = scheduler.model.info, set(values["what"])
    answer: dict[str, Any] = {"object": "inspection"}
    if "model" in parts:
        answer["model"] = _sizes(info)
    if parts == {"model"}:
        return answer
    ids = await asyncio.to_thread(_read_ids, info, values)
    if "tokens" in parts:
        answer["tokens"] = await asyncio.to_thread(_describe, info, ids)
    if parts & COMPUTED:
        answer |= await _Inspection(scheduler, Question.of(info, ids, values)).answer()
    return answer


@dataclass(frozen=True)
class Question:
    """The parts of an answer that the model computes, checked against its sizes.

    Attributes
    ----------
    ids
        S token ids.
    logprobs
        True for the log-probabilities of the tokens.
    attention
        Layer of the pattern; None for none.
    lens
        Names of the residual streams of the lens.
    first, stop
        Positions of the lens.
    top
        Number of most probable tokens at each position.
    """

    ids: list[int]
    logprobs: bool
    attention: int | None
    lens: list[str]
    first: int
    stop: int
    top: int

    @classmethod
    def of(cls, info: ModelInfo, ids: list[int], values: dict[str, Any]) -> Question:
        """Check the fields of a request.

        Raises
        ------
        ApiError
            A field does not fit the model, or the answer is too large.
        """
        parts, config = set(values["what"]), info.config
        if len(ids) > config.n_positions:
            raise ApiError(
                400,
                f"{len(ids)} tokens were given, the context holds {config.n_positions}: give fewer",
                param="tokens" if "tokens" in values else "prompt",
                code="context_length_exceeded",
            )
        layers = values.get("layers")
        if layers and max(layers) >= config.n_layer:
            raise _invalid("layers", f"has {max(layers)}, expected 0 to {config.n_layer - 1}")
        first, stop = values.get("positions", (0, len(ids)))
        if not 0 <= first < stop <= len(ids):
            expected = f"expected two rising numbers from 0 to {len(ids)}, the number of tokens"
            raise _invalid("positions", f"is {[first, stop]}, {expected}")
        attention = None
        if "attention" in parts:
            if layers is None or len(layers) != 1:
                raise _invalid("layers", "is needed for attention: give the number of one layer")
            attention = layers[0]
            n_bytes = 2 * config.n_head * len(ids) ** 2
            if n_bytes > MAX_PATTERN_BYTES:
                raise _invalid(
                    "tokens",
                    f"has {len(ids)} tokens, whose attention has {n_bytes} bytes, expected at most "
                    f"{MAX_PATTERN_BYTES}: give fewer",
                )
        lens: list[str] = []
        top = min(values["top"], config.vocab_size)
        if "lens" in parts:
            every = [EMBEDDINGS, *map(stream_of, range(config.n_layer))]
            lens = every if layers is None else [stream_of(layer) for layer in layers]
            if len(lens) * (stop - first) * top > MAX_LENS_TOKENS:
                raise _invalid(
                    "positions",
                    f"has {stop - first} positions for {len(lens)} layers and {top} tokens each, "
                    f"expected a product of at most {MAX_LENS_TOKENS}: give fewer positions",
                )
        return cls(ids, "logprobs" in parts, attention, lens, first, stop, top)


class _Inspection:
    """The work for one question, piece by piece, in the engine thread of a scheduler."""

    def __init__(self, scheduler: Scheduler, question: Question) -> None:
        self.question = question
        self._scheduler = scheduler
        every = question.logprobs or question.attention is not None
        self._reading = Reading(
            question.ids,
            top=question.top if question.logprobs else 0,
            streams=question.lens,
            attention=question.attention,
            first=question.first,
            stop=None if every else question.stop,
        )

    async def answer(self) -> dict[str, Any]:
        """Return the parts of the answer."""
        for chunk in self._reading.chunks:
            await self._run(partial(self._reading.read, chunk=chunk))
        answer: dict[str, Any] = {}
        if self.question.logprobs:
            answer["logprobs"] = self._logprobs()
        if self.question.lens:
            answer["lens"] = [
                {"name": name, "top": await self._lens(name)} for name in self.question.lens
            ]
        if self._reading.patterns is not None:
            answer["attention"] = await self._attention()
        return answer

    async def _run(self, function: Callable[[Model], T]) -> T:
        return await asyncio.wrap_future(self._scheduler.call(function))

    def _logprobs(self) -> dict[str, Any]:
        """Return a value for each token, None for the first one; and what comes next."""
        known = self._reading.known
        *tops, after = map(_pairs, known.top_logprobs or [])
        return {
            "token_logprobs": [None, *(round(x, DECIMALS) for x in known.logprobs[:-1])],
            "top_logprobs": [None, *tops],
            "next": after,
        }

    async def _lens(self, name: str) -> list[Pairs]:
        """Return the most probable next tokens after each position of the lens."""
        first, stop = self.question.first, self.question.stop
        rows: list[Pairs] = []
        for chunk in self._reading.kept:
            if chunk[0] < stop and first < chunk[1]:
                known = await self._run(
                    partial(self._reading.top, name=name, chunk=chunk, n=self.question.top)
                )
                window = slice(max(first - chunk[0], 0), stop - chunk[0])
                rows += map(_pairs, (known.top_logprobs or [])[window])
        return rows

    async def _attention(self) -> dict[str, Any]:
        patterns = self._reading.patterns
        assert patterns is not None
        data = await asyncio.to_thread(base64.b64encode, patterns.astype("<f2").tobytes())
        return {
            "layer": self.question.attention,
            "shape": list(patterns.shape),
            "dtype": "float16",
            "data": data.decode(),
        }


def _sizes(info: ModelInfo) -> dict[str, Any]:
    """Return the sizes of a model that a page needs."""
    config = info.config
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "eos_token_ids": list(config.eos_token_ids),
        "has_tokenizer": info.has_tokenizer,
        "max_top": min(MAX_TOP, config.vocab_size),
    }


def _read_ids(info: ModelInfo, values: dict[str, Any]) -> list[int]:
    """Return the token ids of a request.

    Raises
    ------
    ApiError, GptxError
        There is no text or more than one, or an id is outside of the vocabulary.
    """
    if ("prompt" in values) == ("tokens" in values):
        raise ApiError(
            400, "expected one of prompt and tokens", param="tokens", code="missing_field"
        )
    if "prompt" in values:
        return info.tokenizer.encode(values["prompt"])
    ids: list[int] = values["tokens"]
    size = info.config.vocab_size
    if unknown := [id for id in ids if id >= size]:
        raise _invalid("tokens", f"has {unknown[0]}, expected 0 to {size - 1}")
    return ids


def _describe(info: ModelInfo, ids: list[int]) -> list[dict[str, Any]]:
    """Return id, text and bytes of each token; bytes in hexadecimal digits, None without any."""
    described = {}
    for id in set(ids):
        data = token_bytes(info, id)
        described[id] = {
            "id": id,
            "text": info.tokenizer.decode([id]) if info.has_tokenizer else str(id),
            "bytes": None if data is None else bytes(data).hex(),
        }
    return [described[id] for id in ids]


def _pairs(top: Top) -> Pairs:
    return [(id, round(logprob, DECIMALS)) for id, logprob in top.items()]


def _invalid(name: str, problem: str) -> ApiError:
    return ApiError(400, f"{name} {problem}", param=name, code="invalid_value")
