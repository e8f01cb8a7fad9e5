"""Compare numbers of threads, on a quiet machine and beside a process that keeps one core busy.

    python -m benchmarks.threads --size 124M --quantize int8 --work /tmp/models

A case is a prompt of T tokens, or a step at a context of 20. All numbers of threads run in turns in
one process, which may have twice as many threads as cores. The busy process counts, and uses no
memory. One thread has the other cores to itself; each further thread competes for the busy core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.instruction_sets import instruction_set
from benchmarks.sweep import time_pass
from gptx.bench.machine import cpu_name
from gptx.bench.sources import RANDOM, find_source, write_source
from gptx.bench.tables import Column, markdown, ratio
from gptx.bench.worker import Worker
from gptx.config import SIZES
from gptx.process import count_cores

MODULE = "benchmarks.threads"
CASES = ((1, 1, 20), (1, 19, 0), (1, 256, 0))  # sequences, new tokens, context
REPEATS = 5  # passes of a turn


def measure_threads(
    folder: str, quantize: str | None, threads: list[int], rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield the seconds of each case and number of threads, quiet and busy; runs in a worker."""
    import gptx

    models = [gptx.load(folder, threads=n, quantize=quantize) for n in threads]
    for case in CASES:
        for busy in (False, True):
            with _busy_core(busy):
                turns = [[_time_turn(model, case) for model in models] for _ in range(rounds + 1)]
            for n, seconds in zip(threads, zip(*turns[1:], strict=True), strict=True):
                yield {"case": case, "busy": busy, "threads": n, "seconds": seconds}


def _time_turn(model: Any, case: tuple[int, int, int]) -> float:
    return float(np.median([time_pass(model, *case) for _ in range(REPEATS)]))


@contextmanager
def _busy_core(busy: bool) -> Iterator[None]:
    """Keep one core busy with another process."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def add_ratios(records: list[dict[str, Any]]) -> None:
    """Add the ratio of the median to that of the fewest threads, in the same case and company."""
    fewest: dict[Any, float] = {}
    for record in sorted(records, key=lambda r: r["threads"]):
        median = float(np.median(record["seconds"]))
        record["ratio"] = median / fewest.setdefault((*record["case"], record["busy"]), median)


COLUMNS = (
    Column("sequences × tokens", lambda r: f"{r['case'][0]} × {r['case'][1]}"),
    Column("other process", lambda r: "busy" if r["busy"] else "none", right=False),
    Column("threads", lambda r: str(r["threads"])),
    Column("median", lambda r: f"{1e3 * np.median(r['seconds']):.1f} ms"),
    Column("quartiles", lambda r: "–".join(f"{1e3 * s:.1f}" for s in _quartiles(r))),
    Column("ratio to the fewest", lambda r: ratio(r["ratio"])),
)


def _quartiles(record: dict[str, Any]) -> list[float]:
    return [float(s) for s in np.percentile(record["seconds"], [25, 75])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.threads", description=__doc__.partition("\n")[0]
    )
    cores = count_cores()
    parser.add_argument("--size", choices=tuple(SIZES), default="124M")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, cores, 2 * cores])
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: 7)")
    parser.add_argument("--work", type=Path, help="folder that keeps the random model")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        source = find_source(RANDOM + args.size, work)
        write_source(source)
        with Worker(env={"NUMBA_NUM_THREADS": str(max(args.threads))}) as worker:
            options = {"quantize": args.quantize, "threads": args.threads, "rounds": args.rounds}
            task = f"{MODULE}:measure_threads"
            records = list(worker.run(task, folder=str(source.path), **options))
    add_ratios(records)
    about = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "instructions": os.environ.get("GPTX_ISA") or instruction_set(),
        "date": time.strftime("%Y-%m-%d"),
        "model": f"{args.size}, {args.quantize or 'float32'}",
    }
    print(f"{about['cpu']}, {cores} cores, {about['instructions']}, {about['model']}\n")
    print(markdown(records, COLUMNS))
    print()
    print(json.dumps(about | {"records": records}))


if __name__ == "__main__":
    main()
