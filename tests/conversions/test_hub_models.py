"""gptx.conversions of models from a Hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from gptx import conversions
from gptx.conversions import read
from gptx.embedded import EMBEDDED
from gptx.errors import GptxError
from gptx.random_weights import random_weights
from tests.support.hub import hub_settings
from tests.support.hub_server import HubServer
from tests.support.random_models import CASES

Convert = Callable[..., dict[str, Any]]
COMPANIONS = {
    "tokenizer_config.json": b'{"pad_token": "<|endoftext|>"}',
    "generation_config.json": b'{"eos_token_id": [0, 1]}',
    "chat_template.jinja": b"{{ 1 }}",
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(folder: Callable[..., Path]) -> Iterator[HubServer]:
    """Serve models under a plain id, under an alias, in shards, and one without safetensors."""
    tokenizer = {"tokenizer.json": (EMBEDDED["shakespeare"] / "tokenizer.json").read_bytes()}
    single = files_of(folder("124M", "single")) | tokenizer
    names = {"config.json", "tokenizer.json"}
    repositories: dict[str, Any] = {
        "org/single": {"main": single},
        "openai-community/gpt2": {"main": files_of(folder("355M", "alias", prefix="transformer."))},
        "org/shards": {"main": files_of(folder("774M", "shards", shards=3))},
        "org/chat": {"main": single | COMPANIONS},
        "org/none": {"main": {name: single[name] for name in names}},
    }
    with HubServer(repositories) as hub:
        yield hub


@pytest.fixture
def convert(server: HubServer, tmp_path: Path) -> Convert:
    """Convert to the folder "out"; return the message and the exit code of an error."""

    def run(source: str, **options: Any) -> dict[str, Any]:
        with hub_settings(server.url, tmp_path / "home"), mock.patch("time.sleep"):
            try:
                conversions.convert(source, tmp_path / "out", **options)
            except GptxError as error:
                return {"message": str(error), "exit": error.exit_code}
        return {}

    return run


def check(out: Path, case: str) -> None:
    """Check that a converted model is the random model of that name, bit by bit."""
    _, found = read(out)
    assert found.config == CASES[case]
    for name, expected in random_weights(CASES[case]).items():
        np.testing.assert_array_equal(found.tensors[name], expected, name)


@pytest.mark.parametrize(
    ("source", "case"),
    [("org/single", "124M"), ("gpt2", "355M"), ("124M", "355M"), ("org/shards", "774M")],
)
def test_hub_id_alias_and_shards_to_a_folder(
    convert: Convert, tmp_path: Path, source: str, case: str
) -> None:
    assert convert(source) == {}
    check(tmp_path / "out", case)


def test_shards_to_one_file(convert: Convert, tmp_path: Path) -> None:
    assert convert("org/shards", to="safetensors") == {}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_tokenizer_is_converted_too(convert: Convert, tmp_path: Path) -> None:
    assert convert("org/single", to="mlx") == {}
    format, found = read(tmp_path / "out")
    assert format == "mlx"
    assert found.tokenizer is not None
    text = "To be, or not to be"
    assert found.tokenizer.decode(found.tokenizer.encode(text)) == text


def test_revision(convert: Convert, server: HubServer, tmp_path: Path) -> None:
    old = server.repos["org/single"]["main"]
    server.repos["org/single"] = {"v1": old, "main": server.repos["org/shards"]["main"]}
    assert convert("org/single", revision="v1") == {}
    check(tmp_path / "out", "124M")
    assert convert("org/single", overwrite=True) == {}
    check(tmp_path / "out", "774M")


def test_offline_conversion_of_a_cached_model(
    convert: Convert, server: HubServer, tmp_path: Path
) -> None:
    assert convert("org/shards", offline=True)["exit"] == 66
    assert convert("org/shards") == {}
    requests = server.log()
    assert convert("org/shards", offline=True, overwrite=True) == {}
    check(tmp_path / "out", "774M")
    assert server.log() == requests


@pytest.mark.parametrize(
    ("source", "exit", "word"),
    [
        ("org/absent", 66, "org/absent"),
        ("org/none", 66, "no pytorch_model.bin"),
        ("org/truncated", 65, "another hash or size"),
        ("org/damaged", 65, "safetensors"),
    ],
)
def test_failed_conversion_leaves_no_folder(
    convert: Convert, server: HubServer, tmp_path: Path, source: str, exit: int, word: str
) -> None:
    single = server.repos["org/single"]["main"]
    assert isinstance(single, dict)
    damaged = single["model.safetensors"][:-1]
    server.repos["org/truncated"] = {"main": single}
    server.repos["org/damaged"] = {"main": single | {"model.safetensors": damaged}}
    server.faults.shorter.add("org/truncated/model.safetensors")
    result = convert(source)
    assert (result["exit"], word in result["message"]) == (exit, True), result
    assert not (tmp_path / "out").exists()


def test_files_beside_the_model_are_carried_over(convert: Convert, tmp_path: Path) -> None:
    assert convert("org/chat") == {}
    written = files_of(tmp_path / "out")
    for name in ("generation_config.json", "chat_template.jinja"):
        assert written[name] == COMPANIONS[name]
    assert json.loads(written["tokenizer_config.json"])["pad_token"] == "<|endoftext|>"
