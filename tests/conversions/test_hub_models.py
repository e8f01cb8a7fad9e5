"""gptx.conversions of models that come from the Hub, here one on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.conversions import read
from gptx.embedded import EMBEDDED
from gptx.random_weights import random_weights
from tests.support.hub_server import HubServer
from tests.support.random_models import CASES

# huggingface_hub reads its environment when it is imported: other processes make the conversions.
CLIENT = """
import json, sys
from gptx.conversions import convert
from gptx.errors import GptxError
source, destination, options = json.loads(sys.argv[1])
try:
    convert(source, destination, **options)
    print(json.dumps({}))
except GptxError as error:
    print(json.dumps(dict(message=str(error), exit=error.exit_code)))
"""

Convert = Callable[..., dict[str, Any]]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(folder: Callable[..., Path]) -> Iterator[HubServer]:
    """Models under a plain id, under an alias, in shards, and one without safetensors."""
    tokenizer = {"tokenizer.json": (EMBEDDED["shakespeare"] / "tokenizer.json").read_bytes()}
    whole = files_of(folder("124M", "whole")) | tokenizer
    names = {"config.json", "tokenizer.json"}
    repositories: dict[str, Any] = {
        "org/whole": {"main": whole},
        "openai-community/gpt2": {"main": files_of(folder("355M", "alias", prefix="transformer."))},
        "org/shards": {"main": files_of(folder("774M", "shards", shards=3))},
        "org/none": {"main": {name: whole[name] for name in names} | {"pytorch_model.bin": b"x"}},
    }
    with HubServer(repositories) as hub:
        yield hub


@pytest.fixture
def convert(server: HubServer, tmp_path: Path) -> Convert:
    def run(source: str, **options: Any) -> dict[str, Any]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        kept |= {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        job = json.dumps([source, str(tmp_path / "out"), options])
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, job], env=kept, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    return run


def check(out: Path, case: str) -> None:
    """What was written is the random model of that name, bit by bit."""
    _, found = read(out)
    assert found.config == CASES[case]
    for name, expected in random_weights(CASES[case]).items():
        np.testing.assert_array_equal(found.tensors[name], expected, name)


@pytest.mark.parametrize(
    ("source", "case"),
    [("org/whole", "124M"), ("gpt2", "355M"), ("124M", "355M"), ("org/shards", "774M")],
)
def test_a_hub_id_an_alias_or_shards_become_a_folder(
    convert: Convert, tmp_path: Path, source: str, case: str
) -> None:
    assert convert(source) == {}
    check(tmp_path / "out", case)


def test_shards_become_one_file(convert: Convert, tmp_path: Path) -> None:
    assert convert("org/shards", to="safetensors") == {}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_the_tokenizer_comes_along(convert: Convert, tmp_path: Path) -> None:
    assert convert("org/whole", to="mlx") == {}
    format, found = read(tmp_path / "out")
    assert format == "mlx"
    assert found.tokenizer is not None
    text = "To be, or not to be"
    assert found.tokenizer.decode(found.tokenizer.encode(text)) == text


def test_a_revision_is_what_it_was(convert: Convert, server: HubServer, tmp_path: Path) -> None:
    old = server.repos["org/whole"]["main"]
    server.repos["org/whole"] = {"v1": old, "main": server.repos["org/shards"]["main"]}
    assert convert("org/whole", revision="v1") == {}
    check(tmp_path / "out", "124M")
    assert convert("org/whole", overwrite=True) == {}
    check(tmp_path / "out", "774M")


def test_offline_what_is_cached_is_enough(
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
        ("org/none", 66, "pytorch_model.bin"),
        ("org/cut", 65, "another hash or size"),
        ("org/damaged", 65, "safetensors"),
    ],
)
def test_what_cannot_be_had_leaves_nothing(
    convert: Convert, server: HubServer, tmp_path: Path, source: str, exit: int, word: str
) -> None:
    whole = server.repos["org/whole"]["main"]
    assert isinstance(whole, dict)
    damaged = whole["model.safetensors"][:-1]
    server.repos["org/cut"] = {"main": whole}
    server.repos["org/damaged"] = {"main": whole | {"model.safetensors": damaged}}
    server.faults.shorter.add("org/cut/model.safetensors")
    result = convert(source)
    assert (result["exit"], word in result["message"]) == (exit, True), result
    assert not (tmp_path / "out").exists()
