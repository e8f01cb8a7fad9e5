"""Text to token files: the counts of nanoGPT and llm.c, memory, files, and bad input."""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import gptx.training.data.token_files
from gptx.errors import (
    DataError,
    ModelWarning,
    NotFoundError,
    ParameterError,
    StorageError,
    TokenizerError,
)
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.training.data import texts
from gptx.training.data.opening import open_data
from gptx.training.data.prepare import Prepared, prepare
from gptx.training.data.token_files import TokenFiles
from tests.support.byte_tokenizers import byte_tokenizer
from tests.support.cli import posix, raises_error
from tests.support.embedded_tokenizer import FOLDER, load_tokenizer
from tests.support.shared_files import shared

TEXT = "First Citizen:\nSpeak, speak.\n\n\nAll:\nWe know't, we know't.\n\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    return tmp_path / "text.txt"


def ids_of(folder: Path, name: str) -> list[int]:
    files = TokenFiles.open(sorted(folder.glob(f"{name}*.bin")))
    return files.read(0, files.n_tokens).tolist()


def counts(prepared: Prepared) -> tuple[int, int]:
    return prepared.train_tokens, prepared.validation_tokens


def shakespeare(folder: Path, **options: Any) -> tuple[int, int]:
    path = shared("data/tinyshakespeare.txt")
    return counts(prepare(path, folder, tokenizer=shared("tokenizer/gpt2"), **options))


@pytest.mark.soak
def test_the_tokens_of_nanogpt(tmp_path: Path) -> None:
    assert shakespeare(tmp_path / "out") == (301_966, 36_059)


@pytest.mark.soak
@pytest.mark.parametrize("format", ["llmc", "staticgrad"])
def test_the_tokens_of_llm_c_and_staticgrad(format: str, tmp_path: Path) -> None:
    """The validation tokens are the first ones, which staticgrad's file lacks."""
    assert shakespeare(tmp_path / "out", format=format) == (305_260, 32_768)


def test_the_characters_of_nanogpt(tmp_path: Path) -> None:
    done = prepare(shared("data/tinyshakespeare.txt"), tmp_path / "out")
    assert counts(done) == (1_003_854, 111_540)
    text = shared("data/tinyshakespeare.txt").read_text("utf-8")
    meta = pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes())
    assert meta["vocab_size"] == 65
    assert meta["stoi"] == {c: id for id, c in enumerate(sorted(set(text)))}
    held_out = "".join(meta["itos"][id] for id in ids_of(tmp_path / "out", "val"))
    assert held_out == text[-111_540:]


def test_sections_as_in_llm_c(text: Path, tmp_path: Path) -> None:
    """The end-of-text token is before each section, and "\\n\\n" stays in it."""
    tokenizer = load_tokenizer()
    expected: list[int] = []
    for section in TEXT.split("\n\n"):
        last = section == TEXT.split("\n\n")[-1]
        expected.append(tokenizer.end_of_text_id or 0)
        expected += tokenizer.encode(section if last else f"{section}\n\n")
    options: dict[str, Any] = {"tokenizer": FOLDER, "validation_tokens": 5, "shard_tokens": 9}
    prepare(text, tmp_path / "a", format="llmc", **options)
    prepare(text, tmp_path / "b", format="staticgrad", **options)
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert ids_of(folder, "val") == expected[:5]
        assert ids_of(folder, "train") == expected[5:]
    a, b = ((tmp_path / folder / "train_000000.bin").read_bytes() for folder in "ab")
    assert a[1024:] == b
    assert not (tmp_path / "a" / "meta.pkl").exists()


@pytest.mark.parametrize("places", ["none", "files", "sections"])
def test_places_of_the_end_of_text(places: str, text: Path, tmp_path: Path) -> None:
    done = prepare([text, text], tmp_path / "out", end_of_text=places, validation_fraction=0)
    tokens = done.tokenizer.decode(ids_of(tmp_path / "out", "train")).split(END_OF_TEXT)
    file = {"none": [TEXT], "files": ["", TEXT], "sections": ["", *_sections(TEXT)]}[places]
    assert tokens == ([TEXT * 2] if places == "none" else [*file, *file[1:]])


