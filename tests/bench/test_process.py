"""Tasks in processes of their own: what they report, and how they end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptx.bench import child, process
from gptx.bench.process import environment, fresh
from gptx.errors import DeviceOutOfMemory, GptxError, NotFoundError, WeightsError
from tests.support.cli import posix
from tests.support.refusals import refused

ENDLESS = {"trials": [[1, 0, 0]], "repetitions": 10**9}


def setup_of(path: Path) -> dict[str, Any]:
    return {"model": "m", "folder": str(path), "threads": 1, "generic": True}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """The processes that `fresh` starts."""
    processes: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def popen(*args: Any, **options: Any) -> subprocess.Popen[str]:
        processes.append(real(*args, **options))
        return processes[-1]

    monkeypatch.setattr(process.subprocess, "Popen", popen)
    return processes


def test_events_come_through(folder: Callable[..., Path]) -> None:
    events = list(fresh("speed", setup=setup_of(folder()), trials=[[2, 0, 0]], repetitions=1))
    assert [event.get("progress") for event in events] == [
        "pp2, warm-up",
        "pp2, round 1 of 1",
        None,
    ]
    assert events[-1]["test"] == "pp2"


def test_an_error_comes_through(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "model.safetensors").write_bytes(b"damaged")
    with refused(WeightsError, "is not a whole safetensors file"):
        list(fresh("speed", setup=setup_of(path), trials=[[2, 0, 0]], repetitions=1))


def test_whoever_stops_listening_ends_the_process(
    folder: Callable[..., Path], started: list[subprocess.Popen[str]]
) -> None:
    events = fresh("speed", setup=setup_of(folder()), **ENDLESS)
    next(events)
    [running] = started
    assert running.poll() is None
    events.close()
    assert running.poll() is not None


@posix
def test_a_killed_process_is_an_error(
    folder: Callable[..., Path], started: list[subprocess.Popen[str]]
) -> None:
    events = fresh("speed", setup=setup_of(folder()), **ENDLESS)
    next(events)
    started[0].kill()
    with refused(DeviceOutOfMemory, "was killed, probably because memory ran out"):
        list(events)


def test_nobody_measures_for_a_parent_that_is_gone(folder: Callable[..., Path]) -> None:
    arguments = json.dumps({"setup": setup_of(folder()), **ENDLESS})
    command = [sys.executable, "-m", "gptx.bench.child", "speed", arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert b"warm-up" in running.stdout.readline()
        running.stdin.close()
        running.stdout.read()
        assert running.wait(timeout=60) == 1


@pytest.mark.parametrize(("code", "says"), [(3, "ended with 3: see above for why")])
def test_an_exit_without_a_word(code: int, says: str) -> None:
    with refused(GptxError, says):
        process.check(code, "speed")


@pytest.mark.parametrize(
    ("error", "name"),
    [(NotFoundError("no file"), "NotFoundError"), (MemoryError("4 GB"), "DeviceOutOfMemory")],
)
def test_errors_are_reported_by_name(
    error: Exception, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Any:
        yield {"progress": "so far"}
        raise error

    monkeypatch.setitem(child.TASKS, "fails", fails)  # type: ignore[misc]
    out = io.StringIO()
    assert child.run("fails", {}, out) == 0
    first, last = map(json.loads, out.getvalue().splitlines())
    assert first == {"progress": "so far"}
    assert last["error"] == name
    assert str(error) in last["message"]


def test_the_process_imports_the_gptx_of_this_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And not one that lies in the folder where it was started."""
    (tmp_path / "gptx").mkdir()
    (tmp_path / "gptx" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    code = "import gptx; print(gptx.__file__)"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert Path(out.stdout.strip()) == Path(process.errors.__file__).with_name("__init__.py")
    assert environment()["PATH"] == os.environ["PATH"]
