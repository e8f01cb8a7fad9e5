"""meta.pkl: written for nanoGPT, and read as data."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from gptx.errors import DataError, StorageError
from gptx.training.data.nanogpt_meta import read_meta, write_meta
from tests.support.cli import raises_error


class Touch:
    """An object whose pickle creates a file when Python loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def meta_of(text: str) -> dict[str, Any]:
    """The dict that nanoGPT's prepare.py pickles."""
    characters = sorted(set(text))
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: id for id, character in enumerate(characters)},
    }


def test_nanogpt_reads_what_gptx_writes(tmp_path: Path) -> None:
    meta = meta_of("hello\n𝄞")
    write_meta(tmp_path / "meta.pkl", meta["stoi"])
    assert pickle.loads((tmp_path / "meta.pkl").read_bytes()) == meta


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_gptx_reads_what_nanogpt_writes(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(meta_of("hello\n𝄞"), protocol))
    assert read_meta(path) == sorted("helo\n𝄞")


def test_the_characters_of_a_large_alphabet(tmp_path: Path) -> None:
    characters = [chr(0x4E00 + i) for i in range(20_000)]
    write_meta(tmp_path / "meta.pkl", {c: id for id, c in enumerate(characters)})
    assert read_meta(tmp_path / "meta.pkl") == characters


@pytest.mark.parametrize(
    "value",
    [[], {}, {"stoi": {"a": 1}, "vocab_size": 1}, {"stoi": {"a": 0}, "vocab_size": 2},
     {"stoi": {"a": True}, "vocab_size": 1}, {"stoi": ["a"], "vocab_size": 1}],
    ids=range(6),
)  # fmt: skip
def test_another_pickle(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(value, 4))
    with raises_error(DataError, f'{path} has no "stoi"'):
        read_meta(path)


def test_no_code_of_the_file_runs(tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"stoi": Touch(tmp_path / "touched")}, 4))
    with raises_error(DataError, str(path)):
        read_meta(path)
    assert not (tmp_path / "touched").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "touched").exists()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with raises_error(StorageError, "cannot be read"):
        read_meta(tmp_path)
