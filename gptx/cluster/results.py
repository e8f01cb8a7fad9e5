"""The output of a batch: a line for each finished item, in the order in which they finish.

A line is appended by one write. A killed run leaves at most one incomplete line, the last one,
which the next run removes; so each other line is a result, and its item is not computed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gptx.cluster.items import ID_PREFIX, Item
from gptx.errors import DataError, StorageError
from gptx.file_lock import try_lock
from gptx.files import check_replaceable
from gptx.server.errors import ApiError

START = f'{{"id": "{ID_PREFIX}'.encode()  # of each line


class ResultFile:
    """The output file of a batch, locked and open for appending.

    Attributes
    ----------
    done
        Ids of the items that have a result.
    n_failed
        Number of results that are errors.
    fingerprints
        Fingerprints of the models that the results come from.

    Raises
    ------
    DataError
        The file is no output of a batch, or another run writes to it.
    StorageError
        The file cannot be read or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.done: set[str] = set()
        self.n_failed = 0
        self.fingerprints: set[str] = set()
        check_replaceable(self.path)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise self._error("written", error) from error
        try:
            self._begin()
        except OSError as error:
            self.close()
            raise self._error("read", error) from error
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        if not try_lock(self._file):
            raise DataError(f"{self.path} is the output of a run that has not ended: wait for it")
        n_bytes = 0  # of the complete lines
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self._check_incomplete(line, number)
                    break
                self._add(line, number)
                n_bytes += len(line)
        os.ftruncate(self._file, n_bytes)

    def _add(self, line: bytes, number: int) -> None:
        """Count a complete line of the file."""
        try:
            result = json.loads(line)
            id, failed = result["id"], result["error"] is not None
            body = (result["response"] or {}).get("body", {})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise self._foreign(number) from None
        if not line.startswith(START) or not isinstance(id, str):
            raise self._foreign(number)
        if id in self.done:
            raise DataError(f"{self.path} has a duplicate result in line {number}: remove the line")
        self.done.add(id)
        self.n_failed += failed
        if fingerprint := body.get("system_fingerprint"):
            self.fingerprints.add(fingerprint)

    def _check_incomplete(self, line: bytes, number: int) -> None:
        """Raise DataError if a last line without an end is no start of a result."""
        if not (line.startswith(START) or START.startswith(line)):
            raise self._foreign(number)

    def _foreign(self, number: int) -> DataError:
        return DataError(
            f"{self.path} has no result of a batch in line {number}: give the name of a new file"
        )

    def _error(self, verb: str, error: OSError) -> StorageError:
        return StorageError(f"{self.path} cannot be {verb} ({error.strerror or error})")

    def append(
        self,
        item: Item,
        response: Mapping[str, Any] | None,
        error: ApiError | None,
    ) -> None:
        """Append the result of an item.

        Raises
        ------
        StorageError
            The file cannot be written; the item has no result.
        """
        result = {
            "id": item.id,
            "custom_id": item.custom_id,
            "line": item.line,
            "response": response,
            "error": error
            and {
                "code": error.code or error.type,
                "message": error.message,
                "param": error.param,
                "line": item.line,
            },
        }
        text = json.dumps(result, ensure_ascii=False, allow_nan=False)
        # Half of a surrogate pair, which UTF-8 lacks, becomes an escape of JSON.
        self._write(text.encode("utf-8", "backslashreplace") + b"\n")
        self.done.add(item.id)
        self.n_failed += error is not None

    def _write(self, data: bytes) -> None:
        start = os.fstat(self._file).st_size
        try:
            while data:  # a disk that is almost full takes a part
                data = data[os.write(self._file, data) :]
        except OSError as error:
            os.ftruncate(self._file, start)
            raise self._error("written", error) from error

    def flush(self) -> None:
        """Flush the file to the disk."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._error("written", error) from error

    def close(self) -> None:
        """Close the file, which releases its lock."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
