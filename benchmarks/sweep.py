"""Compare the compiled forward pass with the ops one by one, over lengths, batches and threads.

    python -m benchmarks.sweep --sizes 124M 355M --threads 1 2 --work /tmp/models

A case is a prompt of T tokens, or a step of B sequences at a context of 20. Both passes have the
same float32 weights and run in turns. The compiled one is slower if its median is above that of the
ops by more than half of the quartile spread of both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.instruction_sets import ISAS, NAMES, instruction_set
from gptx.bench.machine import cpu_name
from gptx.bench.sources import RANDOM, find_source, random_ids, write_source
from gptx.bench.tables import Column, markdown, ratio
from gptx.bench.worker import Worker
from gptx.config import SIZES
from gptx.kv_cache import KVCache

MODULE = "benchmarks.sweep"
CONTEXT = 20  # of a step
PAUSE = 0.25  # seconds before a pass: OpenBLAS's threads spin after the last one
PROMPTS = (2, 4, 8, 16, 19, 32, 64, 128, 256, 512, 1024)
BATCHES = (1, 2, 4, 8, 16)
CASES = [(1, T, 0) for T in PROMPTS] + [(B, 1, CONTEXT) for B in BATCHES]


def measure_cases(
    folder: str, threads: int, rounds: int, cases: list[list[int]]
) -> Iterator[dict[str, Any]]:
    """Yield the seconds of both passes for each case; runs in a worker."""
    import gptx

    models = [gptx.load(folder, threads=threads, compile=compile) for compile in (True, False)]
    for B, T, context in cases:
        seconds = [[time_pass(model, B, T, context) for model in models] for _ in range(rounds)]
        compiled, ops = np.array(seconds[1:]).T.tolist()  # the first round wakes threads
        yield {"case": [B, T, context], "threads": threads, "compiled": compiled, "ops": ops}


def time_pass(model: Any, B: int, T: int, context: int) -> float:
    """Return the seconds of one pass for T new tokens of each of B sequences."""
    cache = KVCache(model.config, model.backend, B, context + T)
    for length in [context, T] if context else [T]:
        ids = np.array(random_ids(model.config, B, length))
        positions = cache.extend([length] * B)
        if length == T:
            time.sleep(PAUSE)
        start = time.perf_counter()
        model.gpt2.forward(model.backend.asarray(ids), positions, cache, last_only=True)
        seconds = time.perf_counter() - start
    return seconds


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with medians, their ratio, and whether the compiled pass is slower."""
    (low, ours, high), (other_low, ops, other_high) = (
        np.percentile(record[name], [25, 50, 75]) for name in ("compiled", "ops")
    )
    spread = (high - low + other_high - other_low) / 2
    return record | {"ours": ours, "others": ops, "slower": bool(ours > ops + spread)}


COLUMNS = (
    Column("size", lambda r: r["size"], right=False),
    Column("threads", lambda r: str(r["threads"])),
    Column("sequences × tokens", lambda r: f"{r['case'][0]} × {r['case'][1]}"),
    Column("compiled", lambda r: f"{1e3 * r['ours']:.1f} ms"),
    Column("op by op", lambda r: f"{1e3 * r['others']:.1f} ms"),
    Column("ratio", lambda r: ratio(r["ours"] / r["others"])),
    Column("", lambda r: "slower" if r["slower"] else "", right=False),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and a line of JSON; return 1 if the compiled pass is slower once."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["124M", "355M"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: 7)")
    parser.add_argument("--isa", choices=tuple(ISAS), help="restrict the instructions")
    parser.add_argument("--work", type=Path, help="folder that keeps the random models")
    args = parser.parse_args(arguments)
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for size in args.sizes:
            source = find_source(RANDOM + size, work)
            write_source(source)
            for threads in args.threads:
                # BLAS has its threads from the environment, hence a process for each number.
                env = {"OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
                options = {"folder": str(source.path), "threads": threads, "cases": CASES}
                with Worker(env=env | ISAS.get(args.isa, {})) as worker:
                    for event in worker.run(
                        f"{MODULE}:measure_cases", rounds=args.rounds + 1, **options
                    ):
                        records.append(summarize(event | {"size": size}))
                        print(f"{size}, {threads} threads: {event['case']}", file=sys.stderr)
    about = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "instructions": NAMES[args.isa] if args.isa else instruction_set(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(f"{about['cpu']}, {about['instructions']}, {about['date']}\n")
    print(markdown(records, COLUMNS))
    print()
    print(json.dumps(about | {"records": records}))
    return int(any(record["slower"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
