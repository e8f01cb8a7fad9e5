"""The log of a run: one JSON object a line, for each step and each evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from gptx.errors import DataError, StorageError
from gptx.files import atomic_write
from gptx.training.callbacks import Callback, EvaluationRecord, StepRecord

NAME = "log.jsonl"


class LogFile(Callback):
    """Append the record of each step and each evaluation to `log.jsonl` in the folder of the run.

    A run that continues another one removes the records of steps after its checkpoint: it computes
    these steps again. The run that saves nothing has no log.

    Raises
    ------
    StorageError
        The file cannot be read or written.
    DataError
        The log of the run that is continued has a line that is no record.
    """

    def __init__(self) -> None:
        self._file: BinaryIO | None = None

    def on_start(self, trainer: Any) -> None:
        if trainer.output is None:
            return
        path = trainer.output / NAME
        step = trainer.state.step
        if path.exists():
            kept = [record for record in read_log(path) if record["step"] <= step] if step else []
            atomic_write(path, b"".join(map(_line, kept)))
        with _storage_errors("written", path):
            self._file = open(path, "ab")  # noqa: SIM115

    def on_step(self, record: StepRecord) -> None:
        self._write(asdict(record))

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._write(asdict(record))

    def on_end(self, trainer: Any) -> None:
        if self._file is not None:
            with suppress(OSError):  # all was flushed, or that error ends the run
                self._file.close()
            self._file = None

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            with _storage_errors("written", self._file.name):
                self._file.write(_line(record))
                self._file.flush()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a log; an incomplete last line, which a crash leaves, is dropped.

    Raises
    ------
    StorageError
        The file cannot be read.
    DataError
        A line is not a record: a JSON object with a whole number as its `step`.
    """
    with _storage_errors("read", path):
        *lines, _ = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise TypeError
        except (ValueError, LookupError, TypeError):
            raise DataError(
                f"{path} has no record in line {number}, expected an object with a step: "
                "remove the line or the file"
            ) from None
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> bytes:
    """Return a line of JSON. NaN and infinities, which JSON does not have, are null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


@contextmanager
def _storage_errors(verb: str, path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be {verb} ({error.strerror or error})") from error
