"""gptx.hub.repository: files and commits from a Hub, refusals, wrong content, offline use."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest

from gptx.errors import (
    AuthorizationError,
    HubUnavailableError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    StorageError,
    WeightsError,
)
from gptx.hub.connection import CERTIFICATE_VARIABLES
from gptx.hub.repository import METADATA_ATTEMPTS
from gptx.hub.resolve import ALIASES, find_source
from gptx.model_files import find_files, find_weights
from tests.support.hub import (
    CONFIG,
    Client,
    check,
    check_files,
    hub_settings,
    index,
    model,
    tensors,
)
from tests.support.hub_server import HubServer, commit_of, etag_of


class TestFiles:
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
        assert client.stderr == ""  # progress bars need a terminal

    def test_all_files_from_one_commit(self, server: HubServer, client: Client) -> None:
        server.repos["org/model"]["v1"] = model(7)
        check_files(client.one("org/model", revision="v1"), model(7))
        assert server.log()[0] == "HEAD /org/model/resolve/v1/config.json"
        commit = commit_of("org/model", "v1")
        assert all(f"/resolve/{commit}/" in line for line in server.log()[1:])
        assert len(server.log("GET", "/resolve/")) == 4  # two of them for the weights

    def test_cached_model_needs_one_request_or_none(
        self, server: HubServer, client: Client
    ) -> None:
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

    def test_branch_that_moves_during_a_download(self, server: HubServer, client: Client) -> None:
        old, new = "a" * 40, "b" * 40
        repo = server.repos["org/model"] = {"main": old, old: model(1), new: model(2)}
        server.after_request = lambda: repo.update(main=new)
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

    def test_weights_of_a_later_step_are_of_the_same_commit(
        self, server: HubServer, client: Client
    ) -> None:
        old, new = "a" * 40, "b" * 40
        repo = server.repos["org/model"] = {"main": old, old: model(1), new: model(2)}
        with hub_settings(client.url, client.home):
            source = find_source("org/model")
            find_files(source, weights=False)
            repo["main"] = new
            server.requests.clear()
            (weights,) = find_weights(source)
            assert find_files(source).weights == (weights,)
        assert weights.read_bytes() == model(1)["model.safetensors"]
        assert [line.partition(" ")[0] for line in server.log()] == ["HEAD", "GET", "GET"]
        assert all(f"/resolve/{old}/model.safetensors" in line for line in server.log())

    def test_renamed_repository(self, server: HubServer, client: Client) -> None:
        server.faults.renamed["old/name"] = "org/model"
        server.faults.gated["org/model"] = "hf_good"
        online, offline = client.run(
            {"model": "old/name", "token": "hf_good"}, {"model": "old/name", "offline": True}
        )
        check_files(online, model())
        check_files(offline, model())

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

    def test_without_weights(self, server: HubServer, client: Client) -> None:
        assert client.one("org/model", weights=False)["weights"] == []
        assert server.log("", "safetensors") == []

    def test_shards(self, server: HubServer, client: Client) -> None:
        files = model()
        files["b.safetensors"], files["a.safetensors"] = files.pop("model.safetensors"), tensors(1)
        files["model.safetensors.index.json"] = index("a.safetensors", "b.safetensors")
        server.repos["org/model"]["main"] = files
        name = "model.safetensors.index.json"
        server.repos["org/hostile"] = {"main": files | {name: index("../a")}}
        server.repos["org/short"] = {"main": files | {name: index("c.safetensors")}}
        jobs = ({"model": f"org/{name}"} for name in ("model", "hostile", "short"))
        good, hostile, short = client.run(*jobs)
        check_files(good, files)
        check(hostile, WeightsError, "'../a'")
        check(short, NotFoundError, "c.safetensors")


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

    def test_token_of_the_environment(self, server: HubServer, client: Client) -> None:
        server.faults.gated["org/model"] = "hf_good"
        variables = {"HF_TOKEN": "hf_good"}
        hidden = client.one("org/model", env=variables | {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})
        check(hidden, AuthorizationError, "without a token")
        check_files(client.one("org/model", env=variables), model())

    def test_saved_token_that_cannot_be_read(self, client: Client) -> None:
        client.home.mkdir(exist_ok=True)
        (client.home / "token").write_bytes(b"hf_\xff")
        check(client.one("org/model"), ParameterError, "the token of `hf auth login` is not text")
        (client.home / "token").unlink()
        (client.home / "token").mkdir()
        folder = client.one("org/model")
        check(folder, StorageError, "`hf auth login` cannot be read", str(client.home / "token"))
        check_files(client.one("org/model", env={"HF_TOKEN": "hf_good"}), model())

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("gtp2", "gpt2"),
            ("gpt2-meduim", "gpt2-medium"),
            ("shakespear", "shakespeare"),
            ("GPT2-XL", "gpt2-xl"),
        ],
    )
    def test_misspelled_name(self, client: Client, name: str, meant: str) -> None:
        for offline in (False, True):
            result = client.one(name, offline=offline)
            check(result, NotFoundError, name, f"; did you mean {meant}?")
        other = client.one(f"org/{name}")
        assert "did you mean" not in other["message"]

    def test_misspelled_name_without_a_connection(self, server: HubServer, client: Client) -> None:
        server.stop()
        result = client.one("GPT2", impatient=True)
        check(result, HubUnavailableError, "check the connection", "; did you mean gpt2?")

    @pytest.mark.parametrize("token", ["hf_é", "hf_a b", "hf_\u200b"])
    def test_token_that_http_cannot_carry(self, client: Client, token: str) -> None:
        given = client.one("org/model", token=token)
        check(given, ParameterError, "token contains", "copy it again")
        variable = client.one("org/model", env={"HF_TOKEN": token})
        check(variable, ParameterError, "HF_TOKEN contains")
        client.home.mkdir(exist_ok=True)
        (client.home / "token").write_text(token, encoding="utf-8")
        saved = client.one("org/model")
        check(saved, ParameterError, "the token of `hf auth login` contains")
        for result in (given, variable, saved):
            assert result["connections"] == []
            assert token not in result["message"]

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
        check(
            repo,
            NotFoundError,
            "org/none",
            "main",
            "config.json",
            "repository does not exist",
            "token",
        )
        check(revision, NotFoundError, "revision v9 does not exist in org/model on", "of 40 digits")
        check(file, NotFoundError, "config.json of org/empty@main", "hf download org/empty")
        assert [Path(path).name for path in pickles["weights"]] == ["pytorch_model.bin"]
        check(bare, NotFoundError, "org/bare", "no pytorch_model.bin", "hf download org/bare")

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
    def test_endpoint_that_is_no_hub(self, server: HubServer, client: Client, url: str) -> None:
        env = {"HF_ENDPOINT": url.format(server.url)}
        result = client.one("org/model", env=env, impatient=True)
        if url == "{}/other":
            check(result, NotFoundError)
        else:
            words = [] if url.endswith(":9") else [f"HF_ENDPOINT is '{url}'", "https://"]
            check(result, HubUnavailableError, *words)

    def test_invalid_setting_is_not_tried_again(self, client: Client) -> None:
        with mock.patch("time.sleep") as sleep:
            client.one("org/model", env={"HF_ENDPOINT": "nonsense"})
            sleep.assert_not_called()
            client.one("org/model", env={"HF_ENDPOINT": "http://127.0.0.1:9"})
            assert sleep.call_count == METADATA_ATTEMPTS - 1


class TestIntegrity:
    @pytest.mark.parametrize("fault", ["corrupt", "shorter"])
    def test_wrong_content(self, server: HubServer, client: Client, fault: str) -> None:
        names = ["model.safetensors", "tokenizer.json", "config.json"]
        repos = {f"org/{name.replace('.', '-')}": name for name in names}
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


class TestNoConnection:
    def test_complete_cache(self, server: HubServer, client: Client) -> None:
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
        check(other, HubUnavailableError, "org/other", client.url, "model='shakespeare'")

    def test_incomplete_cache_without_a_connection(self, server: HubServer, client: Client) -> None:
        client.one("org/model", weights=False)
        server.stop()
        commit = commit_of("org/model", "main")
        for result in client.run(
            {"model": "org/model"}, {"model": "org/model", "revision": commit}, impatient=True
        ):
            check(result, HubUnavailableError, "org/model")


class TestOffline:
    def test_cached_and_not_cached(self, server: HubServer, client: Client) -> None:
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
            assert "model='shakespeare', which needs no download" in result["message"]
        check(other, NotFoundError, "org/model", "v1", "offline")
        for result in (found, none, other, plain, unknown):
            assert result["connections"] == []
        assert server.log() == online

    def test_counter_of_connections(self, client: Client) -> None:
        assert client.one("org/model", weights=False)["connections"] != []

    def test_incomplete_cache(self, server: HubServer, client: Client) -> None:
        client.one("org/model", weights=False)
        result = client.one("org/model", offline=True)
        check(result, NotFoundError, "model.safetensors", "offline")
        assert result["connections"] == []

    def test_process_with_an_audit_hook(self, server: HubServer, client: Client) -> None:
        """No library of a real process opens a connection, and variables are read."""
        client.one("org/model")
        jobs = [{"model": "org/model", "offline": True}, {"model": "org/model"}]
        offline, online = client.finish(client.start(*jobs))
        by_variable = client.finish(client.start({"model": "gpt2"}, HF_HUB_OFFLINE="1"))[0]
        check_files(offline, model())
        check(by_variable, NotFoundError, "openai-community/gpt2", str(client.cache))
        assert offline["connections"] == by_variable["connections"] == []
        assert online["connections"] != []

    def test_invalid_variable(self, client: Client) -> None:
        (result,) = client.finish(client.start({"model": "gpt2"}, HF_HUB_ETAG_TIMEOUT="soon"))
        check(result, ParameterError, "HF_ environment variable", "soon")

    def test_file_of_certificates_that_does_not_exist(self, client: Client) -> None:
        variables = dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), "/nonexistent")
        process = client.start({"model": "gpt2"}, HF_ENDPOINT="https://127.0.0.1:9", **variables)
        (result,) = client.finish(process)
        problem = f"{CERTIFICATE_VARIABLES[0]} is /nonexistent, which holds no certificates"
        check(result, HubUnavailableError, problem, f"unset {CERTIFICATE_VARIABLES[0]}")


class TestStorage:
    def test_read_only_cache_that_is_complete(self, server: HubServer, client: Client) -> None:
        check_files(client.one("org/model"), model())
        refs = client.cache / "models--org--model" / "refs"
        shutil.rmtree(refs)
        refs.write_bytes(b"")  # no ref can be written
        check_files(client.one("org/model"), model())
        shutil.rmtree(client.cache / "models--org--model" / "snapshots")
        check(client.one("org/model"), StorageError, "the ref", "HF_HOME")

    def test_cache_that_is_no_folder(self, server: HubServer, client: Client) -> None:
        client.cache.write_bytes(b"")
        check(client.one("org/model"), StorageError, str(client.cache))
