"""The jobs of the GPU benchmark, and a run that continues after failures."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu import run as gpu_run
from benchmarks.gpu.jobs import TIMES, TRAINING_ENGINES, TRAINING_TIMES, Job, plan
from benchmarks.gpu.report import render_tables
from benchmarks.gpu.times import ENGINES, ITEMSIZE, Row, Setting
from tests.benchmarks.test_gpu_report import parse_times

HERE = "tests.benchmarks.gpu_tasks"


def test_every_job_leaves_its_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_run, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(gpu_run, "MIN_JOB_SECONDS", 0.5)
    jobs = [
        Job("fails", f"{HERE}:fail", 30),
        Job("hangs", f"{HERE}:hang", 0.7),
        Job("wrong", f"{HERE}:yield_wrong_check", 30),
        Job("late", f"{HERE}:fail", 0.1),
    ]
    out = tmp_path / "new" / "out"
    assert gpu_run.run_jobs(jobs, out, time.time() + 60) == 1
    records = [json.loads(text) for text in (out / "gpu.jsonl").read_text().splitlines()]
    assert [(r["job"], r["section"]) for r in records] == [
        ("fails", "rates"),
        ("fails", "note"),
        ("fails", "done"),
        ("hangs", "rates"),
        ("hangs", "note"),
        ("hangs", "done"),
        ("wrong", "checks"),
        ("wrong", "done"),
    ]
    assert records[1]["text"].startswith("ValueError: a bug after")
    assert records[4]["text"].startswith("killed: it took too long after")
    assert "ValueError: a bug" in (out / "gpu.log").read_text()
    shown = capfd.readouterr()
    assert (out / "gpu.md").read_text() == shown.out
    assert "WRONG: c: 1, limit 0.1" in shown.out
    assert "no time for: late" in shown.err


def test_a_job_in_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # threads that wait would spin
    here = {"size": "shakespeare", "dtype": "float32", "backend": "numpy", "device": "cpu"}
    arguments = {"setting": here, "names": ["gptx generic"], "rows": [[2, 4, 3]]}
    with (tmp_path / "log").open("w") as log:
        *records, done = gpu_run.run_job(Job("small", TIMES, 60, arguments), 60, log, str(tmp_path))
    assert done["section"] == "done"
    [row] = parse_times(render_tables(records))
    assert (row["model"], row["batch"], row["tokens"]) == ("shakespeare", "2", "4 + 3")


@pytest.mark.parametrize("dry", [False, True])
def test_the_plan(dry: bool) -> None:
    jobs = plan(dry)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        module, _, function = job.task.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        json.dumps(job.arguments)
        engines = TRAINING_ENGINES if job.task == TRAINING_TIMES else ENGINES
        assert set(job.arguments.get("names", ())) <= set(engines)
        n_positions = 256 if dry else 1024
        for row in job.arguments.get("rows", ()):
            assert Row(*row).capacity <= n_positions
        if "setting" in job.arguments:
            setting = Setting(**job.arguments["setting"])
            assert setting.dtype in ITEMSIZE
