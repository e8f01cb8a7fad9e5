"""gptx.hub.upload: what arrives at a Hub, and what is said when it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptx.errors import (
    AuthorizationError,
    HubUnavailableError,
    NotFoundError,
    ParameterError,
    StorageError,
)
from tests.support.hub_upload_server import TOKEN, UploadServer

FILES = {
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": bytes(range(256)) * 500,
    "merges.txt": b"",
    "onnx/model.bin": b"another" * 100,
}

# huggingface_hub reads its environment when it is imported, so uploads are made by another process:
# one line of JSON in, one line out.
CLIENT = """
import json, os, sys, time
time.sleep = lambda seconds: None
from gptx.errors import GptxError
from gptx.hub.upload import upload
for line in sys.stdin:
    job = json.loads(line)
    os.environ["HF_TOKEN"] = job.pop("login")
    try:
        result = dict(url=upload(**job))
    except GptxError as error:
        result = dict(error=type(error).__name__, message=str(error), exit=error.exit_code)
    print(json.dumps(result), flush=True)
"""


class Client:
    """The other process."""

    def __init__(self, url: str, home: Path) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        kept |= {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        self.stderr = home / "stderr"
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CLIENT],
                env=kept,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def upload(
        self, path: Path, repository: str = "me/model", *, login: str = TOKEN, **more: Any
    ) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"path": str(path), "repository": repository, "login": login, **more}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the process ended"
        result: dict[str, Any] = json.loads(line)
        return result

    def finish(self) -> None:
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[UploadServer, Client]]:
    with UploadServer() as hub:
        client = Client(hub.url, tmp_path_factory.mktemp("home"))
        yield hub, client
        client.finish()


@pytest.fixture
def server(connected: tuple[UploadServer, Client]) -> UploadServer:
    connected[0].reset()
    return connected[0]


@pytest.fixture
def client(connected: tuple[UploadServer, Client]) -> Client:
    return connected[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "left-out").write_bytes(b"hidden")
    return folder


def check(result: dict[str, Any], kind: type[Exception], exit: int, *words: str) -> None:
    assert (result.get("error"), result.get("exit")) == (kind.__name__, exit), result
    assert "\n" not in result["message"]
    assert TOKEN not in result["message"]
    for word in words:
        assert word in result["message"], (word, result)


class TestWhatArrives:
    def test_a_folder_makes_a_repository_and_one_commit(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        result = client.upload(folder)
        assert result == {"url": f"{server.url}/me/model"}
        repository = server.repositories["me/model"]
        assert repository.branches == {"main": FILES}
        assert repository.commits == ["Upload model with gptx"]
        assert not repository.private

    def test_a_single_file(self, server: UploadServer, client: Client, folder: Path) -> None:
        result = client.upload(folder / "model.safetensors", message="Weights")
        assert "url" in result, result
        repository = server.repositories["me/model"]
        name = "model.safetensors"
        assert repository.branches["main"] == {name: FILES[name]}
        assert repository.commits == ["Weights"]

    def test_no_bars_where_there_is_no_terminal(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        before = client.stderr.read_text()
        assert "url" in client.upload(folder)
        assert client.stderr.read_text() == before

    def test_a_private_repository(self, server: UploadServer, client: Client, folder: Path) -> None:
        assert "url" in client.upload(folder, private=True)
        assert server.repositories["me/model"].private

    def test_a_repository_that_is_there_keeps_its_other_files(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        client.upload(folder / "config.json")
        server.repositories["me/model"].branches["main"]["README.md"] = b"hello"
        (folder / "config.json").write_bytes(b"{}")
        assert "url" in client.upload(folder)
        found = server.repositories["me/model"].branches["main"]
        assert found == FILES | {"README.md": b"hello", "config.json": b"{}"}

    def test_the_same_again_is_no_second_commit(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        for _ in range(2):
            assert "url" in client.upload(folder)
        assert len(server.repositories["me/model"].commits) == 1

    def test_a_branch(self, server: UploadServer, client: Client, folder: Path) -> None:
        client.upload(folder / "config.json")
        check(client.upload(folder, revision="dev"), NotFoundError, 66, "no such branch")
        server.repositories["me/model"].branches["dev"] = {}
        result = client.upload(folder, revision="dev")
        assert result == {"url": f"{server.url}/me/model/tree/dev"}
        assert server.repositories["me/model"].branches["dev"] == FILES

    def test_a_token_that_is_given_goes_before_the_saved_one(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        assert "url" in client.upload(folder, login="hf_other", token=TOKEN)


class TestWhatDoesNot:
    def test_without_a_token_nothing_is_sent(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        result = client.upload(folder, login="")
        check(result, AuthorizationError, 77, "hf auth login", "HF_TOKEN")
        assert server.requests == []

    @pytest.mark.parametrize(
        "name", ["", "model", "a/b/c", "me/", "/model", "me/a b", "me/ä", "-/x"]
    )
    def test_under_no_name_of_a_repository(
        self, server: UploadServer, client: Client, folder: Path, name: str
    ) -> None:
        check(client.upload(folder, name), ParameterError, 2, repr(name), "OWNER/NAME")
        assert server.requests == []

    def test_what_is_not_there(self, server: UploadServer, client: Client, folder: Path) -> None:
        check(client.upload(folder / "absent"), NotFoundError, 66, "absent does not exist")
        (folder / "empty").mkdir()
        check(client.upload(folder / "empty"), ParameterError, 2, "holds no files")
        assert server.requests == []

    @pytest.mark.skipif(sys.platform != "linux", reason="needs a file that nobody can read")
    def test_what_cannot_be_read(self, server: UploadServer, client: Client) -> None:
        result = client.upload(Path("/proc/self/mem"))
        check(result, StorageError, 74, "Input/output error")
        assert [repository.commits for repository in server.repositories.values()] == [[]]

    def test_with_a_wrong_token(self, server: UploadServer, client: Client, folder: Path) -> None:
        result = client.upload(folder, login="hf_may_not")
        check(result, AuthorizationError, 77, "me/model", "401", "hf auth login")
        assert server.repositories == {}

    @pytest.mark.parametrize("place", ["repos/create", "preupload", "objects/batch", "commit"])
    def test_where_this_token_may_not_write(
        self, server: UploadServer, client: Client, folder: Path, place: str
    ) -> None:
        server.faults[place] = (403, "You don't have the rights")
        check(client.upload(folder), AuthorizationError, 77, "me/model", "403")
        assert not any(r.branches["main"] for r in server.repositories.values())

    @pytest.mark.parametrize(
        "place", ["repos/create", "preupload", "objects/batch", "PUT /lfs", "commit"]
    )
    def test_while_the_hub_has_an_error(
        self, server: UploadServer, client: Client, folder: Path, place: str
    ) -> None:
        server.faults[place] = (503, "out of order")
        result = client.upload(folder)
        check(result, HubUnavailableError, 69, "model to me/model", "503", "try again")
        assert not any(r.branches["main"] for r in server.repositories.values())
        server.faults.clear()
        assert "url" in client.upload(folder)
        assert server.repositories["me/model"].branches["main"] == FILES

    def test_a_file_that_the_hub_rejects(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        server.faults["commit"] = (400, "Your push was rejected because it contains a virus.")
        check(client.upload(folder), HubUnavailableError, 69, "400", "rejected because it contains")

    def test_to_a_hub_that_is_not_there(self, folder: Path, tmp_path: Path) -> None:
        with UploadServer() as hub:
            pass  # it has gone when the block is left
        client = Client(hub.url, tmp_path)
        check(client.upload(folder), HubUnavailableError, 69, hub.url, "check the connection")
        client.finish()