def _sections(text: str) -> list[str]:
    *sections, last = text.split("\n\n")
    return [f"{section}\n\n" for section in sections] + [last]


def test_special_tokens_in_the_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"ab{END_OF_TEXT}ba")
    plain = prepare(tmp_path / "a", tmp_path / "plain", validation_fraction=0)
    special = prepare(
        tmp_path / "a", tmp_path / "special", validation_fraction=0, allow_special=True
    )
    assert (plain.train_tokens, special.train_tokens) == (17, 5)


@pytest.mark.parametrize("chunk_bytes", [1, 5])
@pytest.mark.parametrize("kind", ["characters", "vowels", "bpe", "folder"])
def test_ids_do_not_depend_on_the_chunks(
    kind: str, chunk_bytes: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"tokenizer": FOLDER if kind == "folder" else kind}
    if kind == "bpe":
        options = {"train_bpe": 270}
    whole = prepare(text, tmp_path / "whole", **options)
    monkeypatch.setattr(texts, "CHUNK_BYTES", chunk_bytes)
    prepare(text, tmp_path / "chunks", **options)
    for name in ("train", "val"):
        ids = ids_of(tmp_path / "whole", name)
        assert ids_of(tmp_path / "chunks", name) == ids
        part = TEXT[: int(len(TEXT) * 0.9)] if name == "train" else TEXT[int(len(TEXT) * 0.9) :]
        assert ids == list(whole.tokenizer.encode(part))
        assert whole.tokenizer.decode(ids) == part


