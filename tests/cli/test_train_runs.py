"""`gptx train`: runs of tiny models, from a text to a model that generates."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.training.data.windows import TokenData
from gptx.training.reports import plot
from gptx.training.reports.log_file import read_log
from tests.support.cli import Done, run

TEXT = "To be, or not to be: that is the question.\n" * 40
MODEL = ("-l", "1", "--n-head", "2", "-d", "8", "-c", "8", "--batch-size", "2", "-t", "1")
STEPS = ("--steps", "6", "--eval-every", "3", "--warmup", "2", "--sample-every", "0")


@pytest.fixture(autouse=True)
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot takes longer than a run of these."""
    monkeypatch.setattr(plot, "is_available", lambda: False)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "model")


def train(*args: str) -> Done:
    """Train a model that saves; nothing is written to standard output."""
    done = run("train", *MODEL, *STEPS, *args)
    assert done.out == ""
    return done


def losses(out: str) -> list[float]:
    return [record["loss"] for record in read_log(f"{out}/log.jsonl") if "loss" in record]


def assert_fails(done: Done, code: int, *parts: str) -> None:
    """Expect one line of error, after lines of progress."""
    assert (done.code, done.out) == (code, "")
    *_, line = done.err.splitlines()
    assert line.startswith("Error: ")
    assert "Traceback" not in done.err
    for part in parts:
        assert part in line


