"""gptx.hub.cache: the layout that other Hugging Face tools read and write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir

from tests.support.hub import Client, check_files, hub_settings, model
from tests.support.hub_server import HubServer

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


def refuse(*_: object) -> None:
    raise OSError("not supported")
