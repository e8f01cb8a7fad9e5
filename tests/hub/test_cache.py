"""gptx.hub.cache: the layout that other Hugging Face tools read and write."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir

from gptx.errors import HubUnavailableError, NotFoundError, StorageError
from gptx.hub.resolve import ALIASES, FORMER_NAMES
from tests.support.hub import Client, check, check_files, hub_settings, index, model
from tests.support.hub_server import HubServer, commit_of
from tests.support.permissions import folder_of_another_user, unprivileged

NAMES = ("config.json", "model.safetensors", "tokenizer.json")


def download_by_huggingface_hub(client: Client, repo: str) -> list[str]:
    with hub_settings(client.url, client.home):
        paths = [hf_hub_download(repo, name) for name in NAMES]
        report = scan_cache_dir(client.cache)
    assert not report.warnings, report.warnings
    return paths


def paths_of(result: dict[str, Any]) -> list[str]:
    return [result["config"], *result["weights"], *result["tokenizer"].values()]


def test_files_of_huggingface_hub_are_found(server: HubServer, client: Client) -> None:
    paths = download_by_huggingface_hub(client, "org/model")
    assert paths_of(client.one("org/model", offline=True)) == paths


def test_huggingface_hub_finds_files_of_gptx(server: HubServer, client: Client) -> None:
    result = client.one("org/model")
    server.requests.clear()
    assert download_by_huggingface_hub(client, "org/model") == paths_of(result)
    assert server.log("GET") == []


def test_two_commits_share_a_blob(server: HubServer, client: Client) -> None:
    server.repos["org/model"]["v2"] = model() | {"config.json": b"{}"}
    client.one("org/model")
    server.requests.clear()
    check_files(client.one("org/model", revision="v2"), model() | {"config.json": b"{}"})
    assert [line.rpartition("/")[2] for line in server.log("GET")] == ["config.json"]


def test_missing_file_is_requested_once(server: HubServer, client: Client) -> None:
    files = server.repos["org/model"]["main"]
    assert isinstance(files, dict)
    del files["tokenizer.json"]
    for _ in range(2):
        client.one("org/model")
    assert len(server.log("HEAD", "tokenizer.json")) == 1


def test_verification_behind_two_links(server: HubServer, client: Client) -> None:
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


@pytest.mark.parametrize("hard_links", [True, False])
def test_no_symlinks(
    server: HubServer, client: Client, hard_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(constants, "HF_HUB_DISABLE_SYMLINKS"):
        monkeypatch.setattr(Path, "symlink_to", refuse)
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
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


class TestFormerNames:
    """The cache of "gpt2", which tools make that use the id from before names had owners."""

    REPO, FORMER = "openai-community/gpt2", "gpt2"

    @pytest.fixture
    def former(self, server: HubServer, client: Client) -> Path:
        server.repos[self.REPO] = {"main": model()}
        server.faults.renamed[self.FORMER] = self.REPO
        download_by_huggingface_hub(client, self.FORMER)
        server.requests.clear()
        return client.cache / "models--gpt2"

    def test_every_former_name(self) -> None:
        names = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}
        assert set(FORMER_NAMES.values()) == names
        assert all(ALIASES[name] == repo for repo, name in FORMER_NAMES.items())

    @pytest.mark.parametrize("name", [REPO, FORMER, "124M"])
    def test_is_found(self, server: HubServer, client: Client, former: Path, name: str) -> None:
        offline, online = client.run({"model": name, "offline": True}, {"model": name})
        for result in (offline, online):
            check_files(result, model())
            assert result["name"] == self.REPO
            assert all(former in Path(path).parents for path in paths_of(result))
        assert offline["connections"] == []
        assert server.log("GET") == server.log("", "safetensors") == []

    def test_is_verified(self, server: HubServer, client: Client, former: Path) -> None:
        Path(client.one("gpt2", offline=True)["weights"][0]).write_bytes(b"damaged")
        check_files(client.one("gpt2", verify_cached=True), model())
        assert len(server.log("GET", "safetensors")) == 2  # one of them is redirected

    def test_present_name_wins(self, server: HubServer, client: Client, former: Path) -> None:
        download_by_huggingface_hub(client, self.REPO)
        for result in client.run({"model": "gpt2"}, {"model": "gpt2", "offline": True}):
            assert not any(former in Path(path).parents for path in paths_of(result))

    def test_weights_win_over_a_config(
        self, server: HubServer, client: Client, former: Path
    ) -> None:
        """Another tool has only the tokenizer of a later commit, under the present name."""
        old = commit_of(self.REPO, "main")
        server.repos[self.REPO] = {"main": model(1), old: model()}
        with hub_settings(client.url, client.home):
            hf_hub_download(self.REPO, "config.json", revision="main")
        offline = client.one("gpt2", offline=True)
        check_files(offline, model())
        assert former in Path(offline["config"]).parents

    def test_config_and_tokenizer_without_weights(self, client: Client, former: Path) -> None:
        (weights,) = former.glob("snapshots/*/model.safetensors")
        weights.unlink()
        found = client.one("gpt2", offline=True, weights=False)
        assert former in Path(found["config"]).parents
        assert set(found["tokenizer"]) == {"tokenizer.json"}

    def test_cache_of_the_commit_is_chosen(
        self, server: HubServer, client: Client, former: Path
    ) -> None:
        """The branch moved to a commit that is cached, without a ref, under the present name."""
        old, new = commit_of(self.REPO, "main"), "b" * 40
        server.repos[self.REPO] = {"main": new, old: model(), new: model(1)}
        client.one("gpt2", revision=new)
        server.requests.clear()
        check_files(client.one("gpt2"), model(1))
        assert server.log("GET") == []

    def test_another_model_of_that_name(self, server: HubServer, client: Client) -> None:
        download_by_huggingface_hub(client, "org/model")
        (client.cache / "models--org--model").rename(client.cache / "models--model")
        check(client.one("org/model", offline=True), NotFoundError, "org/model")


class TestWithoutRef:
    """Snapshots without `refs`: a copied cache, or a download of a commit."""

    def test_one_commit(self, server: HubServer, client: Client) -> None:
        client.one("org/model")
        shutil.rmtree(client.cache / "models--org--model" / "refs")
        (client.cache / "models--org--model" / "snapshots" / ".DS_Store").touch()
        commit = commit_of("org/model", "main")
        server.stop()
        offline, broken, pinned = client.run(
            {"model": "org/model", "offline": True},
            {"model": "org/model"},
            {"model": "org/model", "offline": True, "revision": commit},
            impatient=True,
        )
        hint = f"the cache has commit {commit}: give revision='{commit}'"
        check(offline, NotFoundError, "org/model@main", hint)
        check(broken, HubUnavailableError, "org/model@main", hint)
        check_files(pinned, model())

    def test_incomplete_commits_are_not_named(self, server: HubServer, client: Client) -> None:
        server.repos["org/model"]["v2"] = model(2)
        server.repos["org/model"]["v3"] = model(3)
        client.run(
            {"model": "org/model", "weights": False},
            {"model": "org/model", "revision": "v2"},
            {"model": "org/model", "revision": "v3"},
        )
        commits = sorted(commit_of("org/model", name) for name in ("v2", "v3"))
        result = client.one("org/model", offline=True)
        hint = f"commit {commits[0]} and {commits[1]}: give revision='{commits[0]}'"
        check(result, NotFoundError, "model.safetensors", hint)
        other = client.one("org/model", offline=True, revision="v9")
        check(other, NotFoundError, "config.json", hint)


def test_damaged_ref(server: HubServer, client: Client) -> None:
    client.one("org/model")
    ref, commit = client.cache / "models--org--model/refs/main", commit_of("org/model", "main")
    for content in (b"\xff\xfe", b"", b"../../x", commit.encode() + b"\n"):
        ref.write_bytes(content)
        offline = client.one("org/model", offline=True)
        check(offline, NotFoundError, "is not in the cache", f"give revision='{commit}'")
        check_files(client.one("org/model"), model())
        assert ref.read_text() == commit


def test_incomplete_shards_are_no_other_commit(server: HubServer, client: Client) -> None:
    files = model()
    files["a.safetensors"] = files.pop("model.safetensors")
    server.repos["org/model"] = {
        "main": files | {"model.safetensors.index.json": index("a.safetensors")}
    }
    Path(client.one("org/model")["weights"][0]).unlink()
    result = client.one("org/model", offline=True)
    check(result, NotFoundError, "a.safetensors of org/model@main is not in the cache")
    assert "the cache has commit" not in result["message"]


def test_ref_moves_only_to_a_commit_with_its_weights(server: HubServer, client: Client) -> None:
    old, new = "a" * 40, "b" * 40
    repo = server.repos["org/model"] = {"main": old, old: model(1), new: model(2)}
    ref = client.cache / "models--org--model" / "refs" / "main"
    assert client.one("org/model", weights=False)["revision"] == ref.read_text() == old
    client.one("org/model")
    repo["main"] = new
    assert client.one("org/model", weights=False)["revision"] == new
    assert ref.read_text() == old
    check_files(client.one("org/model", offline=True), model(1))
    client.one("org/model")
    assert ref.read_text() == new


@pytest.mark.parametrize("part", ["", "snapshots", "snapshots/*", "refs/main"])
def test_cache_without_permission(server: HubServer, part: str) -> None:
    with folder_of_another_user() as home:
        client = Client(server, home)
        with unprivileged():
            client.one("org/model")
            (found,) = client.cache.glob(f"models--org--model/{part}".rstrip("/"))
            found.chmod(0)
            try:
                result = client.one("org/model", offline=True)
                check(result, StorageError, str(client.cache), "Permission denied", "HF_HOME")
            finally:
                found.chmod(0o700)


def refuse(*_: object) -> None:
    raise OSError("not supported")
