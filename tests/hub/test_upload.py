"""gptx.hub.upload: commits that arrive at a Hub, and the errors of uploads that fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gptx.errors import (
    AuthorizationError,
    GptxError,
    HubUnavailableError,
    NotFoundError,
    ParameterError,
    StorageError,
)
from gptx.hub.upload import upload
from tests.support.hub import hub_settings
from tests.support.hub_upload_server import TOKEN, UploadServer

# huggingface_hub 2.4 passes a deprecated argument to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": bytes(range(256)) * 500,
    "merges.txt": b"",
    "onnx/model.bin": b"another" * 100,
}


class Client:
    """Uploads in this process."""

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.home = url, home
        self.stderr = ""

    def upload(
        self, path: Path, repository: str = "me/model", *, login: str = TOKEN, **more: Any
    ) -> dict[str, Any]:
        """Upload with a saved login; report the address or the error."""
        with (
            hub_settings(self.url, self.home, HF_TOKEN=login),
            mock.patch("time.sleep"),
            redirect_stderr(StringIO()) as stderr,
        ):
            try:
                return {"url": upload(path, repository, **more)}
            except GptxError as error:
                kind = type(error).__name__
                return {"error": kind, "message": str(error), "exit": error.exit_code}
            finally:
                self.stderr = stderr.getvalue()


@pytest.fixture(scope="module")
def running_server() -> Iterator[UploadServer]:
    with UploadServer() as hub:
        yield hub


@pytest.fixture
def server(running_server: UploadServer) -> UploadServer:
    running_server.reset()
    return running_server


@pytest.fixture
def client(server: UploadServer, tmp_path: Path) -> Client:
    return Client(server.url, tmp_path)


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


class TestCommits:
    def test_folder_creates_a_repository_and_one_commit(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        result = client.upload(folder)
        assert result == {"url": f"{server.url}/me/model"}
        repository = server.repositories["me/model"]
        assert repository.branches == {"main": FILES}
        assert repository.commits == ["Upload model with gptx"]
        assert not repository.private

    def test_single_file(self, server: UploadServer, client: Client, folder: Path) -> None:
        result = client.upload(folder / "model.safetensors", message="Weights")
        assert "url" in result, result
        repository = server.repositories["me/model"]
        name = "model.safetensors"
        assert repository.branches["main"] == {name: FILES[name]}
        assert repository.commits == ["Weights"]

    def test_no_progress_bars_without_a_terminal(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        assert "url" in client.upload(folder)
        assert client.stderr == ""

    def test_private_repository(self, server: UploadServer, client: Client, folder: Path) -> None:
        assert "url" in client.upload(folder, private=True)
        assert server.repositories["me/model"].private

    def test_existing_repository_keeps_its_other_files(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        client.upload(folder / "config.json")
        server.repositories["me/model"].branches["main"]["README.md"] = b"hello"
        (folder / "config.json").write_bytes(b"{}")
        assert "url" in client.upload(folder)
        found = server.repositories["me/model"].branches["main"]
        assert found == FILES | {"README.md": b"hello", "config.json": b"{}"}

    def test_same_files_make_no_second_commit(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        for _ in range(2):
            assert "url" in client.upload(folder)
        assert len(server.repositories["me/model"].commits) == 1

    def test_branch(self, server: UploadServer, client: Client, folder: Path) -> None:
        client.upload(folder / "config.json")
        check(client.upload(folder, revision="dev"), NotFoundError, 66, "branch does not exist")
        server.repositories["me/model"].branches["dev"] = {}
        result = client.upload(folder, revision="dev")
        assert result == {"url": f"{server.url}/me/model/tree/dev"}
        assert server.repositories["me/model"].branches["dev"] == FILES

    def test_given_token_takes_precedence_over_the_saved_one(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        assert "url" in client.upload(folder, login="hf_other", token=TOKEN)


class TestErrors:
    def test_no_request_without_a_token(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        result = client.upload(folder, login="")
        check(result, AuthorizationError, 77, "hf auth login", "HF_TOKEN")
        assert server.requests == []

    @pytest.mark.parametrize(
        "name", ["", "model", "a/b/c", "me/", "/model", "me/a b", "me/ä", "-/x"]
    )
    def test_invalid_name_of_a_repository(
        self, server: UploadServer, client: Client, folder: Path, name: str
    ) -> None:
        check(client.upload(folder, name), ParameterError, 2, repr(name), "OWNER/NAME")
        assert server.requests == []

    def test_missing_file_and_empty_folder(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        check(client.upload(folder / "absent"), NotFoundError, 66, "absent does not exist")
        (folder / "empty").mkdir()
        check(client.upload(folder / "empty"), ParameterError, 2, "holds no files")
        assert server.requests == []

    @pytest.mark.skipif(sys.platform != "linux", reason="needs a file that cannot be read")
    def test_file_that_cannot_be_read(self, server: UploadServer, client: Client) -> None:
        result = client.upload(Path("/proc/self/mem"))
        check(result, StorageError, 74, "Input/output error")
        assert [repository.commits for repository in server.repositories.values()] == [[]]

    def test_wrong_token(self, server: UploadServer, client: Client, folder: Path) -> None:
        result = client.upload(folder, login="hf_may_not")
        check(result, AuthorizationError, 77, "me/model", "401", "hf auth login")
        assert server.repositories == {}

    @pytest.mark.parametrize("place", ["repos/create", "preupload", "objects/batch", "commit"])
    def test_token_without_write_access(
        self, server: UploadServer, client: Client, folder: Path, place: str
    ) -> None:
        server.faults[place] = (403, "You don't have the rights")
        check(client.upload(folder), AuthorizationError, 77, "me/model", "403")
        assert not any(r.branches["main"] for r in server.repositories.values())

    @pytest.mark.parametrize(
        "place", ["repos/create", "preupload", "objects/batch", "PUT /lfs", "commit"]
    )
    def test_error_of_the_hub_and_another_attempt(
        self, server: UploadServer, client: Client, folder: Path, place: str
    ) -> None:
        server.faults[place] = (503, "out of order")
        result = client.upload(folder)
        check(result, HubUnavailableError, 69, "model to me/model", "503", "try again")
        assert not any(r.branches["main"] for r in server.repositories.values())
        server.faults.clear()
        assert "url" in client.upload(folder)
        assert server.repositories["me/model"].branches["main"] == FILES

    def test_file_that_the_hub_rejects(
        self, server: UploadServer, client: Client, folder: Path
    ) -> None:
        server.faults["commit"] = (400, "Your push was rejected because it contains a virus.")
        check(client.upload(folder), HubUnavailableError, 69, "400", "rejected because it contains")

    def test_no_connection(self, folder: Path, tmp_path: Path) -> None:
        with UploadServer() as hub:
            pass
        client = Client(hub.url, tmp_path)
        check(client.upload(folder), HubUnavailableError, 69, hub.url, "check the connection")