@pytest.mark.parametrize("kind", ["characters", "vowels", "bpe"])
def test_the_tokenizer_is_saved(kind: str, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train_bpe": 270} if kind == "bpe" else {"tokenizer": kind}
    done = prepare(text, tmp_path / "out", **options)
    data = open_data(tmp_path / "out", context=4, batch_size=1)
    assert data.tokenizer is not None
    assert data.tokenizer.encode(TEXT) == list(done.tokenizer.encode(TEXT))
    assert (tmp_path / "out" / "meta.pkl").exists() == (kind == "characters")


def test_sizes_of_vocabularies(text: Path, tmp_path: Path) -> None:
    pieces = prepare(text, tmp_path / "a", tokenizer="vowels", vocab_size=33)
    assert pieces.tokenizer.vocab_size == 33
    assert prepare(text, tmp_path / "b", train_bpe=260).tokenizer.vocab_size == 260


def test_a_text_for_validation(text: Path, tmp_path: Path) -> None:
    """Its characters are in the vocabulary too, and the other text is not split."""
    (tmp_path / "other").write_text("öä")
    prepare(text, tmp_path / "out", validation=tmp_path / "other")
    assert len(ids_of(tmp_path / "out", "train")) == len(TEXT)
    assert len(ids_of(tmp_path / "out", "val")) == 2


def test_the_first_bytes_only(text: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("äöü")
    options: dict[str, Any] = {"validation_fraction": 0}
    for n, expected in ((3, "ä"), (6, "äöü"), (9, f"äöü{TEXT[:3]}"), (10**6, f"äöü{TEXT}")):
        done = prepare([tmp_path / "a", text], tmp_path / str(n), max_bytes=n, **options)
        assert done.tokenizer.decode(ids_of(tmp_path / str(n), "train")) == expected


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert sum(counts(prepare("-", tmp_path / "out"))) == len(TEXT)


@posix
def test_a_pipe(tmp_path: Path) -> None:
    """Process substitution of a shell: it can be read once only."""
    reader, writer = os.pipe()
    os.write(writer, TEXT.encode())
    os.close(writer)
    try:
        assert sum(counts(prepare(f"/dev/fd/{reader}", tmp_path / "out"))) == len(TEXT)
    finally:
        os.close(reader)


class Words:
    """A tokenizer of a caller, with the three members of the protocol."""

    vocab_size = 3

    def encode(self, text: str, /) -> list[int]:
        return [len(word) % 3 for word in text.split()]

    def decode(self, ids: Sequence[int], /) -> str:
        return " ".join(map(str, ids))


def test_a_tokenizer_of_the_caller(text: Path, tmp_path: Path) -> None:
    prepare(text, tmp_path / "out", tokenizer=Words(), validation_fraction=0)
    assert ids_of(tmp_path / "out", "train") == Words().encode(TEXT)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.bin"]
    with raises_error(ParameterError, "allow_special is True"):
        prepare(text, tmp_path / "out2", tokenizer=Words(), allow_special=True)


def test_a_note_for_a_tokenizer_without_safe_places(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a bc " * 60_000)
    with pytest.warns(ModelWarning, match="some ids can differ"):
        prepare(tmp_path / "a", tmp_path / "out", tokenizer=Words())


def test_progress(text: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    prepare(text, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert {name for name, _, _ in calls} == {"check", "encode"}
    assert calls[-1] == ("encode", 2 * len(TEXT), 2 * len(TEXT))
    assert calls[0] == ("check", len(TEXT), len(TEXT))


# Memory grows while a corpus is prepared: nanoGPT #90 #176.
@pytest.mark.soak
@pytest.mark.parametrize("options", ["tokenizer='characters'", "train_bpe=300"])
def test_memory_does_not_grow_with_the_text(options: str, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    code = (
        "import re, sys; from gptx.training.data.prepare import prepare;"
        f"prepare(sys.argv[1], sys.argv[1] + '.out', {options});"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    peaks = []
    for n_bytes in (10**6, 10**7):
        path = tmp_path / str(n_bytes)
        path.write_bytes((TEXT.encode() * (n_bytes // len(TEXT) + 1))[:n_bytes])
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 6 * 10**6


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# A wrong file is overwritten or trained: llm.c #77, nanoGPT #161.
def test_a_folder_that_exists(text: Path, tmp_path: Path) -> None:
    prepare(text, tmp_path / "out", shard_tokens=20)
    with raises_error(ParameterError, "out already exists", "overwrite=True"):
        prepare(text, tmp_path / "out")
    prepare(text, tmp_path / "out", overwrite=True)
    assert "train.bin" in contents(tmp_path / "out")
    assert "train_000000.bin" not in contents(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    old = contents(tmp_path / "out")
    with raises_error(ParameterError, "has 'notes.txt', which is no file of prepared data"):
        prepare(text, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == old
    with raises_error(ParameterError, "text.txt is a file"):
        prepare(text, text)
    with raises_error(StorageError, "missing does not exist"):
        prepare(text, tmp_path / "missing" / "out")


@pytest.mark.parametrize("at", range(3))
def test_a_full_disk_leaves_the_old_files(
    at: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(text, tmp_path / "out")
    old = contents(tmp_path / "out")
    calls = iter(range(9))
    write = gptx.training.data.token_files.TokenWriter.write

    def fail(*args: Any) -> None:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*args)

    monkeypatch.setattr(gptx.training.data.token_files.TokenWriter, "write", fail)
    with raises_error(StorageError, "out cannot be written (No space left on device)"):
        prepare(text, tmp_path / "out", overwrite=True, tokenizer=FOLDER)
    assert contents(tmp_path / "out") == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


@pytest.mark.kill
@pytest.mark.parametrize("at", range(4))
def test_a_killed_process_leaves_the_old_files(at: int, text: Path, tmp_path: Path) -> None:
    """The fourth write is that of the tokenizer, after all token files."""
    prepare(text, tmp_path / "out")
    old = contents(tmp_path / "out")
    code = f"""
import os, sys
from gptx.training.data import prepare, token_files
left = [{at}]
def killed(function):
    def call(*args):
        if left[0] == 0:
            os._exit(9)
        left[0] -= 1
        return function(*args)
    return call
token_files.TokenWriter.write = killed(token_files.TokenWriter.write)
prepare._write_tokenizer = killed(prepare._write_tokenizer)
prepare.prepare({str(text)!r}, {str(tmp_path / "out")!r}, train_bpe=260, overwrite=True)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert contents(tmp_path / "out") == old
    prepare(text, tmp_path / "out", train_bpe=260, overwrite=True)
    assert contents(tmp_path / "out") != old


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"format": "x"}, "format is 'x', expected nanogpt or llmc or staticgrad"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0, expected at least 0"),
        ({"validation_fraction": float("nan")}, "validation_fraction is nan"),
        ({"validation_tokens": 0}, "validation_tokens is 0"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"end_of_text": "x"}, "end_of_text is 'x', expected none, files, sections"),
        (
            {"validation": "x", "validation_fraction": 0.1},
            "validation and validation_fraction exclude each other",
        ),
        ({"vocab_size": 9}, "vocab_size is for tokenizer='vowels' only"),
        ({"train_bpe": 256}, "train_bpe is 256, expected a number of tokens of at least 257"),
        ({"train_bpe": 300, "tokenizer": "gpt2"}, "train_bpe makes a tokenizer"),
        ({"tokenizer": "vowels", "vocab_size": 3}, "vocab_size is 3, expected at least"),
        ({"dataset": "tinyshakespeare"}, "dataset and texts exclude each other"),
        ({"tokenizer": byte_tokenizer(), "format": "llmc"}, "give end_of_text='none'"),
    ],
    ids=range(14),
)
def test_bad_parameters(options: dict[str, Any], part: str, text: Path, tmp_path: Path) -> None:
    with raises_error(ParameterError, part):
        prepare(text, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bad_texts(text: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("a")
    (tmp_path / "other").write_text("ö")
    (tmp_path / "x.jsonl").touch()
    folder = tmp_path / "out"
    characters = prepare(text, tmp_path / "characters").tokenizer
    with raises_error(DataError, "the text has 1 tokens, too few", "another validation_fraction"):
        prepare(tmp_path / "short", folder)
    with raises_error(DataError, "or another validation_tokens"):
        prepare(tmp_path / "short", folder, format="llmc")
    with raises_error(DataError, "the text has 'ö', which is not among the 24 tokens"):
        prepare(tmp_path / "other", folder, tokenizer=characters)
    with raises_error(ParameterError, "x.jsonl has examples, expected a text"):
        prepare(tmp_path / "x.jsonl", folder)
    with raises_error(ParameterError, "is a folder, expected text files"):
        prepare(tmp_path, folder)
    with raises_error(ParameterError, "texts is empty"):
        prepare([], folder)
    with raises_error(NotFoundError, "missing does not exist"):
        prepare(tmp_path / "missing", folder)
    assert not folder.exists()


# Ids of 16 bits: a larger vocabulary does not fit into any of the forms.
def test_a_vocabulary_that_is_too_large(text: Path, tmp_path: Path) -> None:
    with (
        mock.patch.object(PipelineTokenizer, "vocab_size", 65_537),
        raises_error(TokenizerError, "has 65537 tokens, and token files have ids of 16 bits"),
    ):
        prepare(text, tmp_path / "out", tokenizer=FOLDER)
    tokenizer = byte_tokenizer({END_OF_TEXT: 2**16})  # an id after a gap
    with raises_error(TokenizerError, "the token id 65536"):
        prepare(text, tmp_path / "out", tokenizer=tokenizer, end_of_text="files")
    assert not (tmp_path / "out").exists()


@pytest.mark.soak
def test_every_token_of_16_bits(tmp_path: Path) -> None:
    """The largest vocabulary."""
    characters = [chr(code) for code in range(1, 2**16 + 1 + 2**11) if not 0xD800 <= code < 0xE000]
    (tmp_path / "a").write_bytes("".join(characters).encode())
    prepare(tmp_path / "a", tmp_path / "out", validation_fraction=0)
    assert ids_of(tmp_path / "out", "train") == np.arange(2**16).tolist()
