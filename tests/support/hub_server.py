"""A small Hub for downloads: the resolve protocol, a log of requests, faults on request.

It has no /api/ endpoints. It redirects large files (`*.safetensors`, `*.bin`) to a second port, as
the real Hub redirects them to another host.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # a test may replace time.sleep
from types import TracebackType
from typing import NamedTuple
from urllib.parse import unquote

Files = dict[str, bytes]  # file -> content
# repository -> branch or commit -> files, or branch -> commit
Repos = dict[str, dict[str, Files | str]]


class Request(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case


@dataclass
class Faults:
    """Faults by file name, repository/file name, or repository."""

    # File name -> bytes of its body before the connection is closed.
    truncated: dict[str, int] = field(default_factory=dict)
    truncations: int = 10**9  # number of truncated bodies before the fault ends
    corrupt: set[str] = field(default_factory=set)  # other bytes under the right hash and size
    shorter: set[str] = field(default_factory=set)  # a shorter body with a matching Content-Length
    status: dict[str, int] = field(default_factory=dict)
    gated: dict[str, str] = field(default_factory=dict)  # repository -> token that may read it
    no_range: bool = False  # the server ignores Range headers
    same_host: bool = False  # redirects lead to another path, not to another port
    renamed: dict[str, str] = field(default_factory=dict)  # old repository -> new repository
    delay: float = 0.0  # seconds after every 16 KiB


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def etag_of(name: str, content: bytes) -> str:
    """Return the SHA-256 of a large file, the SHA-1 of the git blob of another one."""
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(repo: str, revision: str) -> str:
    """Return the commit of a branch; a commit is its own."""
    if len(revision) == 40:
        return revision
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


def _hit(table: Collection[str], repo: str, name: str) -> str | None:
    return next((key for key in (name, f"{repo}/{name}", repo) if key in table), None)


class HubServer:
    """Serve `repos` on a port of 127.0.0.1 while the `with` block lasts."""

    def __init__(self, repos: Repos) -> None:
        self.repos = repos
        self.faults = Faults()
        self.requests: list[Request] = []
        self.after_request: Callable[[], None] = lambda: None
        self.connections: list[socket.socket] = []
        self._servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> HubServer:
        for _ in ("hub", "cdn"):
            server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
            server.hub = self  # type: ignore[attr-defined]
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close every connection and refuse new ones."""
        while self._servers:
            server = self._servers.pop()
            server.shutdown()
            server.server_close()
        while self.connections:
            with suppress(OSError):
                self.connections.pop().shutdown(socket.SHUT_RDWR)

    def url_of(self, number: int) -> str:
        return f"http://127.0.0.1:{self._ports[number]}"

    @property
    def _ports(self) -> list[int]:
        return [server.server_address[1] for server in self._servers]

    @property
    def url(self) -> str:
        """Value for HF_ENDPOINT."""
        return self.url_of(0)

    def log(self, method: str = "", part: str = "") -> list[str]:
        """List requests as "METHOD path", of one method or with one part in the path."""
        return [
            f"{request.method} {request.path}"
            for request in self.requests
            if request.method.startswith(method) and part in request.path
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    disable_nagle_algorithm = True  # else a body waits 40 ms for the ACK of its header

    def setup(self) -> None:
        super().setup()
        self.server.hub.connections.append(self.connection)  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append(Request(self.command, unquote(self.path), headers))
        on_cdn = self.path.startswith("/cdn/")
        repo, found, rest = self.path.removeprefix("/cdn").strip("/").partition("/resolve/")
        if not found:
            return self._refuse(404)
        if new := hub.faults.renamed.get(repo):
            self.send_response(307)
            self.send_header("Location", f"/{new}/resolve/{rest}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if repo not in hub.repos:
            return self._refuse(404, "RepoNotFound")
        token = hub.faults.gated.get(repo)
        if token and not on_cdn and headers.get("authorization") != f"Bearer {token}":
            return self._refuse(401, "GatedRepo")
        revision, name = map(unquote, rest.split("/", 1))  # a revision may have quoted slashes
        branches = {commit_of(repo, branch): files for branch, files in hub.repos[repo].items()}
        target = hub.repos[repo].get(revision)
        commit = target if isinstance(target, str) else commit_of(repo, revision)
        files = branches.get(commit)
        if not isinstance(files, dict):
            return self._refuse(404, "RevisionNotFound")
        hub.after_request()
        if (key := _hit(hub.faults.status, repo, name)) and not on_cdn:
            return self._refuse(hub.faults.status[key])
        if name not in files:
            return self._refuse(404, "EntryNotFound", commit)
        content = files[name]
        etag = etag_of(name, content)
        if is_large(name) and not on_cdn:
            self.send_response(302)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("ETag", '"of-the-redirect"')
            host = "" if hub.faults.same_host else hub.url_of(1)
            self.send_header("Location", f"{host}/cdn/{repo}/resolve/{commit}/{name}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self._send(hub.faults, repo, name, content, etag, commit, body)

    def _send(
        self,
        faults: Faults,
        repo: str,
        name: str,
        content: bytes,
        etag: str,
        commit: str,
        body: bool,
    ) -> None:
        if body and _hit(faults.corrupt, repo, name):
            content = bytes(255 - byte for byte in content)
        if body and _hit(faults.shorter, repo, name):
            content = content[:-1]
        start = 0
        wanted = self.headers.get("Range")
        if wanted and not faults.no_range:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self._refuse(416)
        self.send_response(206 if start else 200)
        if start:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", span)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not body:
            return
        content = content[start:]
        end = faults.truncated.get(name) if faults.truncations > 0 else None
        if end is not None:
            faults.truncations -= 1
            content = content[:end]
        with suppress(OSError):  # the client may have closed the connection
            for at in range(0, len(content), 16384):
                self.wfile.write(content[at : at + 16384])
                sleep(faults.delay)
            if end is not None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    def _refuse(self, status: int, code: str = "", commit: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()
