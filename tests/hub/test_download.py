"""gptx.hub.resolve: what is downloaded from a Hub that works, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from gptx.errors import (
    AuthorizationError,
    HubUnavailableError,
    NotFoundError,
    ParameterError,
    WeightsError,
)
from gptx.hub.resolve import ALIASES
from tests.support.hub import CONFIG, Client, check, check_files, index, model, tensors
from tests.support.hub import client as client
from tests.support.hub import server as server
from tests.support.hub_server import HubServer, commit_of


class TestDownload:
    def test_every_name(self, server: HubServer, client: Client) -> None:
        repos = sorted(set(ALIASES.values()))
        server.repos |= {repo: {"main": model(seed)} for seed, repo in enumerate(repos)}
        names = [*ALIASES, *repos]
        results = client.run(*({"model": name} for name in names))
        for name, result in zip(names, results, strict=True):
            repo = ALIASES.get(name, name)
            assert result["name"] == repo
            assert result["revision"] == commit_of(repo, "main")
            check_files(result, model(repos.index(repo)))
            assert set(result["tokenizer"]) == {"tokenizer.json"}
        assert client.wrong() == client.partial() == []
        assert client.stderr == ""  # no progress bars where there is no terminal

    def test_all_files_from_one_commit(self, server: HubServer, client: Client) -> None:
        server.repos["org/model"]["v1"] = model(7)
        check_files(client.one("org/model", revision="v1"), model(7))
        assert server.log()[0] == "HEAD /org/model/resolve/v1/config.json"
        commit = commit_of("org/model", "v1")
        assert all(f"/resolve/{commit}/" in line for line in server.log()[1:])
        assert len(server.log("GET", "/resolve/")) == 4  # of them two for the weights

    def test_cached_needs_one_request_or_none(self, server: HubServer, client: Client) -> None:
        files = model()
        del files["tokenizer.json"]
        server.repos["org/model"]["main"] = files
        first = client.one("org/model")
        check_files(first, files)
        assert set(first["tokenizer"]) == {"vocab.json", "merges.txt"}
        server.requests.clear()
        assert client.one("org/model")["weights"] == first["weights"]
        assert server.log() == ["HEAD /org/model/resolve/main/config.json"]
        server.requests.clear()
        pinned = client.one("org/model", revision=commit_of("org/model", "main"))
        assert pinned["weights"] == first["weights"]
        assert pinned["connections"] == []
        assert server.log() == []

    def test_branch_that_moves(self, server: HubServer, client: Client) -> None:
        old, new = "a" * 40, "b" * 40
        repo = server.repos["org/model"] = {"main": old, old: model(1), new: model(2)}
        server.after_request = lambda: repo.update(main=new)  # while the first run downloads
        ref = client.cache / "models--org--model" / "refs" / "main"
        during = client.one("org/model")
        check_files(during, model(1))
        assert during["revision"] == ref.read_text() == old
        after, pinned = client.run(
            {"model": "org/model"}, {"model": "org/model", "revision": old, "offline": True}
        )
        check_files(after, model(2))
        assert after["revision"] == ref.read_text() == new
        check_files(pinned, model(1))

    @pytest.mark.parametrize("revision", ["refs/pr/1", "v1.0"])
    def test_other_revisions(self, server: HubServer, client: Client, revision: str) -> None:
        server.repos["org/model"][revision] = model(4)
        server.faults.same_host = True
        online, offline = client.run(
            {"model": "org/model", "revision": revision},
            {"model": "org/model", "revision": revision, "offline": True},
        )
        check_files(online, model(4))
        check_files(offline, model(4))

    def test_config_and_tokenizer_alone(self, server: HubServer, client: Client) -> None:
        assert client.one("org/model", weights=False)["weights"] == []
        assert server.log("", "safetensors") == []

    def test_shards(self, server: HubServer, client: Client) -> None:
        files = model()
        files["b.safetensors"], files["a.safetensors"] = files.pop("model.safetensors"), tensors(1)
        files["model.safetensors.index.json"] = index("a.safetensors", "b.safetensors")
        server.repos["org/model"]["main"] = files
        name = "model.safetensors.index.json"
        server.repos["org/liar"] = {"main": files | {name: index("../a")}}
        server.repos["org/short"] = {"main": files | {name: index("c.safetensors")}}
        good, liar, short = client.run(*({"model": f"org/{n}"} for n in ("model", "liar", "short")))
        check_files(good, files)
        check(liar, WeightsError, "'../a'")
        check(short, NotFoundError, "c.safetensors")

    def test_other_tools_share_the_cache(self, server: HubServer, client: Client) -> None:
        code = (
            "from huggingface_hub import hf_hub_download, scan_cache_dir\n"
            "for name in ('config.json', 'model.safetensors', 'tokenizer.json'):\n"
            "    print(hf_hub_download({!r}, name))\n"
            "report = scan_cache_dir()\n"
            "assert not report.warnings, report.warnings\n"
        )
        server.repos["org/other"] = {"main": model(2)}

        def other(repo: str) -> list[str]:
            env = {**os.environ, "HF_ENDPOINT": client.url, "HF_HOME": str(client.home)}
            env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
            command = [sys.executable, "-c", code.format(repo)]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout.split()

        paths = other("org/model")
        result = client.one("org/model", offline=True)
        assert [result["config"], *result["weights"], *result["tokenizer"].values()] == paths
        mine = client.one("org/other")
        server.requests.clear()
        assert other("org/other")[1:2] == mine["weights"]
        assert server.log("GET") == []

    def test_no_symlinks(self, server: HubServer, client: Client) -> None:
        if not hasattr(constants, "HF_HUB_DISABLE_SYMLINKS"):
            pytest.skip("this huggingface_hub cannot do without symlinks")
        env = {"HF_HUB_DISABLE_SYMLINKS": "1"}
        first, again, found = client.run(
            {"model": "org/model"},
            {"model": "org/model", "verify_cached": True},
            {"model": "org/model", "offline": True},
            env=env,
        )
        for result in (first, again, found):
            check_files(result, model())
            assert not any(Path(path).is_symlink() for path in result["weights"])
        Path(first["weights"][0]).unlink()
        Path(first["weights"][0]).write_bytes(b"damaged")
        check_files(client.one("org/model", verify_cached=True, env=env), model())


class TestRefusals:
    def test_gated(self, server: HubServer, client: Client) -> None:
        server.faults.gated["org/model"] = "hf_good"
        none, bad, good = client.run(
            {"model": "org/model"},
            {"model": "org/model", "token": "hf_bad"},
            {"model": "org/model", "token": "hf_good"},
        )
        check(none, AuthorizationError, "org/model", "accept the terms", "HF_TOKEN")
        check(bad, AuthorizationError, "this token")
        assert "hf_bad" not in bad["message"]
        check_files(good, model())
        on_cdn = [request for request in server.requests if request.path.startswith("/cdn/")]
        assert on_cdn
        assert not any("authorization" in request.headers for request in on_cdn)
        shutil.rmtree(client.cache)
        check_files(client.one("org/model", env={"HF_TOKEN": "hf_good"}), model())

    def test_missing(self, server: HubServer, client: Client) -> None:
        files = model()
        del files["config.json"]
        server.repos["org/empty"] = {"main": files}
        server.repos["org/pickles"] = {"main": {"config.json": CONFIG, "pytorch_model.bin": b"1"}}
        server.repos["org/bare"] = {"main": {"config.json": CONFIG}}
        repo, revision, file, pickles, bare = client.run(
            {"model": "org/none"},
            {"model": "org/model", "revision": "v9"},
            {"model": "org/empty"},
            {"model": "org/pickles"},
            {"model": "org/bare"},
        )
        check(repo, NotFoundError, "org/none", "main", "config.json", "no such repository", "token")
        check(revision, NotFoundError, "org/model", "v9", "revision")
        check(file, NotFoundError, "org/empty", "main", "config.json")
        check(pickles, NotFoundError, "pytorch_model.bin", "gptx convert")
        check(bare, NotFoundError, "org/bare", "gptx convert")

    def test_status(self, server: HubServer, client: Client) -> None:
        kinds = {401: AuthorizationError, 403: AuthorizationError, 404: NotFoundError}
        kinds |= dict.fromkeys((408, 418, 429, 500, 503), HubUnavailableError)
        for status in kinds:
            server.repos[f"org/{status}"] = {"main": model()}
            server.faults.status[f"org/{status}"] = status
        results = client.run(*({"model": f"org/{s}"} for s in kinds), impatient=True)
        for (status, kind), result in zip(kinds.items(), results, strict=True):
            check(result, kind, f"org/{status}", "config.json")
        assert client.published() == []

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[", "{}/other"])
    def test_not_a_hub(self, server: HubServer, client: Client, url: str) -> None:
        env = {"HF_ENDPOINT": url.format(server.url)}
        result = client.one("org/model", env=env, impatient=True)
        if url == "http://[" and result["exit"] == ParameterError.exit_code:
            return check(result, ParameterError, "HF_", "Invalid IPv6 URL")  # refused at import
        check(result, NotFoundError if url == "{}/other" else HubUnavailableError)
