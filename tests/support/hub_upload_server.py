"""A small Hub for uploads: repositories, LFS objects by basic transfer, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

TOKEN = "hf_may_write"


@dataclass
class Repository:
    private: bool | None
    branches: dict[str, dict[str, bytes]]
    commits: list[str] = field(default_factory=list)


class UploadServer:
    """Serve on a port of 127.0.0.1 while the `with` block lasts.

    Attributes
    ----------
    repositories
        Name -> repository with its committed files.
    requests
        "METHOD path" of each request.
    faults
        Part of "METHOD path" -> status and message of the answer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: dict[str, tuple[int, str]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> UploadServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def reset(self) -> None:
        """Forget repositories, objects, requests and faults."""
        for found in (self.repositories, self.objects, self.requests, self.faults):
            found.clear()

    def stop(self) -> None:
        """Refuse new connections."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    disable_nagle_algorithm = True  # else a body waits 40 ms for the ACK of its header

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: UploadServer = self.server.hub  # type: ignore[attr-defined]
        body = self._body()
        path = self.path.partition("?")[0]
        request = f"{self.command} {path}"
        hub.requests.append(request)
        for part, (status, message) in hub.faults.items():
            if part in request:
                return self._send(status, {"error": message})
        if path.startswith("/lfs/"):  # the address authorizes the request
            hub.objects[path.removeprefix("/lfs/")] = body
            return self._send(200, {})
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(hub, json.loads(body))
        name, action, revision = self._parts(path)
        repository = hub.repositories.get(name)
        if repository is None:
            return self._send(404, {"error": "Repository not found"}, "RepoNotFound")
        if action == "lfs":
            return self._send(200, _batch(hub, json.loads(body)))
        if revision not in repository.branches:
            return self._send(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
        files = repository.branches[revision]
        if action == "preupload":
            return self._send(200, _modes(files, json.loads(body)))
        if action == "commit":
            return self._commit(hub, name, files, body)
        return self._send(200, {"id": name, "sha": "0" * 40, "siblings": []})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @staticmethod
    def _parts(path: str) -> tuple[str, str, str]:
        """Split a path into repository, action and branch."""
        if path.endswith(".git/info/lfs/objects/batch"):
            return path[1:].partition(".git/")[0], "lfs", ""
        _, _, _, owner, name, *rest = path.split("/")
        action, revision = rest or ("", "main")
        return f"{owner}/{name}", action, revision

    def _create(self, hub: UploadServer, wanted: Any) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{hub.url}/{name}"}
        if name in hub.repositories:
            return self._send(409, url | {"error": "You already created this model repo"})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        hub.repositories[name] = Repository(private, {"main": {}})
        return self._send(200, url)

    def _commit(self, hub: UploadServer, name: str, files: dict[str, bytes], body: bytes) -> None:
        header, *operations = (json.loads(line) for line in body.splitlines())
        added = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                added[value["path"]] = hub.objects[value["oid"]]
                assert len(added[value["path"]]) == value["size"]
            else:
                added[value["path"]] = base64.b64decode(value["content"])
        files |= added
        hub.repositories[name].commits.append(header["value"]["summary"])
        self._send(200, {"commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _send(self, status: int, data: Any, code: str = "") -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _batch(hub: UploadServer, wanted: Any) -> Any:
    """Give an upload address for each object that is not stored yet."""
    assert "basic" in wanted["transfers"]
    objects = []
    for entry in wanted["objects"]:
        action = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
        objects.append(entry | ({} if entry["oid"] in hub.objects else {"actions": action}))
    return {"transfer": "basic", "objects": objects}


def _modes(files: dict[str, bytes], wanted: Any) -> Any:
    """Assign weights to LFS, other files to the commit."""
    answer = []
    for entry in wanted["files"]:
        path = entry["path"]
        mode = "lfs" if path.endswith((".safetensors", ".gguf", ".bin")) else "regular"
        facts = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in files:
            facts["oid"] = oid_of(files[path], mode)
        answer.append(facts)
    return {"files": answer}


def oid_of(content: bytes, mode: str) -> str:
    """Return the SHA-256 of an LFS object, the SHA-1 of the git blob of another file."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
