"""The files of the page, which the server sends to every caller, with or without a key."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import PurePosixPath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
INDEX = "index.html"
# The page takes everything from its own server, and no other page can frame it or reach into it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_files() -> dict[str, bytes]:
    """Return the files of the page by name."""
    folder = files("gptx.server") / "page"
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if PurePosixPath(file.name).suffix in TYPES
    }


def page_routes() -> list[BaseRoute]:
    """Return the routes of the page: `/`, and each file below `/page`."""
    contents = page_files()
    found: list[BaseRoute] = [
        _route(f"/page/{name}", name, data) for name, data in contents.items() if name != INDEX
    ]
    return [_route("/", INDEX, contents[INDEX]), *found]


def _route(path: str, name: str, data: bytes) -> Route:
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag, "Content-Type": TYPES[PurePosixPath(name).suffix]}

    async def send(request: Request) -> Response:
        known = [one.strip() for one in request.headers.get("if-none-match", "").split(",")]
        if tag in known:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers)

    return Route(path, send, methods=["GET"])
