"""The OpenAPI document and the page of all fields, from the tables that check the requests."""

from __future__ import annotations

import html
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gptx._version import __version__
from gptx.server.api.fields import Record

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25rem .5rem;"
    "border-bottom:1px solid #ccc;vertical-align:top}code{font-size:.9em}"
)
GETS = {
    "/v1/models": "List the models.",
    "/tokenizer_info": "Return the special tokens and the sizes of the tokenizer.",
    "/health": "Return 200 if requests are answered, 503 otherwise.",
}


@dataclass(frozen=True)
class Endpoint:
    """An endpoint with a JSON body.

    Attributes
    ----------
    path
        Path of the URL.
    summary
        One sentence.
    fields
        Fields of the body.
    handler
        Function that answers.
    """

    path: str
    summary: str
    fields: Record
    handler: Callable[..., Awaitable[Any]]


def openapi(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI document of the endpoints."""
    error = {"description": "Error.", "content": {"application/json": {"schema": ERROR_SCHEMA}}}
    err = {"description": "Error, as text.", "content": {"application/json": {"schema": {
        "anyOf": [ERROR_SCHEMA, {"type": "object", "required": ["Err"]}]}}}}  # fmt: skip
    paths: dict[str, Any] = {}
    for one in endpoints:
        success = {"description": "Answer.", "content": {"application/json": {}}}
        if any(field.name == "stream" for field in one.fields.fields):
            success["content"] = {"application/json": {}, "text/event-stream": {}}
        paths[one.path] = {
            "post": {
                "summary": one.summary,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": one.fields.schema}},
                },
                "responses": {
                    "200": success,
                    "default": err if one.path == "/model_inference" else error,
                },
            }
        }
    for path, summary in GETS.items():
        success = {"description": "Answer.", "content": {"application/json": {}}}
        paths[path] = {"get": {"summary": summary, "responses": {"200": success, "default": error}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gptx", "version": __version__},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def docs_page(endpoints: Sequence[Endpoint]) -> str:
    """Return the page of all endpoints and fields as HTML."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>gptx: API</title>",
        f"<style>{STYLE}</style><h1>gptx {html.escape(__version__)}: API</h1>",
        "<p>A field that is null is absent; an unknown field is an error. ",
        "<a href=openapi.json>OpenAPI document</a></p>",
    ]
    for one in endpoints:
        parts.append(f"<h2><code>POST {html.escape(one.path)}</code></h2>")
        parts.append(f"<p>{html.escape(one.summary)}</p>")
        parts.append("<table><tr><th>field<th>value<th>default<th>meaning")
        for field in one.fields.fields:
            default = "" if field.default is None else json.dumps(field.default)
            cells = (field.name, field.kind.expected, default, field.about)
            name, *rest = map(html.escape, cells)
            parts.append(f"<tr><td><code>{name}</code><td>{'<td>'.join(rest)}")
        parts.append("</table>")
    for path, summary in GETS.items():
        parts.append(f"<h2><code>GET {path}</code></h2><p>{html.escape(summary)}</p>")
    return "".join(parts)
