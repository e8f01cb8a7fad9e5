"""Run the jobs of the GPU benchmark, each in a worker, and write their results.

python -m benchmarks.gpu --out results --minutes 8
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from benchmarks.gpu.jobs import Job, plan
from benchmarks.gpu.report import render_tables
from gptx.bench.worker import Event, Worker
from gptx.errors import GptxError

MIN_JOB_SECONDS = 10.0  # a job with less time does not start
GRACE_SECONDS = 8.0  # from the end of a job's time to its kill


def main() -> None:
    """Parse the command line, run the jobs, and exit with 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check the CUDA backend on this GPU, and measure it beside PyTorch.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-results"),
        help="folder for gpu.jsonl (results), gpu.md (tables) and gpu.log (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time for all jobs (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="JOB", help="run the jobs whose names begin with one of these"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run every kind of job on the CPU, in minutes"
    )
    parser.add_argument("--list", action="store_true", help="list the jobs and exit")
    parser.add_argument(
        "--tables", nargs="+", type=Path, metavar="FILE", help="print the tables of earlier runs"
    )
    args = parser.parse_args()
    jobs = plan(args.dry_run)
    if args.only:
        jobs = [job for job in jobs if job.name.startswith(tuple(args.only))]
        if not jobs:
            parser.error(f"--only {' '.join(args.only)} matches no job: see --list")
    if args.list:
        print("\n".join(f"{job.seconds:4.0f} s  {job.name}" for job in jobs))
    elif args.tables:
        lines = [line for path in args.tables for line in path.open(encoding="utf-8")]
        print(render_tables(map(json.loads, lines)))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
        sys.exit(run_jobs(jobs, args.out, time.time() + 60 * args.minutes))


def run_jobs(jobs: Sequence[Job], out: Path, until: float) -> int:
    """Run jobs until the time ends; return 1 if a check failed.

    Each result is written to `gpu.jsonl` at once, and the tables also after an exception.
    """
    out.mkdir(parents=True, exist_ok=True)
    records: list[Event] = []
    skipped = []
    try:
        with (
            (out / "gpu.jsonl").open("a", encoding="utf-8") as results,
            (out / "gpu.log").open("a", encoding="utf-8") as log,
            tempfile.TemporaryDirectory(prefix="gptx-gpu-") as scratch,
        ):
            for job in jobs:
                seconds = min(job.seconds, until - time.time() - GRACE_SECONDS)
                if seconds < MIN_JOB_SECONDS:
                    skipped.append(job.name)
                    continue
                for record in run_job(job, seconds, log, scratch):
                    records.append(record)
                    print(json.dumps(record, ensure_ascii=False), file=results, flush=True)
                    print(summarize(record), file=sys.stderr, flush=True)
    finally:
        if skipped:
            print(f"no time for: {', '.join(skipped)}", file=sys.stderr)
        text = render_tables(records)
        print(text)
        (out / "gpu.md").write_text(text + "\n", encoding="utf-8")
    return int(any(record.get("ok") is False for record in records))


def run_job(job: Job, seconds: float, log: TextIO, scratch: str) -> Iterator[Event]:
    """Yield the records of a job, and a note if it failed or took too long.

    Parameters
    ----------
    scratch
        Folder for temporary files: later jobs use the models that earlier ones have written.
    """
    print(f"--- {job.name}", file=log, flush=True)
    start = time.time()
    env = {"TMPDIR": scratch, "TORCH_LOGS": "perf_hints"}  # reasons for a missing CUDA graph
    failure = ""
    with Worker(log=log, env=env) as worker:
        timer = threading.Timer(seconds + GRACE_SECONDS, worker.kill)
        timer.start()
        try:
            for record in worker.run(job.task, until=start + seconds, **job.arguments):
                yield {"job": job.name, **record}
        except GptxError as error:
            failure = str(error)
        finally:
            timer.cancel()
    spent = time.time() - start
    if failure:
        if spent > seconds + GRACE_SECONDS:
            failure = "killed: it took too long"
        text = f"{failure} after {spent:.0f} s, see gpu.log"
        yield {"job": job.name, "section": "note", "text": text}
    yield {"job": job.name, "section": "done", "seconds": round(spent, 1)}


def summarize(record: Event) -> str:
    """Format a record as a line for the terminal."""
    shown = {
        key: value
        for key, value in record.items()
        if not isinstance(value, list | dict) and key not in ("section", "job", "date")
    }
    text = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in shown.items()
        if value not in (None, "")
    )
    return f"[{record['job']}] {record['section']}: {text}"
