"""benchmarks/gpu.py, as far as that goes without a GPU: it has to be right the first time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import engines as gpu_engines
from benchmarks.gpu import plan as gpu_plan
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import run as gpu
from benchmarks.gpu import times as gpu_times
from gptx.random_weights import random_weights
from tests.support.bench import table
from tests.support.random_models import CASES

BENCHMARKS = Path(gpu.__file__).parent
SHAPE = {"size": "124M", "dtype": "bfloat16", "quantize": "", "batch": 1, "prompt": 16, "new": 5}


# Times


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    time = perf_counter


class Fake(gpu_engines.Engine):
    """Takes 1 second for the first token, and for each other as long as it is told."""

    weights_bytes = 100
    kernels = 63

    def __init__(self, clock: Clock, step: float, fails_at: int = 99, tokens: str = "abcd") -> None:
        self.name = f"every {step} s"
        self.clock, self.step, self.fails_at, self.letters = clock, step, fails_at, tokens
        self.runs = 0

    def prepare(self, batch: int, room: int, n_tokens: int) -> None:
        self.clock.now += 10

    def tokens(self, prompts: np.ndarray, n: int) -> Iterator[list[int]]:
        self.runs += 1
        if self.runs == self.fails_at:
            raise RuntimeError("out of luck")
        self.clock.now += 1
        for k in range(n):
            self.clock.now += self.step * (k > 0)
            yield [ord(self.letters[k])]

    def device_seconds(self, prompts: np.ndarray, n: int) -> tuple[float, float]:
        return 0.5, self.step / 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(gpu_times, "time", found)
    return found


def measured(row: tuple[int, int, int], *engines: Fake, until: float = 1e9) -> list[dict[str, Any]]:
    loaded: Any = SimpleNamespace(engines=engines, config=CASES["tiny"])
    return list(gpu_times.measure(gpu_times.Row(*row), loaded, until))


def test_what_is_made_of_arrivals(clock: Clock) -> None:
    fast, slow = measured((3, 2, 4), Fake(clock, 0.25), Fake(clock, 2.0, tokens="abXd"))
    assert fast["first"] == slow["first"] == [1.0] * gpu_times.FEWEST  # for they took so long
    assert (fast["step_p50"], fast["step_p99"], slow["step_p50"]) == (0.25, 0.25, 2.0)
    assert fast["rate"] == [3 / 0.25] * 2
    assert fast["whole_rate"] == [3 * 4 / 1.75] * 2
    assert (fast["first_run"], fast["compile_time"]) == (11.75, 10)
    assert (fast["first_device"], fast["step_device"]) == (0.5, 0.125)
    assert (fast["memory"], fast["kernels"]) == (100, 63)
    assert (fast["same_tokens"], slow["same_tokens"]) == (4, 2)


def test_a_prompt_alone_has_no_steps(clock: Clock) -> None:
    [record] = measured((1, 64, 1), Fake(clock, 1.0))
    assert record["first"] == [1.0] * gpu_times.ROUNDS
    assert "rate" not in record


@pytest.mark.parametrize("fails_at", [1, 3])
def test_an_engine_that_fails_is_left_out(clock: Clock, fails_at: int) -> None:
    failed, record = measured((1, 2, 4), Fake(clock, 2.0, fails_at), Fake(clock, 1.0))
    assert failed == {"engine": "every 2.0 s", "error": "RuntimeError: out of luck"}
    assert record["engine"] == "every 1.0 s"
    assert record["same_tokens"] == 4


def test_time_that_is_up_ends_the_rounds(clock: Clock) -> None:
    """The first runs of two engines take 14 seconds each, a round of both 8."""
    found = measured((1, 2, 4), Fake(clock, 1.0), Fake(clock, 1.0), until=29)
    assert [len(record["first"]) for record in found] == [1, 1]


@pytest.mark.parametrize("backend", ["numpy", "cupy"])
def test_gptx_is_timed_with_its_own_engine(backend: str) -> None:
    from tests.emulator import cupy_stand_in as cupy_on_cpu

    config = replace(CASES["tiny"], n_embd=64)
    weights = random_weights(config)
    prompts = gpu_times.random_ids(config, 2, 3)
    exact = gpu_engines.Gptx("exact", config, weights, backend="numpy", generic=True)
    with cupy_on_cpu.installed():
        engine = gpu_engines.Gptx("here", config, weights, backend=backend, compile=False)
        engine.prepare(2, 6, 4)
        assert list(engine.tokens(prompts, 4)) == list(exact.tokens(prompts, 4))
        np.testing.assert_allclose(engine.logits([1, 2, 3]), exact.logits([1, 2, 3]), atol=1e-4)
        assert min(engine.device_seconds(prompts, 4)) > 0
        engine.release()
        held, most = engine.memory()
        assert held <= most
    assert engine.weights_bytes == 4 * config.n_parameters


# Tables


def record(engine: str, step: float, job: str = "a", **facts: Any) -> dict[str, Any]:
    times = {"first": [0.002, 0.001, 0.003], "first_device": 0.001, "step_p50": step,
             "step_p99": 2 * step, "step_device": step / 2, "rate": [1 / step], "memory": 3e8,
             "whole_rate": [0.9 / step], "compile_time": 20.0, "kernels": None,
             "weights_read": 2 * 10**8, "cache_read": 10**8, "prompt_flops": 10**11}  # fmt: skip
    return {"section": "times", "job": job, "engine": engine, **SHAPE, **times, **facts}


def times_in(text: str) -> list[dict[str, str]]:
    """The rows of the table of times."""
    return table(next(part for part in text.split("\n\n") if part.startswith("| model")))


RATES = [
    {"section": "rates", "job": "device", "name": "read", "value": 4e12},
    {"section": "rates", "job": "device", "name": "matmul", "value": 500e12},
]


def test_rows_are_compared_with_the_floor_and_with_the_fastest_peer_beside_them() -> None:
    records = [
        *RATES,
        record("gptx", 150e-6),
        record("torch graph", 300e-6),
        record("transformers", 3e-3),
        record("gptx", 200e-6, "b"),  # a slower minute of the machine
        record("torch compile", 350e-6, "b"),
        record("torch graph", 100e-6, batch=8),
        {"section": "kernels", "job": "k", "size": "124M", "engine": "gptx", "kernels": 63.0},
    ]
    results = gpu_report.Results(records)
    first = results.times[0]
    assert first["of_floor"] == pytest.approx(0.5)
    assert first["of_matmul"] == pytest.approx(0.1)
    assert first["kernels"] == 63
    assert first["speedup"] == pytest.approx(1.75)
    assert results.times[1]["speedup"] is None
    rows = times_in(gpu_report.tables(records))
    assert [row["engine"] for row in rows] == [r["engine"] for r in results.times]
    assert rows[0] == {
        "model": "124M",
        "precision": "bfloat16",
        "batch": "1",
        "tokens": "16 + 5",
        "engine": "gptx",
        "first token": "2.00 ms",
        "of matmul": "0.10",
        "a token p50 / p99": "150 µs / 300 µs",
        "tokens/s (quartiles)": "6,667 (6,667–6,667)",
        "of the floor": "0.50",
        "events: first / token": "1.00 ms / 75 µs",
        "kernels": "63",
        "memory": "300 MB",
        "compile": "20.00 s",
        "× PyTorch": "1.75",
    }


def test_goals_are_met_or_missed() -> None:
    goals = {
        (what, limit): value
        for what, _, limit, value in gpu_report.goals_of(
            gpu_report.Results(
                [
                    *RATES,
                    record("gptx", 1 / 5000),
                    record("gptx", 1 / 4500, prompt=1000),
                    record("gptx", 1e-3, batch=128, prompt=128, whole_rate=[130_000.0]),
                    record("gptx", 1e-4, size="1558M"),
                    record("gptx", 1.0, prompt=1024, new=1),
                ]
            )
        )
    }
    values = list(dict.fromkeys(goals.values()))
    assert values == [5000, pytest.approx(0.75), pytest.approx(0.9), 130_000, 2.0, None]
    assert len(goals) == 11


def test_what_is_wrong_and_what_failed_is_told() -> None:
    check = {"section": "checks", "job": "checks", "group": "ops", "limit": 1e-5}
    text = gpu_report.tables(
        [
            check | {"check": "linear", "error": 2e-6, "ok": True},
            check | {"check": "gelu", "error": float("nan"), "ok": False},
            {"section": "times", "job": "a", **SHAPE, "engine": "torch graph", "error": "E: full"},
            {"section": "note", "job": "b", "text": "was ended: it took too long"},
        ]
    )
    assert "| ops | 2 | 0.20 | WRONG: gelu: nan, limit 1e-05 |" in text
    assert "- a: torch graph 124M bfloat16 1 16: E: full" in text
    assert "- b: was ended: it took too long" in text
    assert gpu_report.tables([]) == ""


# The run


def script(code: str) -> list[str]:
    return [sys.executable, "-c", f"import json, sys, time\n{code}"]


def test_every_job_leaves_its_results_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = 'print(json.dumps({"section": "rates", "name": "read", "value": 1.0}), flush=True)'
    scripts = {
        "fails": f"{line}\nsys.exit('a sad end')",
        "hangs": f"{line}\ntime.sleep(60)",
        "wrong": 'print(json.dumps({"section": "checks", "group": "g", "check": "c",'
        ' "error": 1.0, "limit": 0.1, "ok": False}))',
        "late": line,
    }
    monkeypatch.setattr(gpu, "command", lambda job, until: script(scripts[job.name]))
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    monkeypatch.setattr(gpu, "SHORTEST", 1.0)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    jobs = [gpu_plan.Job(name, "", 2.0 if name == "hangs" else 30.0) for name in scripts]
    jobs[3] = replace(jobs[3], seconds=0.5)
    assert gpu.run(jobs, tmp_path / "new" / "out", time.time() + 60) == 1
    out = tmp_path / "new" / "out"
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
    assert records[1]["text"].startswith("ended with 1 after")
    assert records[4]["text"].startswith("was ended: it took too long")
    assert "a sad end" in (out / "gpu.log").read_text()
    shown = capfd.readouterr()
    assert (out / "gpu.md").read_text() == shown.out
    assert "WRONG: c: 1, limit 0.1" in shown.out
    assert "no time for: late" in shown.err


def test_a_job_from_its_process_to_the_table(tmp_path: Path) -> None:
    here = {"size": "shakespeare", "dtype": "float32", "backend": "numpy", "device": "cpu"}
    arguments = {"setting": here, "names": ["gptx generic"], "rows": [[2, 4, 3]]}
    job = gpu_plan.Job("small", "times", 60, arguments)
    with (tmp_path / "log").open("w") as log:
        *found, done = gpu.records_of(job, 60, log)
    assert done["section"] == "done"
    [row] = times_in(gpu_report.tables(found))
    assert (row["model"], row["batch"], row["tokens"]) == ("shakespeare", "2", "4 + 3")


def test_a_checkout_is_importable_as_it_lies(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu, pathlib\n"
        f"gpu.make_importable(pathlib.Path({str(tmp_path)!r}))\n"
        "from importlib.util import find_spec\n"
        "print(find_spec('gptx.backends').origin)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "gptx" / "backends" / "__init__.py")


@pytest.mark.parametrize("dry", [False, True])
def test_the_plan_is_sound(dry: bool) -> None:
    jobs = gpu_plan.plan(dry)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        assert job.task in gpu_plan.TASKS
        json.dumps(job.arguments)
        assert set(job.arguments.get("names", ())) <= set(gpu_times.ENGINES)
        n_positions = 256 if dry else 1024
        for row in job.arguments.get("rows", ()):
            assert gpu_times.Row(*row).room <= n_positions
        if "setting" in job.arguments:
            setting = gpu_times.Setting(**job.arguments["setting"])
            assert setting.dtype in gpu_times.ITEMSIZE
