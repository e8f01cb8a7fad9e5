"""`gptx download`, and errors of models that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptx.conversions import convert
from gptx.generation.found_model import find_model
from gptx.generation.text_model import Model
from tests.support.cli import error_lines, run, start
from tests.support.hub import hub_settings
from tests.support.hub_server import HubServer

COMMANDS = [("download",), ("info",), ("generate", "O", "-m")]


def test_download_prints_the_folder_of_the_embedded_model(shakespeare: Model) -> None:
    assert run("download", "shakespeare").out == f"{shakespeare.files.folder}\n"


def test_a_file_on_this_machine_needs_no_download(tmp_path: Path) -> None:
    convert("shakespeare", tmp_path / "model.gguf")
    done = run("download", str(tmp_path / "model.gguf"))
    assert (done.code, done.out, done.err) == (0, f"{tmp_path / 'model.gguf'}\n", "")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert run("download", str(tmp_path / "other.gguf")).code == 65


def test_another_model_is_refused_before_its_weights(tmp_path: Path) -> None:
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(100)}
    with HubServer({"org/llama": {"main": files}}) as server, hub_settings(server.url, tmp_path):
        done = run("download", "org/llama")
        assert not server.log(part="model.safetensors")
    assert (done.code, done.out) == (65, "")
    assert "model_type is 'llama'" in done.err


def test_only_download_verifies_cached_files(tmp_path: Path) -> None:
    files = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": bytes(100)}
    with HubServer({"org/model": {"main": files}}) as server, hub_settings(server.url, tmp_path):
        config = find_model("org/model").info.files.config
        assert not server.log(part="model.safetensors")
        assert run("download", "org/model").out == f"{config.parent}\n"
        config.write_bytes(b'{"model_type": "gpt2", "n_layer": 5}')
        assert find_model("org/model").info.config.n_layer == 5
        assert run("download", "org/model").code == 0
        assert config.read_bytes() == files["config.json"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_does_not_exist(command: tuple[str, ...]) -> None:
    done = run(*command, "./no-such-folder")
    assert (done.code, done.out) == (66, "")
    assert "'./no-such-folder' does not exist" in done.err


def test_a_model_that_is_not_in_the_cache(tmp_path: Path) -> None:
    with start(
        "download",
        "no-owner/no-model",
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="1",
        HF_HUB_CACHE=str(tmp_path),
    ) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (66, b"")
    [line] = error_lines(err)
    assert b"gptx download no-owner/no-model" in line


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_offline(command: tuple[str, ...]) -> None:
    done = run(*command, "no-owner/no-model", "--offline")
    assert (done.code, done.out) == (66, "")
    assert done.err.count("\n") == 1
    assert "gptx download no-owner/no-model" in done.err
