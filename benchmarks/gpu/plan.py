"""What `gpu.py` does, the most important first: the rows of the goals, then the whole grid."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A process of its own.

    Attributes
    ----------
    task
        A key of `TASKS`.
    seconds
        How long it may take.
    arguments
        Of the task, as JSON has them.
    """

    name: str
    task: str
    seconds: float
    arguments: Record = field(default_factory=dict)


# Batch, prompt, new tokens
SHORT, DEEP, PREFILL, MANY = (1, 16, 128), (1, 1000, 25), (1, 1024, 1), (128, 128, 128)
PROMPTS = [(1, n, 1) for n in (128, 512, 1000)] + [(8, n, 1) for n in (512, 1000)]
EARLY = ("gptx", "gptx early", "gptx late")
BESIDE = ("gptx", "torch graph")


def plan(dry_run: bool) -> list[Job]:
    """The jobs, in their order."""
    return _dry_jobs() if dry_run else [*_goals(), *_grid()]


def _goals() -> list[Job]:
    """First what is judged: a fourth of an hour, with what is compiled."""
    layers = ("gptx", "gptx ops", "gptx generic")
    return [
        Job("device", "device", 40),
        Job("checks", "checks", 120, {"which": "first"}),
        times("124M", (*BESIDE, "transformers"), [SHORT, MANY, PREFILL, DEEP], 90),
        times("124M", EARLY, [SHORT, MANY, PREFILL, DEEP], 60, "early"),
        times("124M", ("gptx", "torch compile"), [SHORT, PREFILL, MANY, DEEP], 150, "compiled"),
        times("1558M", BESIDE, [SHORT, DEEP], 80),
        times("1558M", EARLY, [SHORT, DEEP], 60, "early"),
        times("124M", ("gptx", "gptx cublas"), PROMPTS, 40, "prompts"),
        times("1558M", ("gptx", "gptx cublas"), PROMPTS[:3], 60, "prompts"),
        times("124M", ("gptx", "gptx cublas"), PROMPTS[:2], 40, "prompts", dtype="float32"),
        Job("kernels", "kernels", 50, {"setting": {"size": "124M", "dtype": "float32"},
                                       "names": (*layers, "torch graph")}),
        # CuPy has no products of bfloat16 in more than two dimensions, which the generic ops want.
        times("124M", layers, [SHORT], 40, "layers", dtype="float32"),
        times("124M", layers[:2], [SHORT], 30, "layers"),
        times("124M", ("gptx",), [SHORT, DEEP], 40, quantize="int4"),
        times("124M", ("gptx",), [SHORT, DEEP], 40, quantize="int8"),
        Job("other checks", "checks", 150, {"which": "rest"}),
        times("355M", BESIDE, [SHORT, MANY, PREFILL, DEEP], 60),
        times("774M", BESIDE, [SHORT, MANY, PREFILL, DEEP], 60),
        times("124M", ("gptx", "torch compile graph"), [SHORT, MANY], 90, "compiled graph"),
        times("124M", ("gptx", "transformers compile"), [SHORT, MANY], 120, "transformers"),
        times("1558M", ("gptx",), [SHORT, DEEP], 60, quantize="int4"),
        times("1558M", ("gptx", "torch compile"), [SHORT], 180, "compiled"),
        Job("tests", "tests", 150, {"arguments": ["tests", "-k", "cupy and not cpu"]}),
    ]  # fmt: skip


