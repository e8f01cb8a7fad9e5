"""Texts of the Hub: fetched once, verified, found offline."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptx.errors import (
    GptxError,
    HubUnavailableError,
    IntegrityError,
    ParameterError,
)
from gptx.hub.errors import NoSuchFileError
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.training.data import datasets
from gptx.training.data.datasets import DATASETS, fetch
from gptx.training.data.prepare import prepare
from tests.support.cli import raises_error
from tests.support.embedded_tokenizer import FILES, FOLDER, load_tokenizer
from tests.support.hub import CONFIG, hub_settings
from tests.support.hub_server import HubServer

TEXT = "First Citizen:\nSpeak, speak.\n\nAll:\nSpeak.\n"
STORIES = f"Once upon a time.\n\nThe end.\n{END_OF_TEXT}\nA cat.\n"


def llm_c_bytes(ids: list[int]) -> bytes:
    header = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253)
    return header + struct.pack(f"<{len(ids)}H", *ids)


def shakespeare_files() -> dict[str, bytes]:
    """Token files as those of llm.c: sections that begin with the end-of-text token."""
    tokenizer = load_tokenizer()
    ids = []
    for section in ("First Citizen:\nSpeak, speak.\n\n", "All:\nSpeak.\n"):
        ids += [tokenizer.end_of_text_id or 0, *tokenizer.encode(section)]
    names = DATASETS["tinyshakespeare"].train
    return {names[0]: llm_c_bytes(ids[:7]), names[1]: llm_c_bytes(ids[7:])}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with both datasets, and with a model of another tokenizer in the place of gpt2."""
    tokenizer = {name: (FOLDER / name).read_bytes() for name in FILES}
    stories = DATASETS["tinystories"]
    names = [*stories.train, *stories.validation]
    known = replace(DATASETS["tinyshakespeare"], sha256=hashlib.sha256(TEXT.encode()).hexdigest())
    monkeypatch.setitem(DATASETS, "tinyshakespeare", known)
    repos: dict[str, Any] = {
        "datasets/karpathy/llmc-starter-pack": {"main": shakespeare_files()},
        "datasets/roneneldan/TinyStories": {
            "main": {name: f"{STORIES}{i}\n".encode() for i, name in enumerate(names)}
        },
        "openai-community/gpt2": {"main": {"config.json": CONFIG} | tokenizer},
    }
    with HubServer(repos) as hub:
        yield hub


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> Iterator[AbstractContextManager[None]]:
    with hub_settings(server.url, tmp_path / "home") as settings:
        yield settings  # type: ignore[misc]


@pytest.mark.usefixtures("hub")
def test_tiny_shakespeare(server: HubServer) -> None:
    """The text of the token files, and no request after that."""
    found = fetch("tinyshakespeare")
    assert [path.read_bytes() for path in found.train] == [TEXT.encode()]
    assert found.validation == []
    server.stop()
    assert fetch("tinyshakespeare") == fetch("tinyshakespeare", offline=True) == found


@pytest.mark.usefixtures("hub")
def test_tiny_stories(server: HubServer, tmp_path: Path) -> None:
    found = fetch("tinystories")
    assert [path.read_text() for path in found.train] == [f"{STORIES}0\n"]
    assert [path.read_text() for path in found.validation] == [f"{STORIES}1\n"]
    cached = tmp_path / "home" / "hub" / "datasets--roneneldan--TinyStories"
    assert all(cached in path.parents for path in found.train)
    server.stop()
    assert fetch("tinystories", offline=True) == found


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("format", ["nanogpt", "llmc"])
def test_prepare_stories(format: str, tmp_path: Path) -> None:
    """Their own validation text; and their end-of-text tokens, no others."""
    done = prepare((), tmp_path / "out", dataset="tinystories", tokenizer=FOLDER, format=format)
    tokenizer = load_tokenizer()
    expected = [tokenizer.encode(f"{STORIES}{i}\n", allow_special=True) for i in range(2)]
    assert [done.train_tokens, done.validation_tokens] == [len(ids) for ids in expected]
    assert expected[0].count(tokenizer.end_of_text_id or 0) == 1


@pytest.mark.usefixtures("hub")
def test_prepare_shakespeare(tmp_path: Path) -> None:
    done = prepare((), tmp_path / "out", dataset="tinyshakespeare")
    assert done.train_tokens + done.validation_tokens == len(TEXT)
    split = prepare(
        (), tmp_path / "out2", dataset="tinystories", validation_fraction=0.5, end_of_text="none"
    )
    assert abs(split.train_tokens - split.validation_tokens) <= len(END_OF_TEXT)


@pytest.mark.usefixtures("hub")
def test_content_that_is_not_the_announced_one(server: HubServer, tmp_path: Path) -> None:
    name = DATASETS["tinyshakespeare"].train[1]
    server.faults.corrupt = {name}
    with raises_error(IntegrityError, f"{name} of karpathy/llmc-starter-pack@main arrived with"):
        fetch("tinyshakespeare")
    assert not list(tmp_path.rglob("tinyshakespeare.txt"))
    server.faults.corrupt = set()
    assert fetch("tinyshakespeare").train


@pytest.mark.usefixtures("hub")
def test_another_text_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's own file has changed: a verified download of a wrong text."""
    other = replace(DATASETS["tinyshakespeare"], sha256="0" * 64)
    monkeypatch.setitem(DATASETS, "tinyshakespeare", other)
    with raises_error(IntegrityError, "has another text than that of tinyshakespeare"):
        fetch("tinyshakespeare")
    assert not list(tmp_path.rglob("tinyshakespeare.txt"))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("fault", "kind", "part"),
    [
        ("offline", NoSuchFileError, "gptx is offline: try again with a connection"),
        ("missing", NoSuchFileError, "get the text elsewhere, and give its file"),
        ("stopped", HubUnavailableError, "or use a cached dataset with offline=True"),
    ],
    ids=["offline", "missing", "stopped"],
)
def test_a_dataset_that_cannot_be_fetched(
    fault: str,
    kind: type[GptxError],
    part: str,
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    files = server.repos["datasets/roneneldan/TinyStories"]["main"]
    assert isinstance(files, dict)
    if fault == "missing":
        files.pop(DATASETS["tinystories"].validation[0])
    if fault == "stopped":
        server.stop()
    with raises_error(kind, part):
        fetch("tinystories", offline=fault == "offline")


def test_an_unknown_dataset() -> None:
    with raises_error(ParameterError, "dataset is 'x', expected tinyshakespeare or tinystories"):
        fetch("x")


def test_the_hash_of_tiny_shakespeare() -> None:
    from tests.support.shared_files import shared

    text = shared("data/tinyshakespeare.txt").read_bytes()
    assert hashlib.sha256(text).hexdigest() == datasets.DATASETS["tinyshakespeare"].sha256


@pytest.mark.hub
def test_the_names_on_the_hub() -> None:
    """The real repositories; of TinyStories, the small file only."""
    from gptx.hub.cache import DATASET
    from gptx.hub.repository import Repository

    assert fetch("tinyshakespeare").train[0].stat().st_size == 1_115_394
    stories = DATASETS["tinystories"]
    name = stories.validation[0]
    source = Repository(
        stories.repository, "main", False, None, False, kind=DATASET, first_file=name
    )
    assert END_OF_TEXT in source.need(name).read_text("utf-8")[:10_000]
    source._request_metadata(stories.train[0])
