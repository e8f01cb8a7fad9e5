"""gptx.load, generate and stream with models of the Hub: the order of checks and files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.errors import (
    BackendError,
    GptxError,
    NotFoundError,
    ParameterError,
    PromptError,
    TokenizerError,
)
from gptx.random_weights import random_weights
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.cli import raises_error, run
from tests.support.embedded_tokenizer import CONFIG, copy_tokenizer
from tests.support.files.tensor_bundle_bytes import write_openai
from tests.support.files.torch_files import state_dict, zip_bytes
from tests.support.hub import hub_settings
from tests.support.hub_server import Files, HubServer, commit_of
from tests.support.random_models import write_model

WEIGHTS = random_weights(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_model(tmp_path_factory.mktemp("model") / "folder", CONFIG, WEIGHTS)
    return copy_tokenizer(path, "tokenizer.json")


@pytest.fixture(scope="module")
def files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(files: Files, tmp_path: Path) -> Iterator[HubServer]:
    """Serve the model as gpt2, without its tokenizer as org/ids, and as pytorch_model.bin."""
    ids = {name: content for name, content in files.items() if name != "tokenizer.json"}
    old = {name: content for name, content in files.items() if name != "model.safetensors"}
    old["pytorch_model.bin"] = zip_bytes(state_dict(WEIGHTS))
    repositories: Any = {"openai-community/gpt2": files, "org/ids": ids, "org/old": old}
    with (
        HubServer({name: {"main": content} for name, content in repositories.items()}) as hub,
        hub_settings(hub.url, tmp_path / "home"),
    ):
        yield hub


# Arguments of the command, its standard input, exit code, a part of the message.
NEEDS_NO_MODEL = [
    (("",), b"", 65, "the prompt is empty"),
    (("-",), b"", 65, "the prompt is empty"),
    (("-",), b"\xef\xbb\xbf\n", 65, "the prompt is empty"),
    (("-",), b"caf\xe9", 65, "byte 0xe9"),
    ((), b"", 2, "missing prompt"),
    (("x", "--temperature", "-1"), b"", 2, "temperature"),
    (("x", "--stop", ""), b"", 2, "stop"),
    (("x", "-n", "0"), b"", 2, " is 0, expected"),
    (("x", "--quantize", "int3"), b"", 2, "quantize"),
    (("x", "--quantize", "int8", "--group-size", "48"), b"", 2, "48"),
    (("x", "--dtype", "float8"), b"", 2, "float8"),
    (("x", "--dtype", "bfloat16"), b"", 2, "bfloat16"),
    (("x", "--backend", "abacus"), b"", 2, "abacus"),
    (("x", "--config", "/nowhere/config.json"), b"", 66, "/nowhere/config.json"),
]
NEEDS_CONFIG = [
    (("x", "-n", "2000"), b"", 65, "exceed the context of 64"),
    (("x " * 200,), b"", 65, "the context holds 64"),
    (("-",), b"x " * 200, 65, "the context holds 64"),
    (("x", "--logit-bias", "5000=1"), b"", 2, "5000"),
    (("x", "--quantize", "int8", "--group-size", "128"), b"", 2, "give 32 or 64"),
    (("x", "-m", "org/ids"), b"", 65, "has no tokenizer"),
]


@pytest.mark.parametrize(("args", "stdin", "code", "message"), [*NEEDS_NO_MODEL, *NEEDS_CONFIG])
def test_a_wrong_command_downloads_no_weights(
    server: HubServer, args: tuple[str, ...], stdin: bytes, code: int, message: str
) -> None:
    done = run("generate", "-m", "gpt2", *args, stdin=stdin)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert server.log(part=".safetensors") == []
    assert bool(server.log()) == ((args, stdin, code, message) in NEEDS_CONFIG)


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "message"),
    [
        ("", {}, PromptError, "the prompt is empty"),
        (["x", ""], {}, PromptError, "the prompt is empty"),
        ([], {}, PromptError, "missing prompt"),
        ([1024], {}, PromptError, "expected 0 to 1023"),
        ([[1], []], {}, PromptError, "give at least one token"),
        (["x", "x " * 200], {"max_tokens": 1}, PromptError, "the context holds 64"),
        ([1], {"max_tokens": 65}, PromptError, "exceed the context of 64"),
        ([1], {"logit_bias": {1024: 1.0}}, ParameterError, "1024"),
        ([1], {"model": "org/ids", "stop": "x"}, TokenizerError, "has no tokenizer"),
        ([1], {"quantize": "int4", "group_size": 128}, ParameterError, "give 32 or 64"),
        ([1], {"dtype": "float16"}, BackendError, "float16"),
    ],
)
def test_a_wrong_request_downloads_no_weights(
    server: HubServer, prompt: Any, options: Any, kind: type[GptxError], message: str
) -> None:
    options = {"model": "gpt2", **options}
    with raises_error(kind, message):
        gptx.generate(prompt, **options)
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        with raises_error(kind, message):
            gptx.stream(prompt, **options)
    assert server.log(part=".safetensors") == []


def test_the_weights_come_after_the_config_and_the_tokenizer(
    server: HubServer, folder: Path
) -> None:
    result = gptx.generate("ROMEO:", model="gpt2", max_tokens=5, compile=False)
    expected = gptx.load(folder, compile=False).generate("ROMEO:", max_tokens=5)
    assert result.tokens == expected.tokens
    names = [line.rpartition("/")[2] for line in server.log("GET")]
    assert names == ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors"]
    assert len(server.log("HEAD", "main/config.json")) == 1  # all files are of that commit
    requests = server.log()
    assert gptx.generate("x", model="gpt2", max_tokens=1, offline=True).tokens
    assert server.log() == requests


def test_a_repository_with_pytorch_model_bin_only(server: HubServer, folder: Path) -> None:
    model = gptx.load("org/old", compile=False)
    expected = gptx.load(folder, compile=False)
    np.testing.assert_array_equal(model.logits([1, 2]), expected.logits([1, 2]))
    assert model.fingerprint == expected.fingerprint
    assert model.encode("ROMEO:") == expected.encode("ROMEO:")
    assert [path.name for path in model.files.weights] == ["pytorch_model.bin"]
    assert model.files.revision
    assert gptx.load("org/old", offline=True, quantize="int8").config.quantization
    about = json.loads(run("info", "org/old", "--json").out)
    assert (about["stored"], about["parameters"]) == (None, CONFIG.n_parameters)


def test_info_without_a_connection(server: HubServer) -> None:
    online = run("info", "gpt2", "--json")
    assert (online.code, server.log(part=".safetensors")) == (0, [])
    server.stop()
    assert run("info", "gpt2", "--json", "--offline").out == online.out
    with pytest.raises(NotFoundError, match=r"model\.safetensors of .* is not in the cache"):
        gptx.load("gpt2", offline=True)


def test_a_tokenizer_of_the_hub_without_its_weights(server: HubServer, folder: Path) -> None:
    model = gptx.load("org/ids", tokenizer="gpt2", compile=False)
    assert model.encode("ROMEO:") == gptx.load(folder, compile=False).encode("ROMEO:")
    assert [line for line in server.log("GET", "gpt2") if "tokenizer.json" in line]
    assert not [line for line in server.log(part="gpt2") if ".safetensors" in line]


def test_a_model_without_weights(server: HubServer, files: Files) -> None:
    small = {name: files[name] for name in ("config.json", "tokenizer.json")}
    server.repos["org/none"] = {"main": small}
    with raises_error(NotFoundError, "org/none", "no model.safetensors and no pytorch_model.bin"):
        gptx.load("org/none")


def test_a_request_that_is_refused_keeps_the_commit_of_the_cache(
    server: HubServer, files: Files
) -> None:
    """Offline, a branch leads to a commit of which the cache has all files."""
    gptx.load("gpt2", compile=False)
    old = server.repos["openai-community/gpt2"].pop("main")
    changed = {**files, "model.safetensors": files["model.safetensors"][::-1]}
    server.repos["openai-community/gpt2"] |= {"v1": old, "v2": changed}
    server.repos["openai-community/gpt2"]["main"] = commit_of("openai-community/gpt2", "v2")
    with pytest.raises(PromptError):
        gptx.generate("x " * 200, model="gpt2")
    assert gptx.load("gpt2", offline=True, compile=False).generate([1], max_tokens=1).tokens


@pytest.fixture
def openai(folder: Path, tmp_path: Path) -> Iterator[HubServer]:
    """Serve the model as openai:124M."""
    path = write_openai(tmp_path / "124M", CONFIG, WEIGHTS, PipelineTokenizer.of_folder(folder))
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    with (
        HubServer({"models": {"124M": files}}) as hub,
        hub_settings(hub.url, tmp_path / "home", GPTX_OPENAI_URL=f"{hub.url}/models/resolve"),
    ):
        yield hub


class TestOpenAI:
    """OpenAI's own files by their size."""

    def test_the_tensors_come_last(self, openai: HubServer, folder: Path) -> None:
        with raises_error(PromptError, "the context holds 64"):
            gptx.generate("x " * 200, model="openai:124M", max_tokens=1)
        assert openai.log("GET", "encoder.json")
        assert not openai.log("GET", ".data-")
        result = gptx.generate("ROMEO:", model="openai:124M", max_tokens=5, compile=False)
        expected = gptx.load(folder, compile=False).generate("ROMEO:", max_tokens=5)
        assert result.tokens == expected.tokens
        assert len(openai.log("GET", ".data-")) == 1
        openai.stop()
        model = gptx.load("openai:124M", offline=True, compile=False)
        assert (model.name, model.fingerprint) == ("openai:124M", gptx.load(folder).fingerprint)
        assert gptx.load(model.files.folder, compile=False).fingerprint == model.fingerprint

    def test_info_and_download(self, openai: HubServer) -> None:
        assert f"{CONFIG.n_parameters:,} parameters" in run("info", "openai:124M").out
        assert not openai.log("GET", ".data-")
        done = run("download", "openai:124M")
        assert (done.code, done.err) == (0, "")
        assert (Path(done.out.strip()) / "model.ckpt.index").is_file()

    def test_given_config_and_tokenizer(self, openai: HubServer) -> None:
        config = replace(CONFIG, layer_norm_epsilon=0.1)
        model = gptx.load("openai:124M", config=config, tokenizer="shakespeare", compile=False)
        assert model.config == config
        assert model.encode("ROMEO:")

    def test_errors(self, openai: HubServer) -> None:
        with raises_error(NotFoundError, "'openai:125M' does not exist", "openai:124M"):
            gptx.load("openai:125M")
        with raises_error(ParameterError, "revision is 'v1'"):
            gptx.load("openai:124M", revision="v1")
        with raises_error(NotFoundError, "offline", "gptx download openai:124M"):
            gptx.load("openai:124M", offline=True)
