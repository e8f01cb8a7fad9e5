"""Workers: events, errors, the end of a worker, and its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gptx
from gptx.bench import worker
from gptx.bench.worker import Worker, run_task, time_process
from gptx.errors import DeviceOutOfMemory, GptxError, WeightsError
from gptx.process import environment
from tests.support.cli import posix, raises_error

TASKS = "tests.bench.worker_tasks"


def test_a_worker_runs_tasks_one_after_the_other(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        with Worker(log=log, env={"OMP_NUM_THREADS": "3"}) as child:
            assert list(child.run(f"{TASKS}:echo", n=2, text="ä")) == [
                {"i": 0, "text": "ä"},
                {"i": 1, "text": "ä"},
            ]
            with raises_error(WeightsError, "h.0 is damaged…"):
                list(child.run(f"{TASKS}:fail", kind="gptx"))
            with raises_error(DeviceOutOfMemory, "out of memory (4 GB): use a smaller model"):
                list(child.run(f"{TASKS}:fail", kind="memory"))
            [event] = child.run(f"{TASKS}:process_id")
            assert event["pid"] == child.process.pid
        assert child.process.returncode is not None
        log.seek(0)
        assert log.read() == "the output of a library\n"


def test_a_bug_has_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with raises_error(GptxError, "ZeroDivisionError: a bug"):
        list(run_task(f"{TASKS}:fail", kind="bug"))
    assert "Traceback" in capfd.readouterr().err


def test_an_exit_without_a_message() -> None:
    with raises_error(GptxError, "ended with 3: see its messages above"):
        list(run_task(f"{TASKS}:fail", kind="exit"))


def test_a_caller_that_stops_early_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[Worker] = []
    monkeypatch.setattr(worker, "Worker", lambda: children.append(Worker()) or children[-1])
    events = run_task(f"{TASKS}:run_forever")
    next(events)
    [child] = children
    assert child.process.poll() is None
    events.close()
    assert child.process.poll() is not None


@posix
def test_a_killed_worker_is_an_error() -> None:
    with (
        raises_error(DeviceOutOfMemory, "was killed, probably out of memory"),
        Worker() as child,
    ):
        for _ in child.run(f"{TASKS}:run_forever"):
            child.kill()


def test_a_task_does_not_outlive_its_parent() -> None:
    with Worker() as child:
        next(child.run(f"{TASKS}:run_forever"))
    assert child.process.returncode != 0


def test_a_worker_imports_the_gptx_of_its_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The gptx in its current folder is another one."""
    (tmp_path / "gptx").mkdir()
    (tmp_path / "gptx" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    seconds, done = time_process([sys.executable, "-c", "import gptx; print(gptx.__file__)"])
    assert seconds > 0
    assert done.stdout.strip() == gptx.__file__
    assert environment()["PATH"] == os.environ["PATH"]


@posix
def test_a_checkout_needs_no_installation() -> None:
    """From another folder, without the packages of this environment."""
    root = Path(gptx.__file__).parents[1]
    code = "import benchmarks.gpu.jobs; from importlib.util import find_spec as find\n"
    code += "print(find('gptx.backends').origin)\nprint(find('gptx.conversions').origin)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env={"PYTHONPATH": str(root)},
        check=True,
    )
    packages = [root / name / "__init__.py" for name in ("backends", "conversions")]
    assert done.stdout.splitlines() == list(map(str, packages))
