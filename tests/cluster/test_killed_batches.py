"""A batch that `kill -9` ends continues: each line has one result, and none is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.killed_batches import N_LINES

ROOT = Path(__file__).resolve().parents[2]
KILLED = -signal.SIGKILL

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def results_of(path: Path) -> dict[str, Any]:
    """The results by id, without what differs between runs: ids and times of answers."""
    found = {}
    for line in path.read_text("utf-8").splitlines():
        result = json.loads(line)
        assert result["id"] not in found, "a duplicate result"
        if result["response"] is not None:
            del result["response"]["request_id"]
            body = result["response"]["body"]
            del body["id"], body["created"]
        found[result["id"]] = result
    return found


def complete_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


@pytest.mark.parametrize(
    ("seed", "batches"),
    [pytest.param(0, 3, id="6"), pytest.param(1, 25, marks=pytest.mark.kill, id="50")],
)
def test_the_runs_of_a_killed_batch_have_each_result_once(
    tmp_path: Path, seed: int, batches: int
) -> None:
    command = [sys.executable, "-m", "tests.support.killed_batches", str(tmp_path), str(seed)]
    done = subprocess.run([*command, str(batches)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    whole = results_of(tmp_path / "whole.jsonl")
    assert sorted(result["line"] for result in whole.values()) == list(range(1, N_LINES + 1))
    for number, codes in enumerate(json.loads(done.stdout)):
        assert codes == [KILLED, KILLED, 0], done.stderr
        output = tmp_path / f"{number}.jsonl"
        assert results_of(output) == whole
        data = output.read_bytes()
        for kill in (1, 2):  # lines that were finished are not computed again
            assert data.startswith(complete_lines(output.with_suffix(f".{kill}").read_bytes()))
