"""The output of a batch: appended lines, a removed incomplete line, files of others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gptx.cluster import results as module
from gptx.cluster.items import Item
from gptx.cluster.results import ResultFile
from gptx.errors import DataError, StorageError
from gptx.server.errors import ApiError
from tests.support.cli import posix

FIRST, SECOND = (Item(line, f"batch_req_{line}_0", "ä") for line in (1, 2))
ANSWER = {"status_code": 200, "body": {"system_fingerprint": "fp_1", "text": "ä\u2028\ud800"}}


def test_results_are_lines_of_json_in_utf8(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path) as results:
        results.append(FIRST, ANSWER, None)
        results.append(SECOND, None, ApiError(400, "no", param="prompt"))
    lines = path.read_text("utf-8").split("\n")
    assert json.loads(lines[0]) == {
        "id": FIRST.id,
        "custom_id": "ä",
        "line": 1,
        "response": ANSWER,
        "error": None,
    }
    assert json.loads(lines[1])["error"] == {
        "code": "invalid_request_error",
        "message": "no",
        "param": "prompt",
        "line": 2,
    }
    assert lines[2:] == [""]
    with ResultFile(path) as again:
        assert again.done == {FIRST.id, SECOND.id}
        assert (again.n_failed, again.fingerprints) == (1, {"fp_1"})


def test_an_incomplete_last_line_is_removed_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path) as results:
        results.append(FIRST, ANSWER, None)
        n_bytes = path.stat().st_size
        results.append(SECOND, ANSWER, None)
    data = path.read_bytes()
    for length in range(n_bytes, len(data)):
        path.write_bytes(data[:length])
        with ResultFile(path) as results:
            assert results.done == {FIRST.id}
        assert path.read_bytes() == data[:n_bytes]


@pytest.mark.parametrize(
    "text",
    ["hello", "hello\n", "{}\n", '{"id": 1}\n', '{"prompt": "a"}\n', '{"id": "batch_req_1_0"}\n',
     '{"id": "batch_req_1_0", "response": 1, "error": null}\n', "[]\n"],
)  # fmt: skip
def test_a_file_of_others_is_an_error_and_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match="has no result of a batch in line 1: give the name of"):
        ResultFile(path)
    assert path.read_text() == text


def test_a_duplicate_result_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path) as results:
        results.append(FIRST, ANSWER, None)
    path.write_bytes(2 * path.read_bytes())
    with pytest.raises(DataError, match="duplicate result in line 2"):
        ResultFile(path)


@posix
def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path), pytest.raises(DataError, match="a run that has not ended"):
        ResultFile(path)
    ResultFile(path).close()


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        ResultFile(tmp_path / "nothing" / "out.jsonl")
    with pytest.raises(StorageError, match="cannot be written"):
        ResultFile(tmp_path)


@posix
def test_a_device_is_no_output() -> None:
    with pytest.raises(StorageError, match="is a device"):
        ResultFile(os.devnull)


def test_a_full_disk_leaves_no_part_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    real, sizes = os.write, [10]

    def write(file: int, data: bytes) -> int:
        if not sizes:
            raise OSError(28, "No space left on device")
        return real(file, data[: sizes.pop()])

    with ResultFile(path) as results:
        results.append(FIRST, ANSWER, None)
        n_bytes = path.stat().st_size
        monkeypatch.setattr(module.os, "write", write)
        with pytest.raises(StorageError, match=r"cannot be written \(No space left on device\)"):
            results.append(SECOND, ANSWER, None)
        assert SECOND.id not in results.done
    assert path.stat().st_size == n_bytes
