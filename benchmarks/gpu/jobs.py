"""The jobs of the GPU benchmark, the most important first: the goals, then the whole grid."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptx.bench.worker import Event

ROOT = Path(__file__).resolve().parents[2]

# Tasks: generators of records, called with the time at which they have to end.
DEVICE = "benchmarks.gpu.device:report_device"
CHECKS = "benchmarks.gpu.checks:run_checks"
TIMES = "benchmarks.gpu.times:run_times"
KERNELS = "benchmarks.gpu.times:count_kernels"
TRAINING_CHECKS = "benchmarks.gpu.training:run_checks"
TRAINING_TIMES = "benchmarks.gpu.training:run_times"
TESTS = "benchmarks.gpu.jobs:run_tests"


@dataclass(frozen=True)
class Job:
    """A task in a worker.

    Attributes
    ----------
    task
        Its function, "module:function".
    seconds
        The time limit.
    arguments
        The arguments of the task, as JSON has them.
    """

    name: str
    task: str
    seconds: float
    arguments: dict[str, Any] = field(default_factory=dict)


# (batch, prompt tokens, new tokens)
SHORT, DEEP, PREFILL, BATCH = (1, 16, 128), (1, 1000, 25), (1, 1024, 1), (128, 128, 128)
PROMPTS = [(1, n, 1) for n in (128, 512, 1000)] + [(8, n, 1) for n in (512, 1000)]
PDL_ENGINES = ("gptx", "gptx pdl", "gptx no pdl")  # programmatic dependent launch
TRAINING_ENGINES = ("gptx", "torch eager")
GOAL_ENGINES = ("gptx", "torch graph")


def plan(dry_run: bool) -> list[Job]:
    """Return the jobs in their order."""
    return _dry_jobs() if dry_run else [*_goal_jobs(), *_grid_jobs()]


def _goal_jobs() -> list[Job]:
    """Return the jobs of the goals: a quarter of an hour with compilation."""
    layers = ("gptx", "gptx ops", "gptx generic")
    return [
        Job("device", DEVICE, 40),
        Job("checks", CHECKS, 120, {"which": "first"}),
        times("124M", (*GOAL_ENGINES, "transformers"), [SHORT, BATCH, PREFILL, DEEP], 90),
        Job("training checks", TRAINING_CHECKS, 90),
        training("124M", 60),
        times("124M", PDL_ENGINES, [SHORT, BATCH, PREFILL, DEEP], 60, "pdl"),
        times("124M", ("gptx", "torch compile"), [SHORT, PREFILL, BATCH, DEEP], 150, "compiled"),
        times("1558M", GOAL_ENGINES, [SHORT, DEEP], 100),
        times("1558M", PDL_ENGINES, [SHORT, DEEP], 60, "pdl"),
        times("124M", ("gptx", "gptx cublas"), PROMPTS, 40, "prompts"),
        times("1558M", ("gptx", "gptx cublas"), PROMPTS[:3], 60, "prompts"),
        times("124M", ("gptx", "gptx cublas"), PROMPTS[:2], 40, "prompts", dtype="float32"),
        Job("kernels", KERNELS, 50, {"setting": {"size": "124M", "dtype": "float32"},
                                     "names": (*layers, "torch graph")}),
        # float32: CuPy has no bfloat16 products of more than two dimensions for the generic ops.
        times("124M", layers, [SHORT], 40, "layers", dtype="float32"),
        times("124M", layers[:2], [SHORT], 30, "layers"),
        times("124M", ("gptx",), [SHORT, DEEP], 40, quantize="int4"),
        times("124M", ("gptx",), [SHORT, DEEP], 40, quantize="int8"),
        Job("other checks", CHECKS, 150, {"which": "rest"}),
        training("124M", 60, dtype="float32"),
        times("355M", GOAL_ENGINES, [SHORT, BATCH, PREFILL, DEEP], 60),
        times("774M", GOAL_ENGINES, [SHORT, BATCH, PREFILL, DEEP], 60),
        times("124M", ("gptx", "torch compile graph"), [SHORT, BATCH], 90, "compiled graph"),
        times("124M", ("gptx", "transformers compile"), [SHORT, BATCH], 120, "transformers"),
        times("1558M", ("gptx",), [SHORT, DEEP], 90, quantize="int4"),
        times("1558M", ("gptx", "torch compile"), [SHORT], 180, "compiled"),
        Job("tests", TESTS, 150, {"arguments": ["tests", "-k", "cupy and not cpu"]}),
    ]  # fmt: skip


def _grid_jobs() -> list[Job]:
    """Return the jobs of sizes × precisions × batches × prompts, for the time that is left."""
    batches = [(8, 16, 128), (32, 128, 128), (8, 128, 128), (8, 1000, 25), (32, 1000, 25)]
    jobs = [times("124M", GOAL_ENGINES, batches, 60, "batches")]
    jobs += [
        times("124M", GOAL_ENGINES, [SHORT, DEEP, BATCH], 60, dtype=x)
        for x in ("float16", "float32")
    ]
    mlx = times("124M", ("gptx on MLX",), [SHORT], 60)
    jobs += [Job("mlx", mlx.task, mlx.seconds, mlx.arguments)]
    for size in ("1558M", "355M", "774M"):
        rows = [*batches, BATCH] if size == "1558M" else batches
        jobs.append(times(size, GOAL_ENGINES, rows, 120, "batches"))
        for dtype in ("float16", "float32"):
            jobs.append(times(size, GOAL_ENGINES, [SHORT, DEEP], 90, dtype=dtype))
        for quantize in ("int8", "int4"):
            rows = [SHORT, DEEP, BATCH]
            jobs.append(times(size, ("gptx",), rows, 90, "more", quantize=quantize))
    jobs += [times(size, ("gptx", "torch compile"), [SHORT, BATCH], 180, "compiled")
             for size in ("355M", "774M")]  # fmt: skip
    return jobs


def times(
    size: str,
    names: Sequence[str],
    rows: Sequence[tuple[int, int, int]],
    seconds: float,
    title: str = "",
    *,
    dtype: str = "bfloat16",
    quantize: str = "",
) -> Job:
    """Return the job that times engines side by side."""
    name = " ".join(filter(None, (size, quantize or dtype, title)))
    setting = {"size": size, "dtype": dtype, "quantize": quantize}
    arguments = {"setting": setting, "names": tuple(names), "rows": tuple(rows)}
    return Job(name, TIMES, seconds, arguments)


def training(size: str, seconds: float, dtype: str = "bfloat16") -> Job:
    """Return the job that times updates of 4 × 1,024 tokens beside PyTorch's."""
    setting = {"size": size, "dtype": dtype}
    arguments = {"setting": setting, "names": TRAINING_ENGINES, "B": 4, "T": 1024}
    return Job(f"training {size} {dtype}", TRAINING_TIMES, seconds, arguments)


