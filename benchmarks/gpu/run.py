"""Run this first when there is a GPU: is gptx right on it, and how fast beside PyTorch?

    python benchmarks/gpu.py --out results --minutes 8

One call that ends in time. Jobs (`gpu_plan.py`) come in the order of their importance, each in a
process of its own: what breaks one, or takes it too long, leaves the others alone. Every result is
a line of `gpu.jsonl` as soon as it is there; the tables at the end, also of a run that was ended
from outside, go to `gpu.md`, and what libraries print to `gpu.log`. `--list` names the jobs,
`--only` takes some of them, for instance those for which there was no time:

    python benchmarks/gpu.py --out more --only "124M int4" mlx
    python benchmarks/gpu.py --tables results/gpu.jsonl more/gpu.jsonl

It needs nothing but a checkout, and what `gpu_device.NEEDED` lists; nothing is downloaded.
`--dry-run` goes through all of it on the processor, with NumPy for CuPy and the embedded model.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHORTEST = 10.0  # seconds; a job with less than that is not begun
GRACE = 8.0  # after its time, a job is ended

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", metavar="JOB", help="those whose names begin so")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--list", action="store_true", help="name the jobs, and do none")
    parser.add_argument("--tables", nargs="+", type=Path, metavar="FILE", help="of earlier runs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_importable(Path(folder))
        from benchmarks.gpu.plan import plan

        jobs = plan(args.dry_run)
        if args.only:
            jobs = [job for job in jobs if job.name.startswith(tuple(args.only))]
            if not jobs:
                parser.error(f"--only {' '.join(args.only)}: see --list")
        if args.list:
            print("\n".join(f"{job.seconds:4.0f} s  {job.name}" for job in jobs))
        elif args.tables:
            print_tables(
                [json.loads(line) for path in args.tables for line in path.open(encoding="utf-8")]
            )
        else:
            sys.exit(run(jobs, args.out, time.time() + 60 * args.minutes))


def make_importable(folder: Path) -> None:
    """Let this process and its children import the checkout as if it were installed."""
    package = folder / "gptx"
    package.mkdir()
    for path in (*(ROOT / "gptx").iterdir(), ROOT / "backends", ROOT / "conversions"):
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ.setdefault("TORCH_LOGS", "perf_hints")  # says why it makes no graph of a step


def run(jobs: list[Any], out: Path, until: float) -> int:
    """Do the jobs while there is time; 1 if a check failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    out.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    skipped = []
    try:
        with (
            (out / "gpu.jsonl").open("a", encoding="utf-8") as file,
            (out / "gpu.log").open("a", encoding="utf-8") as log,
        ):
            for job in jobs:
                seconds = min(job.seconds, until - time.time() - GRACE)
                if seconds < SHORTEST:
                    skipped.append(job.name)
                    continue
                for record in records_of(job, seconds, log):
                    records.append(record)
                    print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
                    print(short(record), file=sys.stderr, flush=True)
    finally:
        if skipped:
            print(f"no time for: {', '.join(skipped)}", file=sys.stderr)
        text = print_tables(records)
        (out / "gpu.md").write_text(text + "\n", encoding="utf-8")
    return int(any(record.get("ok") is False for record in records))


def records_of(job: Any, seconds: float, log: Any) -> Iterator[Record]:
    """What a job reports from a process of its own, and how that ended if not well."""
    print(f"--- {job.name}", file=log, flush=True)
    start = time.time()
    with subprocess.Popen(
        command(job, start + seconds),
        stdin=subprocess.PIPE,  # which closes when this process ends, in whatever way
        stdout=subprocess.PIPE,
        stderr=log,
        encoding="utf-8",
        process_group=0,  # so that its own children are ended with it
    ) as process:
        timer = threading.Timer(seconds + GRACE, kill, [process])
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                yield {"job": job.name, **json.loads(line)}
            code = process.wait()
        finally:
            timer.cancel()
            kill(process)
    if code:
        spent = time.time() - start
        how = "was ended: it took too long" if spent > seconds + GRACE else f"ended with {code}"
        text = f"{how} after {spent:.0f} s, see gpu.log"
        yield {"job": job.name, "section": "note", "text": text}
    took = round(time.time() - start, 1)
    yield {"job": job.name, "section": "done", "seconds": took}


def command(job: Any, until: float) -> list[str]:
    """What starts the process of a job."""
    return [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--child",
        json.dumps(asdict(job) | {"until": until}),
    ]


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and those that it started; nothing, if it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def child(job: Record) -> None:
    """Do one job: a line on standard output for each record."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no record
    from benchmarks.gpu.plan import TASKS

    for record in TASKS[job["task"]](job["until"], **job["arguments"]):
        print(json.dumps(record, ensure_ascii=False), file=out, flush=True)


def end_with_parent() -> None:
    """Nobody waits for a job whose standard input was closed."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def short(record: Record) -> str:
    """A record for those who wait."""
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


def print_tables(records: list[Record]) -> str:
    """Print the tables, and return them."""
    from benchmarks.gpu.report import tables

    text = tables(records)
    print(text)
    return text


if __name__ == "__main__":
    main()
