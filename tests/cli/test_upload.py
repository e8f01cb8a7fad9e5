"""`gptx upload`: a model to a server, with interruptions, errors and a bar."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gptx.conversions import convert
from gptx.server import upload_client
from tests.support.cli import run
from tests.support.conversions import contents
from tests.support.store_server import (
    Client,
    CuttingProxy,
    FakeModels,
    model_files,
    serving,
    visible,
)

CHUNK = 1024


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits after failures, and no key."""
    monkeypatch.setattr(upload_client, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.delenv("GPTX_API_KEY", raising=False)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 1 kB."""
    monkeypatch.setitem(upload_client.Upload.__init__.__kwdefaults__, "chunk_bytes", CHUNK)


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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model_files(tmp_path / "m")
    return tmp_path / "m"


def test_a_folder(client: Client, root: Path, model: Path) -> None:
    (model / ".hidden").write_text("")
    (model / "notes.txt").write_text("no file of a model")
    done = run("upload", str(model), client.url)
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith(f"{client.url}/models/m: 2 files, ")
    expected = contents(model)
    del expected[".hidden"], expected["notes.txt"]
    assert visible(root) == {"m": expected}


def test_a_file_and_a_name(client: Client, root: Path, model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "model.gguf")
    assert run("upload", str(tmp_path / "model.gguf"), client.url).code == 0
    assert run("upload", str(tmp_path / "model.gguf"), f"{client.url}/models/other/").code == 0
    assert visible(root).keys() == {"model", "other"}


def test_a_folder_with_a_model_in_one_file(client: Client, root: Path, tmp_path: Path) -> None:
    """The tokenizer beside it is uploaded, too."""
    folder = tmp_path / "m"
    convert("shakespeare", tmp_path / "source")
    convert("shakespeare", tmp_path / "model.bin")
    folder.mkdir()
    (tmp_path / "model.bin").rename(folder / "model.bin")
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(tmp_path / "source" / name, folder)
    (folder / "train.log").write_text("")
    assert run("upload", str(folder), client.url).code == 0
    assert visible(root)["m"].keys() == {"model.bin", "tokenizer.json", "config.json"}


def test_again(client: Client, model: Path) -> None:
    """A model that is there is not sent again."""
    proxy = CuttingProxy(client.port, 1 << 60, lambda proxy: None)
    url = f"http://127.0.0.1:{proxy.port}"
    length = sum(map(len, contents(model).values()))
    for _ in range(2):
        assert run("upload", str(model), url).code == 0
        assert proxy.content_bytes == length
    proxy.close()


@pytest.mark.parametrize("at", [1, CHUNK + 1, 3 * CHUNK])
@pytest.mark.usefixtures("small_chunks")
def test_a_cut_connection_is_continued(client: Client, root: Path, model: Path, at: int) -> None:
    proxy = CuttingProxy(client.port, at, CuttingProxy.cut)
    assert run("upload", str(model), f"http://127.0.0.1:{proxy.port}").code == 0
    proxy.close()
    assert visible(root) == {"m": contents(model)}
    assert proxy.content_bytes <= sum(map(len, contents(model).values())) + CHUNK


def test_a_new_command_continues(client: Client, model: Path) -> None:
    """The bytes of an interrupted upload are not sent again."""
    source = contents(model)
    half = len(source["model.safetensors"]) // 2
    client.begin("m", source)
    client.append("/models/m/files/model.safetensors", 0, source["model.safetensors"][:half])
    proxy = CuttingProxy(client.port, 1 << 60, lambda proxy: None)
    assert run("upload", str(model), f"http://127.0.0.1:{proxy.port}").code == 0
    proxy.close()
    assert proxy.content_bytes == sum(map(len, source.values())) - half


@pytest.mark.usefixtures("small_chunks")
def test_offset(client: Client, root: Path, model: Path) -> None:
    """The offset counts the bytes of all files in their order."""
    source = contents(model)
    assert list(source) == ["config.json", "model.safetensors"]
    client.begin("m", source)
    client.append("/models/m/files/config.json", 0, source["config.json"])
    client.append("/models/m/files/model.safetensors", 0, source["model.safetensors"][:100])
    right = len(source["config.json"]) + 100
    for wrong in (0, right - 1, right + 1):
        done = run("upload", str(model), client.url, "--offset", str(wrong))
        assert done.code == 2
        assert f"--offset is {wrong}" in done.err
        assert "leave it out to continue there" in done.err
    assert run("upload", str(model), client.url, "--offset", str(right)).code == 0
    assert visible(root) == {"m": source}


def test_an_offset_beyond_the_end(client: Client, model: Path) -> None:
    done = run("upload", str(model), client.url, "--offset", str(1 << 40))
    assert (done.code, "leave it out" in done.err) == (2, True)


def test_overwrite(client: Client, root: Path, model: Path) -> None:
    assert run("upload", str(model), client.url).code == 0
    model_files(model, "124M")
    done = run("upload", str(model), client.url)
    assert done.code == 2
    assert "model m exists, with other files" in done.err
    assert "or use --overwrite" in done.err
    assert run("upload", str(model), client.url, "--overwrite").code == 0
    assert visible(root) == {"m": contents(model)}


def test_setup(client: Client, models: FakeModels, model: Path) -> None:
    assert run("upload", str(model), client.url, "--setup").code == 0
    assert models.loaded == ["m"]


def test_a_model_that_the_check_refuses(client: Client, root: Path, model: Path) -> None:
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-4:] = b"\xff" * 4
    (model / "model.safetensors").write_bytes(data)
    done = run("upload", str(model), client.url)
    assert done.code == 65
    assert "the server refused the model: " in done.err
    assert "not finite" in done.err
    assert visible(root) == {}


def test_a_file_that_changes(client: Client, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server compares the SHA-256 with that of the first reading."""
    read_files = upload_client.read_files

    def change(*args: Any) -> Any:
        found = read_files(*args)
        data = bytearray((model / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (model / "model.safetensors").write_bytes(data)
        return found

    monkeypatch.setattr(upload_client, "read_files", change)
    done = run("upload", str(model), client.url)
    assert (done.code, "damaged file" in done.err) == (65, True)


def test_a_file_that_becomes_shorter(
    client: Client, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_files = upload_client.read_files

    def change(*args: Any) -> Any:
        found = read_files(*args)
        os.truncate(model / "model.safetensors", 100)
        return found

    monkeypatch.setattr(upload_client, "read_files", change)
    done = run("upload", str(model), client.url)
    assert (done.code, "became shorter" in done.err) == (74, True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "expected http://HOST:PORT"),
        ("ftp://host/models/m", "expected http://HOST:PORT"),
        ("http://", "expected http://HOST:PORT"),
        ("http://h:port", "expected http://HOST:PORT"),
        ("http://user:word@h", "expected http://HOST:PORT"),
        ("http://h/models/m?x", "expected http://HOST:PORT"),
        ("http://h/models/..", "the name of the model is '..'"),
    ],
)
def test_invalid_addresses(model: Path, url: str, message: str) -> None:
    done = run("upload", str(model), url)
    assert (done.code, message in done.err) == (2, True)


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    assert run("upload", str(tmp_path / "absent"), "http://127.0.0.1:9").code == 66
    for path in (tmp_path, tmp_path / "notes.txt"):
        assert run("upload", str(path), "http://127.0.0.1:9").code == 65


def test_no_server(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_client, "MAX_FAILURES", 3)
    done = run("upload", str(model), "http://127.0.0.1:9")
    assert done.code == 69
    assert "failed 3 times in a row (ConnectionRefusedError" in done.err
    assert "run the same command later" in done.err


@pytest.mark.parametrize("key", ["a\nb", "\u00e9", "\x7f"])
def test_an_invalid_key_is_not_printed(model: Path, key: str) -> None:
    done = run("upload", str(model), "http://127.0.0.1:9", "--api-key", key)
    assert done.code == 2
    assert "--api-key has characters other than printable ASCII" in done.err
    assert key not in done.err


class _Scripted(BaseHTTPRequestHandler):
    """Answers in a given order, and a list of the keys that arrived."""

    answers: list[tuple[int, dict[str, str], Any]]
    keys: list[str | None]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.keys.append(self.headers["Authorization"])
        status, headers, body = self.answers.pop(0)
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[tuple[type[_Scripted], str]]:
    handler = type("Handler", (_Scripted,), {"answers": [], "keys": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "headers", "body", "code", "message"),
    [
        (401, {}, {"error": {"message": "wrong key"}}, 77, "the key (wrong key): give its key"),
        (404, {}, {"detail": "Not Found"}, 66, "start the server with gptx serve --store DIR"),
        (413, {}, {"detail": "expected at most 12"}, 74, "expected at most 12"),
        (507, {}, {"detail": "the disk has 12"}, 74, "the disk has 12"),
        (400, {}, {"detail": "no manifest"}, 2, "no manifest"),
        (405, {}, [], 69, "HTTP status 405"),
        (308, {"Location": "https://other/"}, {}, 69, "give the address https://other/"),
    ],
)
def test_errors_of_the_server(
    scripted: tuple[type[_Scripted], str],
    model: Path,
    status: int,
    headers: dict[str, str],
    body: Any,
    code: int,
    message: str,
) -> None:
    handler, url = scripted
    handler.answers.append((status, headers, body))
    done = run("upload", str(model), url, "--api-key", "secret")
    assert (done.code, message in done.err) == (code, True)
    assert handler.keys == ["Bearer secret"]
    assert "secret" not in done.err


def test_a_busy_server_is_asked_again(scripted: tuple[type[_Scripted], str], model: Path) -> None:
    handler, url = scripted
    handler.answers += [(503, {"Retry-After": "0"}, {}), (429, {}, {}), (500, {}, {})]
    handler.answers.append((400, {}, {"detail": "the end"}))
    assert "the end" in run("upload", str(model), url).err
    assert handler.answers == []


def test_the_key_of_the_environment(
    scripted: tuple[type[_Scripted], str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, url = scripted
    handler.answers.append((400, {}, {}))
    monkeypatch.setenv("GPTX_API_KEY", "from the environment")
    run("upload", str(model), url)
    assert handler.keys == ["Bearer from the environment"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_terminal_gets_a_progress_bar(client: Client, model: Path) -> None:
    reader, writer = os.openpty()
    command = [sys.executable, "-m", "gptx", "upload", str(model), client.url]
    subprocess.run(command, stderr=writer, check=True, env=os.environ | {"TERM": "xterm"})
    os.close(writer)
    shown = b""
    with suppress(OSError):  # the end of a pseudoterminal
        while piece := os.read(reader, 65536):
            shown += piece
    os.close(reader)
    assert shown.count(b"100%") >= 2  # of the SHA-256, and of the upload
    assert b"SHA-256 of model.safetensors" in shown
