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
from gptx.errors import (
    GptxError,
    HubUnavailableError,
    NotFoundError,
    ParameterError,
    WeightsError,
)
from gptx.server.uploads import client as upload_client
from gptx.server.uploads.client import MAX_FAILURES, Upload, find_files, read_files
from tests.support.cli import run
from tests.support.conversions import contents
from tests.support.files import burn_bytes
from tests.support.random_models import CASES
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


def test_the_name_of_a_folder_with_dots(client: Client, root: Path, tmp_path: Path) -> None:
    model_files(tmp_path / "gpt2.v1.5")
    assert run("upload", str(tmp_path / "gpt2.v1.5"), client.url).code == 0
    assert visible(root).keys() == {"gpt2.v1.5"}


def test_all_files_of_a_format_without_fixed_names(
    client: Client, root: Path, tmp_path: Path
) -> None:
    config = burn_bytes.narrow(CASES["tiny"])
    burn_bytes.write_burn(tmp_path / "m", config)
    (tmp_path / "m" / "notes.txt").write_text("a note")
    assert run("upload", str(tmp_path / "m"), client.url).code == 0
    assert visible(root) == {"m": contents(tmp_path / "m")}


def test_a_server_below_a_path(model: Path) -> None:
    for url in ("https://h/prefix", "https://h/prefix/", "https://h/prefix/models/m"):
        assert upload_client.model_address(url, model) == "https://h/prefix/models/m"


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
    assert run("upload", str(model), url).code == 0
    assert proxy.content_bytes == length
    before = proxy.answers
    assert run("upload", str(model), url).code == 0
    assert (proxy.content_bytes, proxy.answers) == (length, before + 2)  # begin, and the state
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
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.keys.append(self.headers["Authorization"])
        status, headers, body = self.answers.pop(0)
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_PATCH = do_DELETE = do_POST

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


@pytest.mark.parametrize("offset", [{}, {"Upload-Offset": "x"}, {"Upload-Offset": ""}])
@pytest.mark.parametrize("answers_before", [0, 1])
def test_a_server_without_offsets(
    scripted: tuple[type[_Scripted], str],
    model: Path,
    offset: dict[str, str],
    answers_before: int,
) -> None:
    """Of HEAD, and of PATCH."""
    handler, url = scripted
    begun = {"files": {name: {"offset": 0} for name in contents(model)}}
    handler.answers += [(201, {}, begun), (204, {"Upload-Offset": "0"}, {}), (204, {}, {})]
    handler.answers[answers_before + 1] = (204, offset, {})
    done = run("upload", str(model), url)
    assert (done.code, "sent no offset: check the address" in done.err) == (69, True)


def test_an_upload_that_was_deleted_begins_again(client: Client, root: Path, model: Path) -> None:
    def delete(proxy: CuttingProxy) -> None:
        assert client("DELETE", "/models/m").status == 204

    proxy = CuttingProxy(client.port, 2, delete, "answers")  # after the first HEAD
    assert run("upload", str(model), f"http://127.0.0.1:{proxy.port}").code == 0
    proxy.close()
    assert visible(root) == {"m": contents(model)}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, NotFoundError), (409, ParameterError), (503, HubUnavailableError), (422, WeightsError)],
)
def test_a_set_up_is_not_repeated(
    scripted: tuple[type[_Scripted], str], status: int, kind: type[GptxError]
) -> None:
    handler, url = scripted
    handler.answers.append((status, {}, {"detail": "the reason"}))
    with pytest.raises(kind, match="the reason"):
        Upload(f"{url}/models/m", {}).setup()
    assert handler.answers == []


def test_waits_after_failures(
    scripted: tuple[type[_Scripted], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They double; the server can ask for another one."""
    handler, url = scripted
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    monkeypatch.setattr(upload_client, "FIRST_WAIT_SECONDS", 0.5)
    handler.answers += [(503, {}, {})] * 5 + [(503, {"Retry-After": "7"}, {})]
    handler.answers += [(503, {"Retry-After": "700"}, {}), (503, {}, {})]
    with pytest.raises(HubUnavailableError, match="failed 8 times in a row"):
        Upload(f"{url}/models/m", {}).run()
    assert waits == [0.5, 1, 2, 4, 8, 7, 30]
    assert handler.answers == []


def test_an_append_ends_a_row_of_failures(client: Client, model: Path) -> None:
    """A connection that is lost now and then does not end the upload."""
    cuts = iter(range(100))

    def cut(proxy: CuttingProxy) -> None:
        proxy.cut()
        proxy.at, proxy.acted = proxy.content_bytes + CHUNK + 1, next(cuts) > 20

    proxy = CuttingProxy(client.port, 1, cut)
    files = read_files(find_files(model))
    Upload(f"http://127.0.0.1:{proxy.port}/models/m", files, chunk_bytes=CHUNK).run()
    proxy.close()
    assert next(cuts) >= MAX_FAILURES


@pytest.mark.parametrize("offset", [None, 0, 500])
def test_progress(client: Client, model: Path, offset: int | None) -> None:
    files = read_files(find_files(model))
    if offset:
        source = contents(model)
        client.begin("m", source)
        client.append("/models/m/files/config.json", 0, source["config.json"])
        rest = offset - len(source["config.json"])
        client.append("/models/m/files/model.safetensors", 0, source["model.safetensors"][:rest])
    calls: list[tuple[str, int, int]] = []
    upload = Upload(
        f"{client.url}/models/m", files, chunk_bytes=CHUNK,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    upload.run(offset)
    done = [call[1] for call in calls]
    assert done == sorted(set(done))
    assert done[0] == (offset + CHUNK if offset else len(contents(model)["config.json"]))
    assert {call[2] for call in calls} == {upload.length} == {done[-1]}


def test_an_append_that_meets_another_client(
    scripted: tuple[type[_Scripted], str], model: Path
) -> None:
    """The upload asks for the offset again."""
    handler, url = scripted
    begun = {"files": {name: {"offset": 0} for name in contents(model)}}
    handler.answers += [(201, {}, begun), (204, {"Upload-Offset": "0"}, {}), (409, {}, {})]
    handler.answers.append((400, {}, {"detail": "the end"}))
    assert "the end" in run("upload", str(model), url).err
    assert handler.answers == []


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