def _dry_jobs() -> list[Job]:
    """Return jobs that run every task on the CPU, in a minute or two."""
    here = {"size": "shakespeare", "dtype": "float32", "backend": "numpy", "device": "cpu"}
    rows = [(1, 16, 24), (8, 32, 16), (1, 256, 1), (1, 200, 8)]
    eager = ("gptx", "gptx ops", "gptx generic", "torch graph", "transformers")
    compiled = ("gptx", "torch compile", "torch compile graph", "transformers compile")
    int4 = here | {"quantize": "int4"}
    return [
        Job("device", DEVICE, 40, {"dry_run": True}),
        Job("checks", CHECKS, 240, {"which": "first", "backend": "numpy"}),
        Job("eager", TIMES, 120, {"setting": here, "names": eager, "rows": rows}),
        Job("compiled", TIMES, 240, {"setting": here, "names": compiled, "rows": rows[:2]}),
        Job("int4", TIMES, 60, {"setting": int4, "names": ("gptx",), "rows": rows[:1]}),
        Job("training checks", TRAINING_CHECKS, 60, {"backend": "numpy"}),
        Job("training", TRAINING_TIMES, 60,
            {"setting": here, "names": TRAINING_ENGINES, "B": 2, "T": 64}),
        Job("mlx", TIMES, 60, {"setting": here, "names": ("gptx on MLX",), "rows": rows[:1]}),
        Job("tests", TESTS, 60, {"arguments": ["tests/benchmarks/test_gpu_report.py"]}),
    ]  # fmt: skip


def run_tests(until: float, arguments: Sequence[str]) -> Iterator[Event]:
    """Run pytest; yield a check with its last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not hub", "-p", "no:cacheprovider",
               "-o", "addopts=", "-o", "filterwarnings=default",  # one process, no plugins
               "--continue-on-collection-errors"]  # fmt: skip
    done = subprocess.run(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        timeout=max(until - time.time(), 1),
    )
    print(done.stdout)
    last = done.stdout.strip().rpartition("\n")[2]
    failed = sum(map(int, re.findall(r"(\d+) failed", last)))
    ok = not failed and " passed" in last  # files that need missing packages do not count
    yield {"section": "checks", "group": f"pytest {' '.join(arguments)}", "check": last,
           "error": float(failed), "limit": 0.0, "ok": ok}  # fmt: skip
