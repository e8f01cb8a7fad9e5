"""gptx.conversions.formats.openai_download: OpenAI's files from a server on loopback."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptx.conversions import convert, read
from gptx.conversions.formats.openai_download import fetch
from gptx.errors import (
    AuthorizationError,
    HubUnavailableError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    StorageError,
)
from gptx.hub import download
from gptx.random_weights import random_weights
from tests.support.files.tensor_bundle_bytes import write_openai
from tests.support.hub import Client, check, hub_settings, inherited
from tests.support.hub_server import HubServer
from tests.support.random_models import CASES

DATA = "model.ckpt.data-00000-of-00001"
CONFIG = CASES["124M"]


class Fetcher(Client):
    """Calls of `fetch` or `convert` that share one cache.

    For the server, OpenAI's folder "124M" is the revision of a repository.
    """

    def __init__(self, server: HubServer, home: Path) -> None:
        super().__init__(server, home / "home")
        self.folder = home / "home" / "assets" / "gptx" / "openai" / "124M"
        self.incomplete = self.folder.with_name("124M.incomplete")

    def call(self, job: dict[str, Any]) -> dict[str, Any]:
        if "source" in job:
            convert(**job)
            return {}
        return {"folder": str(fetch(**job))}

    def run(
        self, *jobs: dict[str, Any], env: dict[str, str] | None = None, **setup: Any
    ) -> list[dict[str, Any]]:
        env = {"GPTX_OPENAI_URL": f"{self.url}/models/resolve/", **(env or {})}
        return super().run(*jobs, env=env, **setup)

    def fetch(self, name: str = "openai:124M", **setup: Any) -> dict[str, Any]:
        return self.run({"name": name}, **setup)[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Write the files of a small model under OpenAI's names."""
    folder = tmp_path_factory.mktemp("openai")
    tokenizer = read("shakespeare")[1].tokenizer
    write_openai(folder, CONFIG, random_weights(CONFIG), tokenizer)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[HubServer]:
    with HubServer({"models": {"124M": dict(files)}}) as hub:
        yield hub


@pytest.fixture
def fetcher(server: HubServer, tmp_path: Path) -> Fetcher:
    return Fetcher(server, tmp_path)


def check_folder(result: dict[str, Any], fetcher: Fetcher, files: dict[str, bytes]) -> None:
    """Check that every file was downloaded, byte by byte, and nothing else is left."""
    assert "error" not in result, result
    assert Path(result["folder"]) == fetcher.folder
    assert {path.name: path.read_bytes() for path in fetcher.folder.iterdir()} == files
    assert not fetcher.incomplete.exists()


def check_nothing(fetcher: Fetcher) -> None:
    assert not fetcher.folder.exists()
    assert not fetcher.incomplete.exists()


