"""log.jsonl: records, continuation of a run, damaged logs, a full disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptx.errors import DataError, StorageError
from gptx.training.callbacks import EvaluationRecord, StepRecord
from gptx.training.reports.log_file import LogFile, read_log
from tests.support.cli import raises_error


def step(number: int, loss: float = 2.0) -> StepRecord:
    return StepRecord(number, loss, 1.0, 1e-3, 48, 0.01)


def trainer(output: Path | None, step: int = 0) -> SimpleNamespace:
    return SimpleNamespace(output=output, state=SimpleNamespace(step=step))


def write(folder: Path, first: int, last: int, *, loss: float = 2.0) -> None:
    """Log the steps from `first` to `last`, of a run that begins or continues there."""
    log = LogFile()
    log.on_start(trainer(folder, first - 1))
    for number in range(first, last + 1):
        log.on_step(step(number, loss))
    log.on_evaluation(EvaluationRecord(last, 1.5, True, 0.1))
    log.on_end(trainer(folder))


def test_a_line_for_each_step_and_evaluation(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_log(tmp_path / "log.jsonl")
    assert json.loads(lines[0])["learning_rate"] == 1e-3
    assert json.loads(lines[2]) == {
        "step": 2,
        "validation_loss": 1.5,
        "is_best": True,
        "seconds": 0.1,
    }


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    write(tmp_path, 1, 1, loss=math.nan)
    assert read_log(tmp_path / "log.jsonl")[0]["loss"] is None


def test_a_continued_run_removes_the_steps_that_it_computes_again(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    write(tmp_path, 4, 6, loss=3.0)
    records = read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6, 6]
    assert [r.get("loss") for r in records] == [2.0, 2.0, 2.0, 3.0, 3.0, 3.0, None]


def test_a_new_run_begins_a_new_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("the log of a run that is replaced\n")
    write(tmp_path, 1, 1)
    assert len(read_log(tmp_path / "log.jsonl")) == 2


def test_an_incomplete_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [r["step"] for r in read_log(path)] == [1]
    write(tmp_path, 2, 2)
    assert [r["step"] for r in read_log(path)] == [1, 2, 2]


@pytest.mark.parametrize("line", ["nonsense", "[1]", "{}", '{"step": "1"}', "\N{SNOWMAN}", "3"])
def test_a_line_that_is_no_record(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n', encoding="utf-8")
    with raises_error(DataError, "no record in line 2", str(path)):
        read_log(path)


def test_a_run_that_saves_nothing_has_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = LogFile()
    log.on_start(trainer(None))
    log.on_step(step(1))
    log.on_end(trainer(None))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    log = LogFile()
    log.on_start(trainer(tmp_path))
    log.on_end(trainer(tmp_path))
    log._file = open("/dev/full", "ab")  # noqa: SIM115
    with raises_error(StorageError, "/dev/full cannot be written (No space left on device)"):
        log.on_step(step(1))
    log.on_end(trainer(tmp_path))


def test_a_log_that_cannot_be_read(tmp_path: Path) -> None:
    with raises_error(StorageError, "cannot be read (Is a directory)"):
        read_log(tmp_path)
