"""gptx.hub.download: interrupted and resumed transfers, retries, a full disk."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gptx.errors import HubUnavailableError, StorageError
from gptx.hub import download
from tests.support.hub import Client, check, check_files, model, tensors
from tests.support.hub_server import HubServer, etag_of

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "CHUNK_BYTES", 10_000)


def ranges(server: HubServer) -> set[str]:
    return {request.headers["range"] for request in server.requests if "range" in request.headers}


class TestInterruptions:
    def test_interrupted_once(self, server: HubServer, client: Client) -> None:
        server.faults.truncated, server.faults.truncations = {WEIGHTS: 70_000}, 1
        check_files(client.one("org/model", impatient=True), model())
        assert ranges(server) == {"bytes=70000-"}

    def test_interrupted_before_every_byte(self, server: HubServer, client: Client) -> None:
        server.faults.truncated = {WEIGHTS: 0}
        result = client.one("org/model", impatient=True)
        check(result, HubUnavailableError, WEIGHTS, "try again")
        assert len(server.log("GET", "/cdn/")) == download.MAX_FAILURES

    def test_progress_resets_the_count_of_failures(self, server: HubServer, client: Client) -> None:
        server.faults.truncated = {WEIGHTS: 30_000}
        check_files(client.one("org/model", impatient=True), model())
        assert len(server.log("GET", "/cdn/")) > download.MAX_FAILURES

    def test_always_interrupted_then_resumed(self, server: HubServer, client: Client) -> None:
        server.faults.truncated = {WEIGHTS: 70_000}
        server.faults.no_range = True
        result = client.one("org/model", impatient=True)
        check(result, HubUnavailableError, "try again")
        assert len(server.log("GET", "/cdn/")) == 2
        assert client.wrong() == []
        assert not list(client.cache.glob(f"models--*/snapshots/*/{WEIGHTS}"))
        assert [path.stat().st_size for path in client.partial()] == [70_000]
        server.faults.truncated, server.faults.no_range = {}, False
        server.requests.clear()
        check_files(client.one("org/model"), model())
        assert ranges(server) == {"bytes=70000-"}
        assert client.partial() == client.wrong() == []

    @pytest.mark.parametrize("size", [7, 100_000, len(tensors(0)), 700_000])
    def test_partial_file_that_does_not_fit(
        self, server: HubServer, client: Client, size: int
    ) -> None:
        blobs = client.cache / "models--org--model" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / f"{etag_of(WEIGHTS, tensors(0))}.incomplete").write_bytes(b"x" * size)
        check_files(client.one("org/model"), model())
        assert client.partial() == client.wrong() == []

    def test_partial_file_and_a_server_without_ranges(
        self, server: HubServer, client: Client
    ) -> None:
        server.faults.no_range = True
        blobs = client.cache / "models--org--model" / "blobs"
        blobs.mkdir(parents=True)
        partial = blobs / f"{etag_of(WEIGHTS, tensors(0))}.incomplete"
        partial.write_bytes(tensors(0)[:70_000])
        check_files(client.one("org/model"), model())


class TestStorage:
    @pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE on Windows")
    def test_file_too_large(self, server: HubServer, client: Client) -> None:
        result = client.one("org/model", largest_file=100_000)
        check(result, StorageError, WEIGHTS, str(client.cache), "HF_HOME")
        assert client.wrong() == client.partial() == []
        assert not [entry for entry in client.published() if "safetensors" in entry]
        check_files(client.one("org/model"), model())

    def test_disk_full(self, server: HubServer, client: Client) -> None:
        client.cache.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(client.cache)]
        if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("cannot mount a small tmpfs here")
        try:
            result = client.one("org/model")
            check(result, StorageError, WEIGHTS, "No space left")
            assert client.wrong() == client.partial() == []
            assert not [entry for entry in client.published() if "safetensors" in entry]
        finally:
            subprocess.run(["umount", str(client.cache)], check=True)
