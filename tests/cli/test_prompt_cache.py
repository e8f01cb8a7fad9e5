"""`gptx generate --prompt-cache FILE`: read if it exists, written at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gptx.files import atomic_write
from gptx.generation.text_model import Model
from tests.support.cli import GENERATE, posix, run
from tests.support.models import make_model
from tests.support.random_models import CASES


def generate(*args: str) -> dict[str, Any]:
    done = run(*GENERATE, "--json", "-n", "8", *args)
    assert done.code == 0, done.err
    data: dict[str, Any] = json.loads(done.out)
    return data


def test_a_cache_is_written_and_the_next_prompt_uses_it(shakespeare: Model, tmp_path: Path) -> None:
    path = tmp_path / "prompt.cache"
    first = generate("--prompt-cache", str(path), "ROMEO:")
    assert first["cached_tokens"] == 0
    ids = shakespeare.encode("ROMEO:") + first["tokens"]
    assert shakespeare.load_cache(path).tokens == [ids[:-1]]
    longer = f"ROMEO:{first['text']} and so"
    second = generate("--prompt-cache", str(path), longer)
    assert second["cached_tokens"] == len(ids) - 1
    assert second["tokens"] == generate(longer)["tokens"]
    assert shakespeare.load_cache(path).tokens == [
        (shakespeare.encode(longer) + second["tokens"])[:-1]
    ]


def test_the_statistics_have_the_cached_tokens(tmp_path: Path) -> None:
    args = ("-n", "2", "--prompt-cache", str(tmp_path / "cache"), "ROMEO:")
    assert run(*GENERATE, *args).err.startswith("[prompt: 2 tokens, ")
    assert run(*GENERATE, *args).err.startswith("[prompt: 2 tokens (1 cached), ")


def test_another_prompt_replaces_the_cache(shakespeare: Model, tmp_path: Path) -> None:
    path = str(tmp_path / "cache")
    generate("--prompt-cache", path, "ROMEO:")
    other = generate("--prompt-cache", path, "A king")
    assert other["cached_tokens"] == 0
    assert other["tokens"] == generate("A king")["tokens"]
    tokens = shakespeare.load_cache(path).tokens
    assert tokens is not None
    assert tokens[0][:2] == shakespeare.encode("A king")


def test_a_truncated_prompt_counts_the_tokens_that_it_shares(tmp_path: Path) -> None:
    args = ("--overflow", "truncate", "--prompt-cache", str(tmp_path / "cache"), "ROMEO: " * 300)
    assert generate(*args)["cached_tokens"] == 0
    again = generate(*args)
    assert again["cached_tokens"] == again["prompt_tokens"] - 1


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("another model", 65, "belongs to another model"),
        (b"no cache", 65, "is not a KV cache, or is damaged: expected a file that"),
    ],
)
def test_a_file_that_is_no_cache_of_this_model_is_refused_and_kept(
    tmp_path: Path, content: str | bytes, code: int, message: str, shakespeare: Model
) -> None:
    path = tmp_path / "cache"
    if isinstance(content, bytes):
        atomic_write(path, content)
    else:
        make_model(CASES["tiny"], shakespeare.backend).prefill([1, 2, 3]).save(path)
    before = path.read_bytes()
    done = run(*GENERATE, "--prompt-cache", str(path), "ROMEO:")
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert path.read_bytes() == before


@posix
def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, fault in (
        (tmp_path / "fifo", "is a FIFO, expected a regular file"),
        (tmp_path / "none" / "cache", "cannot be written (its folder does not exist)"),
        (tmp_path, "is a folder, expected the name of a file"),
    ):
        done = run("generate", "-m", "./nowhere", "--prompt-cache", str(path), "O")
        assert (done.code, done.out) == (74, "")
        assert fault in done.err
    assert (tmp_path / "fifo").is_fifo()
