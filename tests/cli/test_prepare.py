"""`gptx prepare`: files, messages and exit codes."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from gptx.cli import prepare as command
from gptx.training.data.datasets import DATASETS
from gptx.training.data.plan import FORMATS, PLACES
from tests.support.cli import run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_bytes(b"Speak, speak.\n" * 10)
    return tmp_path / "text.txt"


def test_the_summary_is_on_standard_error(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = f"{out}: 126 tokens for training, 14 for validation, vocabulary 10\n"
    assert run("prepare", str(text), "-o", str(out)) == (0, "", line)
    assert {path.name for path in out.iterdir()} >= {"train.bin", "val.bin", "meta.pkl"}


def test_options(text: Path, tmp_path: Path) -> None:
    done = run(
        *("prepare", str(text), str(text), "-o", str(tmp_path / "out"), "--format", "llmc"),
        *("--end-of-text", "files", "--validation-tokens", "9", "--shard-tokens", "100"),
        *("--max-bytes", "150"),
    )
    assert done.code == 0
    assert "143 tokens for training, 9 for validation, vocabulary 11" in done.err
    names = sorted(path.name for path in (tmp_path / "out").glob("*.bin"))
    assert names == ["train_000000.bin", "train_000001.bin", "val_000000.bin"]


def test_standard_input(tmp_path: Path) -> None:
    done = run("prepare", "-", "-o", str(tmp_path / "out"), stdin=b"hello world")
    assert (done.code, done.out) == (0, "")
    assert (tmp_path / "out" / "val.bin").stat().st_size == 4


@pytest.mark.parametrize(
    ("content", "args", "code", "part"),
    [
        (None, (), 66, "missing.txt does not exist"),
        (b"", (), 65, "the text is empty"),
        (b"abc\0", (), 65, "byte 0 at position 3"),
        (b"ab\xff", (), 65, "byte 0xff at position 2"),
        (b"a", (), 65, "too few for training and validation: give a longer text, or another "
         "--validation-fraction"),
        (b"abc", ("--validation-fraction", "nan"), 2, "--validation-fraction is nan"),
        (b"abc", ("--train-bpe", "5"), 2, "--train-bpe is 5"),
        (b"abc", ("--vocab-size", "5"), 2, "--vocab-size is for --tokenizer vowels only"),
        (b"abc", ("--tokenizer", "missing/"), 66, "--tokenizer"),
        (b"abc", ("--dataset", "tinystories"), 2, "--dataset and TEXT... exclude each other"),
        (b"abc", ("--format", "x"), 2, "'x' is not one of 'nanogpt', 'llmc', 'staticgrad'"),
        (b"abc", ("--end-of-text", "files", "--tokenizer", "NONE"), 66, "NONE"),
    ],
    ids=range(12),
)  # fmt: skip
def test_errors_are_one_line(
    content: bytes | None, args: tuple[str, ...], code: int, part: str, tmp_path: Path
) -> None:
    path = tmp_path / ("missing.txt" if content is None else "text.txt")
    if content is not None:
        path.write_bytes(content)
    extra = ("--offline",) if "--tokenizer" in args else ()
    done = run("prepare", str(path), "-o", str(tmp_path / "out"), *args, *extra)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("Error: ")
    assert done.err.count("\n") == 1
    assert part in done.err
    assert not (tmp_path / "out").exists()


def test_missing_arguments(text: Path) -> None:
    assert "missing TEXT: give a text file, or --dataset NAME" in run("prepare", "-o", "x").err
    assert "Missing option '-o' / '--output'" in run("prepare", str(text)).err


def test_a_folder_that_exists(text: Path, tmp_path: Path) -> None:
    args = ("prepare", str(text), "-o", str(tmp_path / "out"))
    assert run(*args).code == 0
    done = run(*args)
    assert done.code == 2
    assert done.err.endswith("out already exists: give another name, or --overwrite\n")
    assert run(*args, "--overwrite").code == 0


def test_names_of_the_options_are_those_of_the_library() -> None:
    """The command does not import the library for its help."""
    assert command.FORMATS == FORMATS
    assert command.PLACES == PLACES
    assert set(command.DATASETS) == set(DATASETS)
    assert isinstance(command.prepare, click.Command)
