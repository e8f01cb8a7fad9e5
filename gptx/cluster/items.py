"""Items of a batch: the lines of its input, each with an id that every run gives it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptx.errors import NotFoundError, ParameterError, StorageError, argument, shown
from gptx.server.api.fields import BODY, Anything, Choice, Field, Record, Text, parse
from gptx.server.errors import ApiError

# Endpoint -> the field that a body of its kind has, by which a line without a url is recognized.
ENDPOINTS = {
    "/v1/completions": "prompt",
    "/v1/chat/completions": "messages",
    "/v1/embeddings": "input",
}
SEEDED = ("/v1/completions", "/v1/chat/completions")
ID_PREFIX = "batch_req_"
DIGEST_LENGTH = 16  # hexadecimal digits of a line's SHA-256 in its id
SEED_BITS = 53  # a seed below 2^53 is exact for readers of JSON that use floats
MARK = "\ufeff".encode()

CUSTOM_ID = Field("custom_id", Text(), "Name of the request, unique in the file.")
ENVELOPE = Record(
    (
        CUSTOM_ID,
        Field("method", Choice(("POST",)), "HTTP method.", "POST"),
        Field("url", Choice(tuple(ENDPOINTS)), "Endpoint.", required=True),
        Field("body", Anything(), "Fields of the request.", required=True),
    )
)


@dataclass(frozen=True)
class Shard:
    """The part of a batch that one machine computes: each `count`-th line.

    Attributes
    ----------
    number
        Number of the part, from 1.
    count
        Number of parts.
    """

    number: int
    count: int

    def has(self, line: int) -> bool:
        """Return True if a line, counted from 1, belongs to this part."""
        return (line - self.number) % self.count == 0


WHOLE = Shard(1, 1)


def parse_shard(text: str) -> Shard:
    """Return the part that "2/4" names: the second of four.

    Raises
    ------
    ParameterError
        The text has another form.
    """
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return Shard(int(number), int(count))
    raise ParameterError(f"{argument('shard')} is {shown(text)}, expected I/N, such as 2/4")


@dataclass(frozen=True)
class Item:
    """A line of the input: a request, or the error of a line that is none.

    Attributes
    ----------
    line
        Number of the line, from 1.
    id
        Number and checksum of the line: the same in each run, and unique in the file.
    custom_id
        Name of the request that the line gives; None for none.
    url, body
        Endpoint, and the fields of the request.
    error
        Error of a line that is no request; None for a request.
    """

    line: int
    id: str
    custom_id: str | None = None
    url: str = ""
    body: Any = None
    error: ApiError | None = None


def item_id(line: int, data: bytes) -> str:
    """Return the id of a line: its number and a checksum of its bytes."""
    return f"{ID_PREFIX}{line}_{hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]}"


def read_lines(path: str | Path, shard: Shard = WHOLE) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line of a part that is not blank.

    Raises
    ------
    NotFoundError, StorageError
        The file does not exist, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            for line, data in enumerate(file, 1):
                content = (data.removeprefix(MARK) if line == 1 else data).strip()
                if content and shard.has(line):
                    yield line, content
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist: give a file with a request a line") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error


def parse_item(line: int, data: bytes, seed: int) -> Item:
    """Return the item of a line; a line that is no request has the error.

    Parameters
    ----------
    seed
        Key of the seeds of requests that give none: one for each line, the same in each run.
    """
    id = item_id(line, data)
    custom_id = None
    try:
        value = parse(data)
        if not isinstance(value, dict):
            raise ApiError(400, f"the line is {shown(value)}, expected an object")
        if value.get(CUSTOM_ID.name) is not None:
            custom_id = CUSTOM_ID.kind.read(CUSTOM_ID.name, value[CUSTOM_ID.name])
        url, body = _request_of(value)
        if body.get("stream"):
            message = "stream is true, which a batch does not support: leave it out"
            raise ApiError(400, message, param="stream", code="unsupported_field")
    except ApiError as error:
        message = error.message.replace("the body is", "the line is")  # of `parse`
        refusal = ApiError(error.status, message, param=error.param, code=error.code)
        return Item(line, id, custom_id, error=refusal)
    if url in SEEDED and body.get("seed") is None:
        body = {**body, "seed": _seed_of(id, seed)}
    return Item(line, id, custom_id, url, body)


def _request_of(value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the endpoint and the body of a line: of OpenAI's batch format, or a body alone."""
    if "url" in value or "body" in value:
        request = ENVELOPE.read(BODY, value)
        if not isinstance(request["body"], dict):
            message = f"body is {shown(request['body'])}, expected an object"
            raise ApiError(400, message, param="body", code="invalid_value")
        return request["url"], request["body"]
    body = {name: x for name, x in value.items() if name != CUSTOM_ID.name}
    for url, field in ENDPOINTS.items():
        if field in body:
            return url, body
    raise ApiError(
        400,
        "the line has no prompt, messages or input, and no url and body: give one of them",
        code="missing_field",
    )


def _seed_of(id: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed} {id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)
