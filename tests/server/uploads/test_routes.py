"""The routes of the store: the IETF draft, tus 1.0, models, set-up, hostile requests."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

import gptx
from gptx.server.uploads.routes import BLOCK_BYTES, MAX_MANIFEST_BYTES, routes
from gptx.server.uploads.store import UPLOADS, Store
from tests.support.store_server import (
    Client,
    FakeModels,
    manifest,
    model_files,
    serving,
    stored,
    visible,
)

FILES = {"a.bin": b"0123456789", "b.bin": b"abc"}
FILE = "/models/m/files/a.bin"
TUS_JS_UPLOAD = Path(__file__).parents[2] / "support" / "tus_js_upload.js"
PROBLEM = "https://iana.org/assignments/http-problem-types#"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def models() -> FakeModels:
    return FakeModels()


@pytest.fixture
def client(root: Path, models: FakeModels) -> Iterator[Client]:
    with serving(root, models) as found:
        yield found


def digest(algorithm: str, data: bytes) -> str:
    """Return a digest in base64."""
    return base64.b64encode(hashlib.new(algorithm, data).digest()).decode()


def wait_for_offset(root: Path, offset: int) -> None:
    """Wait until the server has written bytes of a.bin, without a request."""
    path = root / UPLOADS / "m" / "a.bin"
    while path.stat().st_size < offset:
        time.sleep(0.002)


# The IETF draft


def test_a_model_in_one_request_a_file(client: Client, root: Path, tmp_path: Path) -> None:
    source = model_files(tmp_path / "source")
    begun = client.begin("m", source)
    assert (begun.status, begun.headers["location"]) == (201, "/models/m")
    assert begun.json()["state"] == "uploading"
    for name, data in source.items():
        assert visible(root) == {}
        answer = client.append(f"/models/m/files/{name}", 0, data, upload_complete="?1")
        assert (answer.status, answer.headers["upload-complete"]) == (204, "?1")
        assert answer.headers["upload-offset"] == str(len(data))
    assert client.state("m")["state"] == "ready"
    assert visible(root) == {"m": source}
    gptx.load(root / "m")


def test_parts(client: Client) -> None:
    client.begin("m", FILES)
    first = client.append(FILE, 0, b"0123", upload_complete="?0")
    assert (first.status, first.headers["upload-complete"]) == (204, "?0")
    head = client("HEAD", FILE)
    assert head.status == 204
    assert head.headers["upload-offset"] == "4"
    assert head.headers["upload-complete"] == "?0"
    assert head.headers["upload-length"] == "10"
    assert head.headers["upload-limit"].startswith("max-size=")
    assert head.headers["cache-control"] == "no-store"
    last = client.append(FILE, 4, b"456789", upload_complete="?1")
    assert last.headers["upload-complete"] == "?1"
    assert client("HEAD", FILE).headers["upload-complete"] == "?1"
    again = client.append(FILE, 10, b"", upload_complete="?1")  # its reply was lost
    assert (again.status, again.headers["upload-complete"]) == (204, "?1")


@pytest.mark.parametrize("offset", [0, 3, 5])
def test_a_wrong_offset(client: Client, offset: int) -> None:
    client.begin("m", FILES)
    client.append(FILE, 0, b"0123")
    answer = client.append(FILE, offset, b"45")
    assert (answer.status, answer.headers["upload-offset"]) == (409, "4")
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == f"{PROBLEM}mismatching-upload-offset"
    assert (problem["expected-offset"], problem["provided-offset"]) == (4, offset)
    assert client("HEAD", FILE).headers["upload-offset"] == "4"


def test_a_repeated_chunk_is_not_appended_twice(client: Client, root: Path) -> None:
    client.begin("m", FILES)
    assert client.append(FILE, 0, b"0123").status == 204
    assert client.append(FILE, 0, b"0123").status == 409
    assert (root / UPLOADS / "m" / "a.bin").read_bytes() == b"0123"


@pytest.mark.parametrize(
    ("offset", "data", "headers"),
    [
        (4, b"4567890", {}),  # beyond the length
        (4, b"45", {"upload_length": 11}),
        (4, b"45", {"upload_complete": "?1"}),  # ends before the length
        (4, b"456789", {"upload_complete": "?1", "upload_length": 11}),
    ],
)
def test_inconsistent_lengths(
    client: Client, offset: int, data: bytes, headers: dict[str, Any]
) -> None:
    client.begin("m", FILES)
    client.append(FILE, 0, b"0123")
    answer = client.append(FILE, offset, data, **headers)
    assert (answer.status, answer.json()["type"]) == (400, f"{PROBLEM}inconsistent-upload-length")
    assert client("HEAD", FILE).headers["upload-offset"] == "4"


def test_the_end_of_a_request_is_in_the_error(client: Client) -> None:
    client.begin("m", FILES)
    client.append(FILE, 0, b"0123")
    detail = client.append(FILE, 4, b"4567890").json()["detail"]
    assert detail == "file a.bin has 10 bytes, and the request ends at 11: check the file"


def test_bytes_after_the_end(client: Client) -> None:
    client.begin("m", FILES)
    client.append(FILE, 0, FILES["a.bin"])
    answer = client.append(FILE, 10, b"x")
    assert (answer.status, answer.json()["type"]) == (400, f"{PROBLEM}inconsistent-upload-length")


def test_a_chunked_request_beyond_the_length(client: Client) -> None:
    """Without a Content-Length, the bytes are counted."""
    client.begin("m", FILES)
    kind = "application/partial-upload"
    blocks = iter([b"01234", b"5678", b"90"])
    answer = client("PATCH", FILE, blocks, content_type=kind, upload_offset=0)
    assert answer.status == 400
    assert client("HEAD", FILE).headers["upload-offset"] == "0"


def test_creation_with_the_whole_content(client: Client) -> None:
    answer = client(
        "POST",
        "/models/m",
        FILES["a.bin"],
        upload_complete="?1",
        content_disposition='inline; filename="a.bin"',
        repr_digest=f"sha-256=:{digest('sha256', FILES['a.bin'])}:",
    )
    assert (answer.status, answer.headers["location"]) == (201, FILE)
    assert answer.headers["upload-complete"] == "?1"
    assert client("HEAD", FILE).headers["upload-length"] == "10"


def test_creation_with_an_unknown_length(client: Client) -> None:
    name = {"content_disposition": "inline; filename*=UTF-8''a.bin"}
    created = client("POST", "/models/m", b"0123", upload_complete="?0", **name)
    assert (created.status, created.headers["upload-offset"]) == (201, "4")
    assert "upload-length" not in created.headers
    kind = "application/partial-upload"
    answer = client(
        "PATCH", FILE, iter([b"45", b"6"]), content_type=kind, upload_offset=4, upload_complete="?1"
    )
    assert (answer.status, answer.headers["upload-complete"]) == (204, "?1")
    assert answer.headers["upload-length"] == "7"


def test_a_representation_digest_that_differs(client: Client) -> None:
    answer = client(
        "POST",
        "/models/m",
        b"012345678x",
        upload_complete="?1",
        content_disposition='inline; filename="a.bin"',
        repr_digest=f"sha-256=:{digest('sha256', FILES['a.bin'])}:",
    )
    assert (answer.status, answer.headers["upload-complete"]) == (460, "?1")
    assert client("HEAD", FILE).headers["upload-offset"] == "0"


@pytest.mark.parametrize("good", [True, False])
def test_a_content_digest(client: Client, good: bool) -> None:
    client.begin("m", FILES)
    value = f"sha-512=:AAAA:, sha-256=:{digest('sha256', b'0123' if good else b'other')}:"
    answer = client.append(FILE, 0, b"0123", content_digest=value)
    assert answer.status == (204 if good else 460)
    assert client("HEAD", FILE).headers["upload-offset"] == ("4" if good else "0")


def test_options(client: Client) -> None:
    for path in ("/models/m", FILE):
        headers = client("OPTIONS", path).headers
        assert "application/partial-upload" in headers["accept-patch"]
        assert headers["upload-limit"].startswith("max-size=")
        assert headers["tus-version"] == "1.0.0"
        assert "checksum" in headers["tus-extension"]


def test_delete_of_a_file(client: Client) -> None:
    client.begin("m", FILES)
    client.append(FILE, 0, b"0123")
    assert client("DELETE", FILE).status == 204
    assert client("HEAD", FILE).headers["upload-offset"] == "0"


# Lost connections


def raw_request(client: Client, head: str, content: bytes) -> socket.socket:
    """Open a connection, and send the start of a PATCH."""
    end = socket.create_connection(("127.0.0.1", client.port))
    end.sendall(
        f"PATCH {FILE} HTTP/1.1\r\nHost: h\r\nContent-Type: application/partial-upload\r\n"
        f"{head}\r\n\r\n".encode()
        + content
    )
    return end


def test_a_lost_connection_keeps_what_arrived(root: Path) -> None:
    """All messages before the end of a connection are appended."""
    store = Store(root)
    store.begin("m", stored(FILES))
    app = Starlette(routes=routes(store, FakeModels()))
    messages = iter(
        [
            {"type": "http.request", "body": b"012", "more_body": True},
            {"type": "http.request", "body": b"34", "more_body": True},
            {"type": "http.disconnect"},
        ]
    )
    headers = {
        b"content-type": b"application/partial-upload",
        b"content-length": b"10",
        b"upload-offset": b"0",
    }
    scope = {
        "type": "http", "method": "PATCH", "path": FILE, "query_string": b"",
        "headers": list(headers.items()),
    }  # fmt: skip

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        pass

    asyncio.run(app(scope, receive, send))
    assert store.flush("m", "a.bin").offset == 5


def test_a_reset_connection_keeps_whole_blocks(client: Client, root: Path) -> None:
    data = os.urandom(3 * BLOCK_BYTES)
    client.begin("m", {"a.bin": data})
    end = raw_request(
        client, f"Upload-Offset: 0\r\nContent-Length: {len(data)}", data[: 2 * BLOCK_BYTES]
    )
    wait_for_offset(root, BLOCK_BYTES)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()  # with RST
    offset = int(client("HEAD", FILE).headers["upload-offset"])
    assert BLOCK_BYTES <= offset <= 2 * BLOCK_BYTES
    answer = client.append(FILE, offset, data[offset:])
    assert answer.headers["upload-complete"] == "?1"  # so the SHA-256 is right


def test_a_half_open_connection_does_not_block_the_next_one(client: Client) -> None:
    client.begin("m", FILES)
    with raw_request(client, "Upload-Offset: 0\r\nContent-Length: 10", b"01234"):
        offset = int(client("HEAD", FILE).headers["upload-offset"])  # ends the turn of the first
        answer = client.append(FILE, offset, FILES["a.bin"][offset:])
        assert answer.headers["upload-complete"] == "?1"


def test_an_older_request_cannot_append_after_a_newer_one(client: Client, root: Path) -> None:
    data = os.urandom(2 * BLOCK_BYTES)
    client.begin("m", {"a.bin": data})
    with raw_request(client, f"Upload-Offset: 0\r\nContent-Length: {len(data)}", b"") as old:
        old.sendall(data[:BLOCK_BYTES])
        wait_for_offset(root, BLOCK_BYTES)
        assert client("HEAD", FILE).headers["upload-offset"] == str(BLOCK_BYTES)
        old.sendall(data[BLOCK_BYTES:])
        assert b" 409 " in old.recv(1000)
    assert client("HEAD", FILE).headers["upload-offset"] == str(BLOCK_BYTES)
    assert client.append(FILE, BLOCK_BYTES, data[BLOCK_BYTES:]).headers["upload-complete"] == "?1"


def test_a_request_that_stops(root: Path) -> None:
    with serving(root, idle_seconds=0.05) as client:
        client.begin("m", FILES)
        with raw_request(client, "Upload-Offset: 0\r\nContent-Length: 10", b"01234") as end:
            assert b" 408 " in end.recv(1000)
        assert client("HEAD", FILE).headers["upload-offset"] == "5"


# tus 1.0


def tus(**headers: Any) -> dict[str, Any]:
    """Return header fields of a tus client."""
    return {"tus_resumable": "1.0.0"} | headers


def create_by_tus(client: Client, length: int, **headers: Any) -> str:
    """Create a.bin; return its path."""
    name = base64.b64encode(b"a.bin").decode()
    fields = tus(upload_length=length, upload_metadata=f"filename {name},type dGV4dA==")
    created = client("POST", "/models/m", **(fields | headers))
    assert (created.status, created.headers["tus-resumable"]) == (201, "1.0.0")
    return created.headers["location"]


def test_tus(client: Client) -> None:
    path = create_by_tus(client, 10)
    kind = "application/offset+octet-stream"
    answer = client("PATCH", path, b"0123", **tus(content_type=kind, upload_offset=0))
    assert (answer.status, answer.headers["upload-offset"]) == (204, "4")
    assert answer.headers["tus-resumable"] == "1.0.0"
    head = client("HEAD", path, **tus())
    assert (head.headers["upload-offset"], head.headers["upload-length"]) == ("4", "10")
    assert client("DELETE", path, **tus()).status == 204
    assert client("HEAD", path, **tus()).status == 404


def test_tus_with_a_deferred_length(client: Client) -> None:
    name = base64.b64encode(b"a.bin").decode()
    fields = tus(upload_defer_length=1, upload_metadata=f"filename {name}")
    path = client("POST", "/models/m", **fields).headers["location"]
    kind = {"content_type": "application/offset+octet-stream"}
    assert client("PATCH", path, b"0123", **tus(upload_offset=0, **kind)).status == 204
    answer = client("PATCH", path, b"45", **tus(upload_offset=4, upload_length=6, **kind))
    assert answer.headers["upload-complete"] == "?1"


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256"])
def test_tus_checksums(client: Client, algorithm: str) -> None:
    path = create_by_tus(client, 10)
    fields = tus(content_type="application/offset+octet-stream", upload_offset=0)
    wrong = client(
        "PATCH", path, b"0124", **fields, upload_checksum=f"{algorithm} {digest(algorithm, b'0')}"
    )
    assert wrong.status == 460
    assert client("HEAD", path).headers["upload-offset"] == "0"
    good = client(
        "PATCH",
        path,
        b"0123",
        **fields,
        upload_checksum=f"{algorithm} {digest(algorithm, b'0123')}",
    )
    assert (good.status, good.headers["upload-offset"]) == (204, "4")


def test_a_large_content_with_a_checksum(client: Client) -> None:
    """It is compared on the disk, not in memory."""
    data = os.urandom(2 * BLOCK_BYTES + 7)
    path = create_by_tus(client, len(data))
    fields = tus(content_type="application/offset+octet-stream", upload_offset=0)
    answer = client("PATCH", path, data, **fields, upload_checksum=f"sha1 {digest('sha1', data)}")
    assert answer.headers["upload-complete"] == "?1"


@pytest.mark.parametrize("checksum", ["crc32 AAAA", "sha1 not-base64", "sha1"])
def test_invalid_checksums(client: Client, checksum: str) -> None:
    path = create_by_tus(client, 10)
    fields = tus(content_type="application/offset+octet-stream", upload_offset=0)
    answer = client("PATCH", path, b"0", **fields, upload_checksum=checksum)
    assert answer.status in (400, 460)
    assert client("HEAD", path).headers["upload-offset"] == "0"


def test_another_version_of_tus(client: Client) -> None:
    answer = client("HEAD", FILE, tus_resumable="0.2.2")
    assert (answer.status, answer.headers["tus-version"]) == (412, "1.0.0")


@pytest.mark.clients
@pytest.mark.parametrize("checksums", [False, True])
def test_tuspy(client: Client, root: Path, tmp_path: Path, checksums: bool) -> None:
    """tuspy uploads a model in chunks, with an interruption and a second client object."""
    from tusclient.client import TusClient

    source = model_files(tmp_path / "source")
    for name, data in source.items():
        chunk = len(data) // 3 + 1
        with open(tmp_path / "source" / name, "rb") as file:
            options: dict[str, Any] = {
                "file_stream": file,
                "chunk_size": chunk,
                "upload_checksum": checksums,
            }
            maker = TusClient(f"{client.url}/models/m")
            first = maker.uploader(metadata={"filename": name}, **options)
            first.upload(stop_at=chunk)
            again = maker.uploader(url=first.url, **options)
            assert again.offset == chunk
            again.upload()
    assert client("POST", "/models/m/setup").json()["state"] == "loaded"
    assert visible(root) == {"m": source}


@pytest.mark.clients
@pytest.mark.parametrize("protocol", ["tus-v1", "ietf-draft-05"])
def test_tus_js_client(client: Client, root: Path, tmp_path: Path, protocol: str) -> None:
    """The client of browsers speaks both protocols; `npm install tus-js-client` installs it."""
    modules = os.environ.get("TUS_JS")
    if modules is None:
        pytest.skip("set TUS_JS to a folder node_modules with tus-js-client")
    source = model_files(tmp_path / "source")
    for name in source:
        path = str(tmp_path / "source" / name)
        command = ["node", str(TUS_JS_UPLOAD), modules, f"{client.url}/models/m", path, name]
        subprocess.run([*command, protocol], check=True)
    assert client("POST", "/models/m/setup").json()["state"] == "loaded"
    assert visible(root) == {"m": source}


# Models


def upload(client: Client, name: str, source: dict[str, bytes]) -> None:
    """Upload a model, and wait for its check."""
    assert client.begin(name, source).status == 201
    for file, data in source.items():
        assert client.append(f"/models/{name}/files/{file}", 0, data).status == 204
    assert client.state(name)["state"] == "ready"


def test_the_list_of_models(client: Client, models: FakeModels, tmp_path: Path) -> None:
    source = model_files(tmp_path / "source")
    assert client("GET", "/models").json() == {"models": []}
    upload(client, "ready", source)
    upload(client, "loaded", source)
    client("POST", "/models/loaded/setup")
    client.begin("m", FILES)
    client.append(FILE, 0, b"0123")
    shown = client("GET", "/models").json()["models"]
    assert {model["name"]: model["state"] for model in shown} == {
        "loaded": "loaded", "m": "uploading", "ready": "ready",
    }  # fmt: skip
    (model,) = (model for model in shown if model["name"] == "m")
    assert (model["offset"], model["length"]) == (4, 13)
    assert model["files"]["a.bin"] == {
        "offset": 4, "length": 10, "sha256": stored(FILES)["a.bin"].sha256, "url": FILE,
    }  # fmt: skip
    head = client("HEAD", "/models/m")
    assert (head.status, head.headers["upload-offset"]) == (204, "4")
    assert (head.headers["upload-length"], head.headers["upload-complete"]) == ("13", "?0")
    assert client("HEAD", "/models/ready").headers["upload-complete"] == "?1"


def test_setup(client: Client, models: FakeModels, tmp_path: Path) -> None:
    upload(client, "m", model_files(tmp_path / "source"))
    answer = client("POST", "/models/m/setup")
    assert (answer.status, answer.json()["state"]) == (200, "loaded")
    assert models.loaded == ["m"]


def test_files_without_a_manifest_wait_for_setup(
    client: Client, root: Path, tmp_path: Path
) -> None:
    source = model_files(tmp_path / "source")
    for name, data in source.items():
        fields = {"upload_complete": "?1", "content_disposition": f'inline; filename="{name}"'}
        assert client("POST", "/models/m", data, **fields).status == 201
    found = client.state("m")
    assert (found["state"], found["length"]) == ("uploading", None)
    assert visible(root) == {}
    assert client("POST", "/models/m/setup").json()["state"] == "loaded"
    assert visible(root) == {"m": source}


def test_setup_while_it_loads(client: Client, models: FakeModels, tmp_path: Path) -> None:
    upload(client, "m", model_files(tmp_path / "source"))
    models.may_load.clear()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client("POST", "/models/m/setup")))
    thread.start()
    assert models.begun.wait(60)
    second = client("POST", "/models/m/setup")
    assert (second.status, "being loaded already" in second.json()["detail"]) == (409, True)
    assert client("DELETE", "/models/m").status == 409
    models.may_load.set()
    thread.join()
    assert [answer.status for answer in answers] == [200]
    assert models.loaded == ["m"]


def test_setup_of_an_incomplete_model(client: Client, models: FakeModels) -> None:
    client.begin("m", FILES)
    answer = client("POST", "/models/m/setup")
    assert (answer.status, "is not complete (a.bin, b.bin)" in answer.json()["detail"]) == (
        409,
        True,
    )
    assert client("POST", "/models/n/setup").status == 404
    assert models.loaded == []


def test_the_name_of_a_model_that_is_not_of_the_store(client: Client, models: FakeModels) -> None:
    models.others.append("m")
    answers = [client.begin("m", FILES), client("POST", "/models/m", **tus(
        upload_length=1, upload_metadata=f"filename {base64.b64encode(b'a').decode()}"
    ))]  # fmt: skip
    for answer in answers:
        assert (answer.status, "has a model m already" in answer.json()["detail"]) == (409, True)
    assert client("DELETE", "/models/m").status == 404
    assert models.others == ["m"]


def test_a_failed_load_is_in_the_body(
    client: Client, models: FakeModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise gptx.errors.DeviceOutOfMemory("out of memory: use a smaller model")

    upload(client, "m", model_files(tmp_path / "source"))
    monkeypatch.setattr(models, "setup", fail)
    answer = client("POST", "/models/m/setup")
    assert (answer.status, answer.json()["detail"]) == (500, "out of memory: use a smaller model")
    monkeypatch.undo()
    assert client("POST", "/models/m/setup").status == 200


def test_a_refused_model(client: Client, root: Path, tmp_path: Path) -> None:
    source = model_files(tmp_path / "source") | {"config.json": b"[]"}
    client.begin("m", source)
    for file, data in source.items():
        client.append(f"/models/m/files/{file}", 0, data)
    found = client.state("m")
    assert found["state"] == "failed"
    assert client("HEAD", "/models/m").headers["upload-complete"] == "?0"
    assert "config.json" in found["error"]
    assert str(root) not in found["error"]
    answer = client("POST", "/models/m/setup")
    assert (answer.status, answer.json()["title"]) == (422, "Invalid model")
    assert visible(root) == {}


def test_delete_of_a_loaded_model(client: Client, models: FakeModels, tmp_path: Path) -> None:
    upload(client, "m", model_files(tmp_path / "source"))
    client("POST", "/models/m/setup")
    assert client("DELETE", "/models/m").status == 204
    assert models.loaded == []
    assert client("GET", "/models/m").status == 404
    assert client("DELETE", "/models/m").status == 404


def test_a_restart_keeps_models_and_uploads(root: Path, tmp_path: Path) -> None:
    source = model_files(tmp_path / "source")
    with serving(root) as client:
        upload(client, "ready", source)
        client.begin("m", FILES)
        client.append(FILE, 0, b"0123")
    with serving(root) as client:
        assert client("POST", "/models/ready/setup").json()["state"] == "loaded"
        assert client("HEAD", FILE).headers["upload-offset"] == "4"


def test_a_restart_continues_an_interrupted_check(root: Path, tmp_path: Path) -> None:
    source = model_files(tmp_path / "source")
    store = Store(root)
    store.begin("m", stored(source))
    for file, data in source.items():
        store.append("m", file, 0, data)
    with serving(root) as client:
        assert client.state("m")["state"] == "ready"
    assert visible(root) == {"m": source}


# Hostile requests


@pytest.mark.parametrize(
    "path",
    ["/models/..", "/models/../x", "/models/%2e%2e", "/models/..%2fx", "/models/a%00b",
     "/models/.uploads", "/models/m/files/..%2f..%2fx", "/models/m/files/.manifest.json",
     "/models/m/files/%2e%2e", "/models/m/files/a%5cb", "/models/%ff"],
)  # fmt: skip
def test_paths_that_lead_elsewhere(client: Client, root: Path, path: str) -> None:
    client.begin("m", FILES)
    before = sorted(path.name for path in root.parent.rglob("*"))
    answers = [
        client("POST", path, json.dumps(manifest(FILES)).encode(), content_type="application/json"),
        client("POST", path, **tus(upload_length=1, upload_metadata="filename Li4veA==")),
        client.append(path, 0, b"x"),
        client("HEAD", path),
        client("DELETE", path),
        client("POST", f"{path}/setup"),
    ]
    assert all(answer.status in (400, 404, 405) for answer in answers)
    assert sorted(path.name for path in root.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"\xff", b'{"files": []}', b'{"files": {"a": 1}}', b"[" * 100_000,
     b'{"files": {"a": {"length": 1.0, "sha256": ""}}}', b'{"files": {}, "more": 1}',
     b'{"files": {"a": {"length": true, "sha256": ""}}}',
     b'{"files": {"../a": {"length": 1, "sha256": "%s"}}}' % (b"0" * 64)],
)  # fmt: skip
def test_invalid_manifests(client: Client, body: bytes) -> None:
    answer = client("POST", "/models/m", body, content_type="application/json")
    assert answer.status == 400
    assert answer.json()["detail"]
    assert client("GET", "/models").json() == {"models": []}


def test_a_manifest_of_another_type(client: Client) -> None:
    """A page of another origin can send text without a question to the server."""
    body = json.dumps(manifest(FILES)).encode()
    assert client("POST", "/models/m", body, content_type="text/plain").status == 415
    assert client("POST", "/models/m", body).status == 415


def test_a_disk_that_is_full_of_contents_with_checksums(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    client.begin("m", FILES)
    monkeypatch.setattr("tempfile.SpooledTemporaryFile", full)
    value = f"sha-256=:{digest('sha256', b'0123')}:"
    answer = client.append(FILE, 0, b"0123", content_digest=value)
    assert (answer.status, answer.json()["title"]) == (507, "Insufficient storage")


def test_a_large_manifest(client: Client) -> None:
    assert client.begin("m", {f"f{i}": b"" for i in range(MAX_MANIFEST_BYTES // 80)}).status == 413


def test_the_limit_of_a_model(root: Path) -> None:
    with serving(root, max_bytes=12) as client:
        answer = client.begin("m", FILES)
        assert (answer.status, answer.headers["upload-limit"]) == (413, "max-size=12")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"upload_offset": 0}, 415),
        ({"upload_offset": 0, "content_type": "text/plain"}, 415),
        ({"content_type": "application/partial-upload"}, 400),
        ({"content_type": "application/partial-upload", "upload_offset": -1}, 400),
        ({"content_type": "application/partial-upload", "upload_offset": "9" * 40}, 400),
        ({"content_type": "application/partial-upload", "upload_offset": "0x0"}, 400),
    ],
)
def test_invalid_appends(client: Client, headers: dict[str, Any], status: int) -> None:
    client.begin("m", FILES)
    assert client("PATCH", FILE, b"0123", **headers).status == status
    assert client("HEAD", FILE).headers["upload-offset"] == "0"


def test_a_full_disk(client: Client, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client.begin("m", FILES)

    def full(descriptor: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gptx.server.uploads.store.os.write", full)
        answer = client.append(FILE, 0, b"0123")
    assert (answer.status, answer.json()["title"]) == (507, "Insufficient storage")
    assert client("HEAD", FILE).headers["upload-offset"] == "0"
    assert client.append(FILE, 0, FILES["a.bin"]).headers["upload-complete"] == "?1"


def test_two_uploads_at_once(client: Client, root: Path, tmp_path: Path) -> None:
    """Two clients send the same model: no byte is there twice, and one model appears."""
    source = model_files(tmp_path / "source")
    data = source["model.safetensors"]
    path = "/models/m/files/model.safetensors"

    def send() -> None:
        client.begin("m", source)
        client.append("/models/m/files/config.json", 0, source["config.json"])
        offset = 0
        while offset < len(data):
            answer = client.append(path, offset, data[offset : offset + 4096])
            if "upload-offset" not in answer.headers:
                answer = client("HEAD", path)
            offset = int(answer.headers["upload-offset"])

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.state("m")["state"] == "ready"
    assert visible(root) == {"m": source}
