"""gptx.hub.resolve: broken connections, wrong content, no connection, no space; the cache stays right."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import __version__ as hf_version

from gptx.errors import HubUnavailableError, IntegrityError, NotFoundError, StorageError
from tests.support.hub import Client, check, check_files, model, tensors
from tests.support.hub import client as client
from tests.support.hub import server as server
from tests.support.hub_server import HubServer, commit_of, etag_of


class TestInterruptions:
    def test_cut_once(self, server: HubServer, client: Client) -> None:
        server.faults.cut, server.faults.cuts = {"model.safetensors": 70000}, 1
        result = client.one("org/model", impatient=True, chunk=10000)
        if "error" in result and hf_version < "2":
            check(result, HubUnavailableError)  # before, it did not go on by itself
            result = client.one("org/model")
        check_files(result, model())
        ranges = [r.headers["range"] for r in server.requests if "range" in r.headers]
        assert set(ranges) == {"bytes=70000-"}

    def test_always_cut_then_resumed(self, server: HubServer, client: Client) -> None:
        server.faults.cut = {"model.safetensors": 70000}
        server.faults.no_range = True
        result = client.one("org/model", impatient=True, chunk=10000)
        check(result, HubUnavailableError, "try again")
        assert len(server.log("GET", "/cdn/")) < 10  # it gave up
        assert client.wrong() == []
        assert not list(client.cache.glob("models--*/snapshots/*/model.safetensors"))
        assert [path.stat().st_size for path in client.partial()] == [70000]
        server.faults.cut, server.faults.no_range = {}, False
        server.requests.clear()
        check_files(client.one("org/model"), model())
        assert {r.headers.get("range") for r in server.requests if r.method == "GET"} >= {
            "bytes=70000-"
        }
        assert client.partial() == client.wrong() == []

    @pytest.mark.parametrize("left", [b"rubbish", b"rubbish" * 100000])
    def test_leftover_that_does_not_fit(
        self, server: HubServer, client: Client, left: bytes
    ) -> None:
        blobs = client.cache / "models--org--model" / "blobs"
        blobs.mkdir(parents=True)
        etag = etag_of("model.safetensors", tensors(0))
        (blobs / f"{etag}.incomplete").write_bytes(left)
        check_files(client.one("org/model"), model())
        assert client.partial() == client.wrong() == []

    def test_no_connection(self, server: HubServer, client: Client) -> None:
        check_files(client.one("org/model"), model())
        commit = commit_of("org/model", "main")
        server.stop()
        branch, pinned, other = client.run(
            {"model": "org/model"},
            {"model": "org/model", "revision": commit},
            {"model": "org/other"},
            impatient=True,
        )
        check_files(branch, model())
        check_files(pinned, model())
        check(other, HubUnavailableError, "org/other", client.url)

    def test_no_connection_and_half_a_cache(self, server: HubServer, client: Client) -> None:
        client.one("org/model", weights=False)
        server.stop()
        commit = commit_of("org/model", "main")
        for result in client.run(
            {"model": "org/model"}, {"model": "org/model", "revision": commit}, impatient=True
        ):
            check(result, HubUnavailableError, "org/model")


class TestIntegrity:
    @pytest.mark.parametrize("fault", ["corrupt", "shorter"])
    def test_wrong_content(self, server: HubServer, client: Client, fault: str) -> None:
        names = ["model.safetensors", "tokenizer.json", "config.json"]
        repos = {f"org/{name}": name for name in names}
        for repo, name in repos.items():
            server.repos[repo] = {"main": model()}
            getattr(server.faults, fault).add(f"{repo}/{name}")
        jobs = [{"model": repo} for repo in repos]
        results = client.run(*jobs)
        assert client.wrong() == client.partial() == []
        for (repo, name), result in zip(repos.items(), results, strict=True):
            check(result, IntegrityError, name, repo)
            published = [path for path in client.published() if repo.replace("/", "--") in path]
            assert len(published) == {"config.json": 0, "tokenizer.json": 2}.get(name, 4)
            for trace in (f"/{name}", etag_of(name, model()[name]), "refs"):
                assert not [path for path in published if path.endswith(trace) or trace == path]
        getattr(server.faults, fault).clear()
        for result in client.run(*jobs):
            check_files(result, model())

    def test_two_processes_at_once(self, server: HubServer, client: Client) -> None:
        server.faults.delay = 0.03  # 0.4 s for the weights
        processes = [client.start({"model": "org/model"}) for _ in range(3)]
        for process in processes:
            check_files(client.finish(process)[0], model())
        assert client.wrong() == client.partial() == []
        assert len(server.log("GET", "/cdn/org/model")) == 1  # the others waited for it

    @pytest.mark.parametrize("corrupt", [False, True])
    def test_never_seen_wrong(self, server: HubServer, client: Client, corrupt: bool) -> None:
        server.faults.delay = 0.02
        if corrupt:
            server.faults.corrupt.add("model.safetensors")
        processes = [client.start({"model": "org/model"}) for _ in range(2)]
        seen, polls = self.watch(client, lambda: any(p.poll() is None for p in processes))
        results = [client.finish(process)[0] for process in processes]
        assert polls > 20
        assert seen == set()
        for result in results:
            if corrupt:
                check(result, IntegrityError)
            else:
                check_files(result, model())
        # The watcher can fail:
        blob = next(client.cache.glob("models--*/blobs/*"))
        blob.write_bytes(b"wrong")
        assert self.watch(client, lambda: False)[0] == {str(blob)}

    @staticmethod
    def watch(client: Client, running: Callable[[], bool]) -> tuple[set[str], int]:
        seen: set[str] = set()
        polls = 0
        while True:
            last = not running()
            seen.update(client.wrong())
            for path in client.cache.glob("models--*/snapshots/*/*"):
                blob = path.resolve()
                if path.name not in model() or path.read_bytes() != model()[path.name]:
                    seen.add(str(blob))
            polls += 1
            if last:
                return seen, polls
            time.sleep(0.005)

    def test_verify_cached(self, server: HubServer, client: Client) -> None:
        weights = Path(client.one("org/model")["weights"][0])
        weights.write_bytes(tensors(1))  # through the link, into the blob
        trusting, offline = client.run(
            {"model": "org/model"}, {"model": "org/model", "verify_cached": True, "offline": True}
        )
        assert trusting["weights"] == [str(weights)]
        check(offline, IntegrityError, str(weights), "damaged")
        assert client.wrong() != []
        server.requests.clear()
        check_files(client.one("org/model", verify_cached=True), model())
        assert client.wrong() == []
        assert [line for line in server.log("GET") if "safetensors" not in line] == []

    def test_verify_cached_behind_two_links(self, server: HubServer, client: Client) -> None:
        """huggingface_hub 2.4 may make a blob a link into a store shared by repositories."""
        weights = Path(client.one("org/model")["weights"][0])
        if not weights.is_symlink():
            pytest.skip("this file system has no symlinks")
        blob, shared = weights.parent / os.readlink(weights), client.cache / "blobs" / ("ab" * 32)
        shared.parent.mkdir()
        blob.rename(shared)
        blob.symlink_to(shared)
        server.requests.clear()
        check_files(client.one("org/model", verify_cached=True), model())
        assert server.log("GET") == []
        shared.write_bytes(b"damaged")
        check_files(client.one("org/model", verify_cached=True), model())


class TestOffline:
    def test_with_and_without_cache(self, server: HubServer, client: Client) -> None:
        check_files(client.one("org/model"), model())
        online = server.log()
        assert online
        jobs = [{"model": "org/model", "offline": True}, {"model": "org/none", "offline": True}]
        jobs += [{"model": "org/model", "offline": True, "revision": "v1"}]
        found, none, other = client.run(*jobs)
        plain, unknown = client.run(
            {"model": "org/model"}, {"model": "org/none"}, env={"HF_HUB_OFFLINE": "1"}
        )
        for result in (found, plain):
            check_files(result, model())
        for result in (none, unknown):
            check(result, NotFoundError, "org/none", "offline", "gptx download org/none")
        check(other, NotFoundError, "org/model", "v1", "offline")
        for result in (found, none, other, plain, unknown):
            assert result["connections"] == []
        assert server.log() == online

    def test_the_audit_sees_connections(self, client: Client) -> None:
        assert client.one("org/model", weights=False)["connections"] != []

    def test_half_a_cache(self, server: HubServer, client: Client) -> None:
        client.one("org/model", weights=False)
        result = client.one("org/model", offline=True)
        check(result, NotFoundError, "model.safetensors", "offline")
        assert result["connections"] == []


class TestStorage:
    @pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE on Windows")
    def test_file_too_large(self, server: HubServer, client: Client) -> None:
        result = client.one("org/model", largest_file=100_000)
        check(result, StorageError, "model.safetensors", str(client.cache), "HF_HOME")
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
            check(result, StorageError, "model.safetensors", "No space left")
            assert client.wrong() == client.partial() == []
            assert not [entry for entry in client.published() if "safetensors" in entry]
        finally:
            subprocess.run(["umount", str(client.cache)], check=True)

    def test_cache_that_is_no_folder(self, server: HubServer, client: Client) -> None:
        client.cache.write_bytes(b"")
        check(client.one("org/model"), StorageError, str(client.cache))