def _grid() -> list[Job]:
    """Then sizes × precisions × batches × prompts, as long as there is time."""
    batches = [(8, 16, 128), (32, 128, 128), (8, 128, 128), (8, 1000, 25), (32, 1000, 25)]
    jobs = [times("124M", BESIDE, batches, 60, "batches")]
    jobs += [
        times("124M", BESIDE, [SHORT, DEEP, MANY], 60, dtype=x) for x in ("float16", "float32")
    ]
    jobs += [Job("mlx", "times", 60, _arguments("124M", "bfloat16", "", ("gptx on MLX",), [SHORT]))]
    for size in ("1558M", "355M", "774M"):
        rows = [*batches, MANY] if size == "1558M" else batches
        jobs.append(times(size, BESIDE, rows, 120, "batches"))
        for dtype in ("float16", "float32"):
            jobs.append(times(size, BESIDE, [SHORT, DEEP], 90, dtype=dtype))
        for quantize in ("int8", "int4"):
            jobs.append(times(size, ("gptx",), [SHORT, DEEP, MANY], 60, "more", quantize=quantize))
    jobs += [times(size, ("gptx", "torch compile"), [SHORT, MANY], 180, "compiled")
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
    """Time some engines side by side."""
    name = " ".join(filter(None, (size, quantize or dtype, title)))
    return Job(name, "times", seconds, _arguments(size, dtype, quantize, names, rows))


def _arguments(
    size: str, dtype: str, quantize: str, names: Sequence[str], rows: Sequence[Any]
) -> Record:
    setting = {"size": size, "dtype": dtype, "quantize": quantize}
    return {"setting": setting, "names": tuple(names), "rows": tuple(rows)}


def _dry_jobs() -> list[Job]:
    """Every task on the processor, in a minute or two."""
    here = {"size": "shakespeare", "dtype": "float32", "backend": "numpy", "device": "cpu"}
    rows = [(1, 16, 24), (8, 32, 16), (1, 256, 1), (1, 200, 8)]
    eager = ("gptx", "gptx ops", "gptx generic", "torch graph", "transformers")
    compiled = ("gptx", "torch compile", "torch compile graph", "transformers compile")
    return [
        Job("device", "device", 40, {"dry": True}),
        Job("checks", "checks", 240, {"which": "first", "backend": "numpy"}),
        Job("eager", "times", 120, {"setting": here, "names": eager, "rows": rows}),
        Job("compiled", "times", 240, {"setting": here, "names": compiled, "rows": rows[:2]}),
        Job("int4", "times", 60, {"setting": here | {"quantize": "int4"}, "names": ("gptx",),
                                  "rows": rows[:1]}),
        Job("mlx", "times", 60, {"setting": here, "names": ("gptx on MLX",), "rows": rows[:1]}),
        Job("tests", "tests", 60, {"arguments": ["tests/test_cupy_memory.py"]}),
    ]  # fmt: skip


# What runs in the process of a job; each takes the time at which it has to end.


def device(until: float, dry: bool = False) -> Iterator[Record]:
    """What there is, and its ceilings."""
    from benchmarks.gpu import device as gpu_device

    if what := gpu_device.missing():
        yield {"section": "note", "text": what}
    yield {"section": "device", **gpu_device.facts()}
    if not dry:
        yield {"section": "device", **gpu_device.gpu_facts()}
    for name, value in gpu_device.host_rates() if dry else gpu_device.rates():
        yield {"section": "rates", "name": name, "value": value}


def checks(until: float, which: str, backend: str = "cupy") -> Iterator[Record]:
    """Whether it is right."""
    from benchmarks.gpu import checks as gpu_checks

    groups = getattr(gpu_checks, which)(gpu_checks.Where(backend))
    for finding in gpu_checks.run(groups, lambda: time.time() < until):
        yield {"section": "checks", **finding}


def times_of(
    until: float, setting: Record, names: Sequence[str], rows: Sequence[Sequence[int]]
) -> Iterator[Record]:
    """How long it takes."""
    from benchmarks.gpu import times as gpu_times

    wanted = [gpu_times.Row(*row) for row in rows]
    for record in gpu_times.run(gpu_times.Setting(**setting), names, wanted, until):
        yield {"section": "times", **record}


def kernels(until: float, setting: Record, names: Sequence[str]) -> Iterator[Record]:
    """How many kernels it launches."""
    from benchmarks.gpu import times as gpu_times

    for record in gpu_times.count_kernels(gpu_times.Setting(**setting), names, until):
        yield {"section": "kernels", **record}


def tests(until: float, arguments: Sequence[str]) -> Iterator[Record]:
    """What the test suite says."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not hub", "-p", "no:cacheprovider",
               "-o", "addopts=", "-o", "filterwarnings=default",  # one process, and no plugins
               "--continue-on-collection-errors"]  # fmt: skip
    done = subprocess.run(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONSAFEPATH": "1"},  # here, gptx/ has no backends in it
        timeout=max(until - time.time(), 1),
    )
    print(done.stdout)
    last = done.stdout.strip().rpartition("\n")[2]
    failed = sum(map(int, re.findall(r"(\d+) failed", last)))
    ok = not failed and " passed" in last  # files that want what is not here are no matter
    yield {"section": "checks", "group": f"pytest {' '.join(arguments)}", "check": last,
           "error": float(failed), "limit": 0.0, "ok": ok}  # fmt: skip


TASKS: dict[str, Callable[..., Iterator[Record]]] = {
    "device": device,
    "checks": checks,
    "times": times_of,
    "kernels": kernels,
    "tests": tests,
}
