"""A run that `kill -9` ends resumes with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptx.training.reports.log_file import read_log
from tests.support.conversions import contents

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize(
    ("seed", "runs"),
    [pytest.param(0, 2, id="2"), pytest.param(1, 200, marks=pytest.mark.kill, id="200")],
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, seed: int, runs: int) -> None:
    """And there is never half a checkpoint: the second run reads what the first one left."""
    command = [sys.executable, "-m", "tests.support.killed_runs", str(tmp_path), str(seed)]
    done = subprocess.run([*command, str(runs)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == [[-signal.SIGKILL, 0]] * runs, done.stderr
    whole = tmp_path / "whole"
    names = sorted(p.name for p in whole.iterdir())
    for number in range(runs):
        folder = tmp_path / str(number)
        assert sorted(p.name for p in folder.iterdir()) == names, "a temporary file is left"
        assert contents(folder / "last") == contents(whole / "last")
        for name in ("config.json", "model.safetensors"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
        steps = [record["step"] for record in read_log(folder / "log.jsonl") if "loss" in record]
        assert steps == list(range(1, 41))