class TestFetching:
    def test_second_call_needs_no_connection(
        self, server: HubServer, fetcher: Fetcher, files: dict[str, bytes]
    ) -> None:
        name = "openai:124M"
        first, second, converted = fetcher.run(
            {"name": name},
            {"name": name, "offline": True},
            {"source": name, "destination": str(fetcher.home / "model")},
        )
        check_folder(first, fetcher, files)
        check_folder(second, fetcher, files)
        assert first["connections"] != []
        assert second["connections"] == converted["connections"] == []
        paths = [f"/models/resolve/124M/{name}" for name in files]
        assert sorted(server.log("GET")) == sorted(f"GET {path}" for path in paths)
        assert not any("authorization" in request.headers for request in server.requests)
        found = read(fetcher.home / "model")[1].tensors
        for name, array in random_weights(CONFIG).items():
            assert found[name].tobytes() == array.tobytes()
        server.stop()
        check_folder(fetcher.fetch(), fetcher, files)

    def test_convert_downloads_without_a_token(self, fetcher: Fetcher, server: HubServer) -> None:
        job = {"source": "openai:124M", "destination": str(fetcher.home.with_name("model"))}
        (result,) = fetcher.run(job, env={"HF_TOKEN": "hf_secret"})
        assert "error" not in result, result
        assert not any("authorization" in request.headers for request in server.requests)
        assert read(fetcher.home.with_name("model"))[1].config.n_layer == CONFIG.n_layer

    def test_two_calls_at_once(
        self, server: HubServer, fetcher: Fetcher, files: dict[str, bytes]
    ) -> None:
        """Threads: the lock is the one that tests/hub/test_staging.py tests with processes."""
        server.faults.delay = 0.001
        url = f"{fetcher.url}/models/resolve"
        with hub_settings(fetcher.url, fetcher.home, GPTX_OPENAI_URL=url):
            threads = [threading.Thread(target=fetch, args=("openai:124M",)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        check_folder(fetcher.fetch(), fetcher, files)
        assert len(server.log("GET", DATA)) == 1

    def test_shards(self, server: HubServer, fetcher: Fetcher, tmp_path: Path) -> None:
        folder = write_openai(tmp_path / "m", CONFIG, random_weights(CONFIG), shards=3)
        files: dict[str, bytes] = server.repos["models"]["124M"]  # type: ignore[assignment]
        del files[DATA]
        files |= {path.name: path.read_bytes() for path in folder.iterdir()}
        check_folder(fetcher.fetch(), fetcher, files)


class TestInterruptions:
    def test_always_interrupted_then_resumed(
        self,
        server: HubServer,
        fetcher: Fetcher,
        files: dict[str, bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(download, "CHUNK_BYTES", 10_000)
        server.faults.truncated, server.faults.no_range = {DATA: 70000}, True
        result = fetcher.fetch(impatient=True)
        check(result, HubUnavailableError, DATA, "try again")
        assert result["exit"] == 69
        assert len(server.log("GET", DATA)) == 2
        assert not fetcher.folder.exists()
        assert (fetcher.incomplete / DATA).read_bytes() == files[DATA][:70000]
        server.faults.truncated, server.faults.no_range = {}, False
        server.requests.clear()
        check_folder(fetcher.fetch(), fetcher, files)
        assert [r.headers.get("range") for r in server.requests if DATA in r.path] == [
            "bytes=70000-"
        ]

    @pytest.mark.parametrize("left", [b"rubbish", b"rubbish" * 400000])
    def test_partial_file_that_does_not_fit(
        self, fetcher: Fetcher, files: dict[str, bytes], left: bytes
    ) -> None:
        fetcher.incomplete.mkdir(parents=True)
        (fetcher.incomplete / DATA).write_bytes(left)
        check_folder(fetcher.fetch(), fetcher, files)

    def test_no_connection(self, server: HubServer, fetcher: Fetcher) -> None:
        server.stop()
        result = fetcher.fetch(impatient=True)
        check(
            result, HubUnavailableError, f"{fetcher.url}/models/resolve/124M", "was not delivered"
        )
        assert not fetcher.folder.exists()

    @pytest.mark.parametrize(
        ("status", "kind", "exit"),
        [(404, NotFoundError, 66), (403, AuthorizationError, 77), (500, HubUnavailableError, 69)],
    )
    def test_refused(
        self, server: HubServer, fetcher: Fetcher, status: int, kind: Any, exit: int
    ) -> None:
        server.faults.status = {"vocab.bpe": status}
        result = fetcher.fetch(impatient=True)
        check(result, kind, "124M/vocab.bpe")
        assert result["exit"] == exit
        assert not fetcher.folder.exists()


class TestIntegrity:
    @pytest.mark.parametrize("name", [DATA, "model.ckpt.index", "hparams.json", "encoder.json"])
    def test_damaged(self, server: HubServer, fetcher: Fetcher, name: str) -> None:
        server.faults.corrupt.add(name)
        result = fetcher.fetch()
        check(result, IntegrityError, "124M", name)
        assert result["exit"] == 65
        check_nothing(fetcher)

    def test_another_size(self, server: HubServer, fetcher: Fetcher) -> None:
        server.faults.shorter.add(DATA)
        check(fetcher.fetch(), IntegrityError, DATA, "another size")
        check_nothing(fetcher)


class TestRefusals:
    def test_names_and_settings(self, fetcher: Fetcher) -> None:
        name = "openai:124M"
        unknown, revision, offline, empty = fetcher.run(
            {"name": "openai:117M"},
            {"name": name, "revision": "main"},
            {"name": name, "offline": True},
            {"name": "openai:"},
        )
        check(unknown, NotFoundError, "openai:117M", "openai:1558M")
        check(empty, NotFoundError, "'openai:'")
        check(revision, ParameterError, "revision is 'main'")
        check(offline, NotFoundError, "is not in the cache", "offline")
        by_environment = fetcher.fetch(env={"HF_HUB_OFFLINE": "1"})
        check(by_environment, NotFoundError, "is not in the cache", "offline")
        for url in ("ftp://x", "http://[", "http://x:y", "http://"):
            check(fetcher.fetch(env={"GPTX_OPENAI_URL": url}), ParameterError, "GPTX_OPENAI_URL")

    def test_invalid_variable_of_huggingface_hub(self, tmp_path: Path) -> None:
        code = (
            "import sys; from gptx.conversions import convert; convert('openai:124M', sys.argv[1])"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "model")]
        env = inherited() | {"HF_HUB_ETAG_TIMEOUT": "soon"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert "ParameterError: an HF_ environment variable is invalid" in done.stderr

    @pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE on Windows")
    def test_file_too_large(self, fetcher: Fetcher, files: dict[str, bytes]) -> None:
        result = fetcher.fetch(largest_file=1_000_000)
        check(result, StorageError, DATA, str(fetcher.folder.parent), "HF_HOME")
        assert result["exit"] == 74
        check_nothing(fetcher)
        check_folder(fetcher.fetch(), fetcher, files)

    def test_cache_that_is_no_folder(self, fetcher: Fetcher) -> None:
        fetcher.home.write_bytes(b"")
        check(fetcher.fetch(), StorageError, str(fetcher.folder.parent))
