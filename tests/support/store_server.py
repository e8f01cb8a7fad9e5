"""A server of a model store on loopback, in a thread of this process or in one of its own."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette

from gptx.conversions import read
from gptx.conversions.verify import check
from gptx.random_weights import random_weights
from gptx.server.uploads.routes import routes
from gptx.server.uploads.store import Store
from gptx.server.uploads.stored_models import StoredFile
from tests.support import short_ticks
from tests.support.random_models import CASES, write_model

short_ticks.install()


class FakeModels:
    """Served models without their weights.

    Attributes
    ----------
    loaded
        Names of the models that are loaded.
    others
        Names of models that are not of the store.
    begun
        Event that a set-up sets.
    may_load
        Event that a set-up waits for; set in a new object.
    """

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.others: list[str] = []
        self.begun = threading.Event()
        self.may_load = threading.Event()
        self.may_load.set()

    def names(self) -> list[str]:
        return [*self.others, *self.loaded]

    def is_loading(self, name: str) -> bool:
        return False

    def setup(self, name: str) -> None:
        self.begun.set()
        assert self.may_load.wait(60)
        self.loaded.append(name)

    def drop(self, name: str) -> None:
        self.loaded = [other for other in self.loaded if other != name]


def check_here(path: Path) -> None:
    """Check a model in this process, which is faster than in one of its own."""
    check(read(path, offline=True)[1])


def free_port() -> int:
    """Return a port of 127.0.0.1 that no socket has."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def make_server(store: Store, models: FakeModels, port: int, **options: Any) -> uvicorn.Server:
    """Return a server of a store."""
    config = uvicorn.Config(
        Starlette(routes=routes(store, models, **options)),
        port=port,
        lifespan="off",
        log_level="critical",
    )
    return uvicorn.Server(config)


class Answer(NamedTuple):
    """An answer of the server; names of header fields are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """A client that sends single requests."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def __call__(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] = b"",
        **headers: Any,
    ) -> Answer:
        """Send a request; "upload_offset=3" is the field "Upload-Offset: 3"."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        fields = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        try:
            connection.request(method, path, body, fields)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def append(self, path: str, offset: int, data: bytes, **headers: Any) -> Answer:
        """Send a PATCH of the IETF draft."""
        kind = "application/partial-upload"
        return self("PATCH", path, data, content_type=kind, upload_offset=offset, **headers)

    def begin(self, name: str, files: Mapping[str, bytes]) -> Answer:
        """Send a manifest."""
        body = json.dumps(manifest(files)).encode()
        return self("POST", f"/models/{name}", body, content_type="application/json")

    def state(self, name: str) -> Any:
        """Return the state of a model, after its check."""
        while (found := self("GET", f"/models/{name}").json())["state"] == "checking":
            time.sleep(0.005)
        return found


@contextmanager
def serving(
    root: Path, models: FakeModels | None = None, *, idle_seconds: float = 60.0, **options: Any
) -> Iterator[Client]:
    """Serve a store in a thread."""
    store = Store(root, **{"check": check_here} | options)
    port = free_port()
    server = make_server(store, models or FakeModels(), port, idle_seconds=idle_seconds)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.002)
        yield Client(port)
    finally:
        server.should_exit = True
        thread.join()


def model_files(folder: Path, model: str = "tiny") -> dict[str, bytes]:
    """Write a model into a folder; return its files: name -> content."""
    write_model(folder, CASES[model], random_weights(CASES[model]))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored(files: Mapping[str, bytes]) -> dict[str, StoredFile]:
    """Return the lengths and SHA-256 of files."""
    return {
        name: StoredFile(0, len(data), hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    }


def manifest(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the manifest of files."""
    return {
        "files": {
            name: {"length": file.length, "sha256": file.sha256}
            for name, file in stored(files).items()
        }
    }


def visible(root: Path) -> dict[str, dict[str, bytes]]:
    """Return the models that a store shows: name -> name of a file -> content."""
    return {
        folder.name: {
            path.name: path.read_bytes()
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        }
        for folder in root.iterdir()
        if not folder.name.startswith(".")
    }


class CuttingProxy:
    """A TCP proxy on loopback that calls a function once, at a point of the traffic.

    Parameters
    ----------
    port
        Port of the server.
    at
        Bytes of contents of PATCH requests, or number of answers, after which `act` is called.
    act
        Function of this proxy.
    count
        "bytes" or "answers".

    Attributes
    ----------
    content_bytes : int
        Bytes of the contents of all PATCH requests so far.
    acted : bool
        True after the call of `act`.
    """

    def __init__(
        self, port: int, at: int, act: Callable[[CuttingProxy], None], count: str = "bytes"
    ) -> None:
        self.target, self.at, self.act, self.count = port, at, act, count
        self.content_bytes = self.answers = 0
        self.acted = False
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Cut all connections."""
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return  # which closes the client's connection
            with server:
                self._open |= {client, server}
                back = threading.Thread(target=self._answers, args=(server, client), daemon=True)
                back.start()
                self._requests(client, server)
                back.join()
                self._open -= {client, server}

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        """Forward a request; each connection of the client has one."""
        head = b""
        try:
            while data := client.recv(4096):
                content = len(data)
                if b"\r\n\r\n" not in head:
                    head += data
                    content = len(head.partition(b"\r\n\r\n")[2])
                if head.startswith(b"PATCH") and b"\r\n\r\n" in head:
                    with self._lock:
                        self.content_bytes += content
                        reached = self.count == "bytes" and self.content_bytes >= self.at
                    server.sendall(data)
                    if reached:
                        self._act()
                else:
                    server.sendall(data)
            server.shutdown(socket.SHUT_WR)
        except OSError:
            self._shut(client, server)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        try:
            first = True
            while data := server.recv(4096):
                if first:
                    with self._lock:
                        self.answers += 1
                        reached = self.count == "answers" and self.answers >= self.at
                    if reached:
                        self._act()
                first = False
                client.sendall(data)
        except OSError:
            pass
        self._shut(client, server)

    def _act(self) -> None:
        with self._lock:
            acts, self.acted = not self.acted, True
        if acts:
            self.act(self)

    @staticmethod
    def _shut(*ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