def test_from_a_text_to_a_model_that_generates(
    text: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plot, "is_available", lambda: True)
    done = train(text, "-o", out, "--log-every", "2", "--prompt", "To be", "--sample-every", "6")
    assert done.code == 0
    assert "step 0: validation loss" in done.err
    assert [line[:8] for line in done.err.splitlines() if "tokens/s" in line] == [
        "step 2/6",
        "step 4/6",
        "step 6/6",
    ]
    assert "--- sample after 6 steps\nTo be" in done.err
    *_, summary, command = done.err.splitlines()
    assert re.fullmatch(r"6 steps in \d+:\d\d, best validation loss \d\.\d{4} at step 6", summary)
    assert command == f"{out}: gptx generate -m {out} --temperature 0.8"
    files = {path.name for path in Path(out).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "last", "log.jsonl"} <= files
    assert Path(out, "loss.png").read_bytes().startswith(b"\x89PNG")
    records = read_log(f"{out}/log.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert losses(out)[0] == pytest.approx(np.log(len(set(TEXT))), abs=0.1)
    generated = run("generate", "-m", out, "-q", "--temperature", "1", "-s", "1", "To be")
    assert (generated.code, generated.err) == (0, "")
    assert len(generated.out) >= 100  # beyond the context of 8
    assert set(generated.out) <= set(TEXT)


def test_quiet(text: str, out: str) -> None:
    assert train(text, "-o", out, "-q") == (0, "", "")


def test_a_run_that_saves_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = train("--text-corpus", text, "--no-save")
    assert done.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_the_default_folder_is_model(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train("--text-corpus", text, "-q").code == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_folder_with_a_run_is_not_replaced(text: str, out: str) -> None:
    assert train(text, "-o", out, "-q").code == 0
    before = Path(out, "model.safetensors").read_bytes()
    assert_fails(
        train(text, "-o", out, "-s", "1"), 2, "has a run already", "--resume", "--overwrite"
    )
    assert Path(out, "model.safetensors").read_bytes() == before
    assert train(text, "-o", out, "-s", "1", "--overwrite", "-q").code == 0
    assert Path(out, "model.safetensors").read_bytes() != before


def test_another_folder_is_refused(text: str, out: str) -> None:
    Path(out).mkdir()
    Path(out, "thesis.tex").write_text("the only copy")
    for more in ((), ("--overwrite",)):
        assert_fails(train(text, "-o", out, *more), 2, "thesis.tex")
    assert [path.name for path in Path(out).iterdir()] == ["thesis.tex"]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that presses Ctrl-C during a step, which is counted from 0."""

    def at(number: int) -> None:
        batch = TokenData.batch

        def interrupted(self: TokenData, step: int) -> Any:
            if step == number:
                monkeypatch.setattr(TokenData, "batch", batch)
                raise KeyboardInterrupt
            return batch(self, step)

        monkeypatch.setattr(TokenData, "batch", interrupted)

    return at


def test_ctrl_c_saves_and_says_how_to_continue(
    text: str, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    """The continued run is the same as one that was not interrupted, bit for bit."""
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "a broken one")
    assert train(text, "-o", whole, "-q").code == 0
    interrupt(4)
    done = train(text, "-o", broken)
    assert done.code == 130
    assert done.err.endswith(
        f"Note: step 4 is in {broken}/last: continue with gptx train --resume '{broken}'\n"
        "\nInterrupted\n"
    )
    assert losses(broken) == losses(whole)[:4]
    resumed = run("train", "--resume", broken, "-q")
    assert resumed == (0, "", "")
    assert losses(broken) == losses(whole)
    for name in ("model.safetensors", "last/model.safetensors", "last/optimizer.safetensors"):
        assert Path(broken, name).read_bytes() == Path(whole, name).read_bytes()


def test_ctrl_c_in_a_run_that_saves_nothing(text: str, interrupt: Callable[[int], None]) -> None:
    interrupt(2)
    done = train(text, "-x")
    assert done.code == 130
    assert "--resume" not in done.err


def test_a_resume_with_other_settings(
    text: str, out: str, interrupt: Callable[[int], None]
) -> None:
    interrupt(4)
    assert train(text, "-o", out, "-q").code == 130
    before = Path(out, "last", "optimizer.safetensors").read_bytes()
    done = run("train", "--resume", out, "-r", "0.5", "-q")
    assert_fails(done, 2, "-r/--learning-rate", "0.5")
    assert_fails(run("train", "--resume", out, "-c", "7"), 2, "-c/--context")
    assert Path(out, "last", "optimizer.safetensors").read_bytes() == before
    assert run("train", "--resume", out, "--patience", "9", "-q").code == 0


def test_a_resume_of_nothing(out: str) -> None:
    assert_fails(run("train", "--resume", out), 66, out)


def test_early_stopping(text: str, out: str) -> None:
    done = train(text, "-o", out, "-r", "1e-30", "--eval-every", "1", "--patience", "2")
    assert done.code == 0
    assert "(stopped early: no better one since)" in done.err


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"", 65, "empty"),
        (b"\x7fELF\x00\x01\x02\xff\xfe" * 100, 65, "UTF-8"),
        (b"short", 65, "context"),
    ],
    ids=["empty", "binary", "short"],
)
def test_a_bad_text(text: str, out: str, content: bytes, code: int, message: str) -> None:
    Path(text).write_bytes(content)
    assert_fails(train(text, "-o", out), code, message)
    assert not Path(out, "last").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("-r", "nan"), 2, "-r/--learning-rate is nan"),
        (("--steps", "0"), 2, "--steps is 0"),
        (("--dropout", "1"), 2, "--dropout is 1.0"),
        (("--validation", "1.5"), 2, "--validation"),
        (("-c", "0"), 2, "-c/--context"),
        (("--n-head", "3"), 2, "n_head 3"),
        (("--trainable", "h.9.*"), 2, "--trainable has 'h.9.*'"),
        (("--init", "shakespeare", "-c", "300"), 2, "-c/--context is 300"),
        (("--init", "shakespeare", "--size", "124M"), 2, "--size"),
        (("--init", "./nowhere"), 66, "nowhere"),
        (("--tokenizer", "./nowhere"), 66, "nowhere"),
        (("-t", "0"), 2, "-t/--threads is 0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_bad_settings(text: str, out: str, args: tuple[str, ...], code: int, message: str) -> None:
    done = run("train", text, "-o", out, "-q", "--steps", "2", *MODEL[-2:], *args)
    assert_fails(done, code, message)
    assert not Path(out, "model.safetensors").exists()


def test_a_missing_text(out: str) -> None:
    assert_fails(train("nowhere.txt", "-o", out), 66, "nowhere.txt")


def test_ids_beyond_the_vocabulary(tmp_path: Path, out: str) -> None:
    """Token files of another tokenizer than that of the model."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        np.full(100, 50000, "<u2").tofile(folder / name)
    done = run("train", str(folder), "--init", "shakespeare", "-c", "8", "-o", out, "-q")
    assert_fails(done, 65, "50000")


def test_a_full_disk_keeps_the_last_checkpoint(
    text: str, out: str, interrupt: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(4)
    assert train(text, "-o", out, "-q").code == 130
    names = ("last/training.json", "last/model.safetensors", "model.safetensors")
    before = {name: Path(out, name).read_bytes() for name in names}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert_fails(run("train", "--resume", out, "-q"), 74, "No space left on device")
    assert {name: Path(out, name).read_bytes() for name in names} == before
    assert run("train", "--resume", out, "-q").code == 0


def test_from_a_model(text: str, tmp_path: Path, out: str) -> None:
    """Fine-tuning keeps the tokenizer of the model."""
    first = str(tmp_path / "first")
    assert train(text, "-o", first, "-q").code == 0
    done = run("train", text, "--init", first, "--steps", "2", "-o", out, "-q", "-t", "1")
    assert (done.code, done.err) == (0, "")
    assert Path(out, "tokenizer.json").read_bytes() == Path(first, "tokenizer.json").read_bytes()
    assert losses(out)[0] < losses(first)[0]


def test_examples_of_json_lines(tmp_path: Path, out: str) -> None:
    lines = [json.dumps({"prompt": "To be", "completion": f" or not {i}"}) for i in range(40)]
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(lines))
    done = run("train", str(path), "--tokenizer", "shakespeare", *MODEL, *STEPS, "-o", out, "-q")
    assert (done.code, done.err) == (0, "")
    assert Path(out, "model.safetensors").is_file()


def test_a_folder_of_token_files(text: str, tmp_path: Path, out: str) -> None:
    """The folder of a run holds the token files that it prepared of its text."""
    first = str(tmp_path / "first")
    assert train(text, "-o", first, "-q").code == 0
    shutil.copytree(Path(first, "data"), tmp_path / "tokens")
    assert train(str(tmp_path / "tokens"), "-o", out, "-q").code == 0
    assert losses(out) == losses(first)
    assert run("generate", "-m", out, "-q", "To be").code == 0
