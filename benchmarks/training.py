"""Measure training steps of the same model and batch in gptx and in other engines, in turns.

    pip install '.[fast]' torch transformers
    LLM_C=/tmp/llm.c python -m benchmarks.training --threads 2 --work /tmp/models

A step is one update: loss, gradients, their norm, AdamW. An engine has a process of its own for
each workload, so its peak memory is that of the workload. Two updates before the rounds check that
all engines have the same loss, and that it falls. An engine that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.engine_process import THREAD_VARIABLES, LeftOut
from benchmarks.compare.run import pause
from benchmarks.goals import Goal, goals_table
from benchmarks.instruction_sets import ISAS, NAMES, instruction_set
from benchmarks.training_peers import TABLE
from gptx.bench.machine import cpu_name
from gptx.bench.sources import random_ids, write_random_model
from gptx.bench.tables import Column, markdown, megabytes, ratio
from gptx.bench.worker import Worker
from gptx.config import GPT2Config
from gptx.errors import GptxError

WORKER = "benchmarks.training_peers.base"
REFERENCE = "PyTorch eager"
MAX_LOSS_DIFFERENCE = 1e-4  # of the loss
CHECK_STEPS = 2

MODELS = {
    "124M": GPT2Config.of_size("124M"),
    # As in nanoGPT's recipe for the characters of tiny Shakespeare.
    "small": GPT2Config(
        vocab_size=65,
        n_positions=256,
        n_embd=384,
        n_layer=6,
        n_head=6,
        bos_token_id=None,
        eos_token_id=None,
    ),
}


@dataclass(frozen=True)
class Workload:
    """A model and a batch of B sequences of T tokens; `steps` are timed in each round."""

    model: str
    B: int
    T: int
    steps: int

    @property
    def name(self) -> str:
        """Name on the command line, "124M-4x64" for one."""
        return f"{self.model}-{self.B}x{self.T}"


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("124M", 4, 64, steps=1),
        Workload("124M", 4, 256, steps=1),
        Workload("124M", 1, 1024, steps=1),
        Workload("small", 12, 64, steps=5),
        Workload("small", 4, 256, steps=5),
    )
}


@dataclass
class Run:
    """All figures of one run.

    Attributes
    ----------
    about
        Threads, processor, date.
    records
        One for each workload and engine: "workload", "engine", "version", "losses" of the check,
        "seconds" of a step in each round, and "peak_memory" in bytes.
    """

    about: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    def find(self, workload: str, engine: str) -> dict[str, Any] | None:
        """Return the record of an engine; None if it was not measured."""
        for record in self.records:
            if (record["workload"], record["engine"]) == (workload, engine) and record["seconds"]:
                return record
        return None

    def compare(self, workload: str, key: str) -> float | None:
        """Return the "seconds" (median) or "peak_memory" of gptx, relative to the reference."""
        ours, theirs = self.find(workload, "gptx"), self.find(workload, REFERENCE)
        if ours is None or theirs is None:
            return None
        return float(np.median(ours[key]) / np.median(theirs[key]))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for one line of JSON."""
        goals = [vars(goal) | {"verdict": goal.verdict} for goal in list_goals(self)]
        return self.about | {"records": self.records, "goals": goals}


def list_goals(run: Run) -> list[Goal]:
    """Return the goals of gptx for the measured workloads; a limit depends on the processor."""
    limit = 0.75 if run.about["instructions"] == "AVX2" else 0.95
    goals = []
    measured = {record["workload"] for record in run.records}
    for name, workload in WORKLOADS.items():
        if name not in measured:
            continue
        seconds = run.compare(name, "seconds")
        if workload.model == "small":
            goals.append(Goal(f"step of {name} / {REFERENCE}", "≤", 0.75, seconds))
        elif workload.T < 1024:
            memory = run.compare(name, "peak_memory")
            goals.append(Goal(f"step of {name} / {REFERENCE}", "≤", limit, seconds))
            goals.append(Goal(f"peak memory of {name} / {REFERENCE}", "≤", 0.8, memory))
    return goals


class EngineProcess:
    """An engine with a model and a batch in a worker.

    Raises
    ------
    LeftOut
        The engine is not installed, or fails.
    """

    def __init__(
        self, name: str, folder: Path, tokens: list[list[int]], args: argparse.Namespace, log: Path
    ) -> None:
        self.name, self._log = name, log
        with log.open("w") as file:
            env = dict.fromkeys(THREAD_VARIABLES, str(args.threads)) | ISAS.get(args.isa, {})
            self._worker = Worker(log=file, env=env)
        place = {"name": name, "folder": str(folder.resolve())}
        self.about = self._ask("load_engine", **place, threads=args.threads, tokens=tokens)

    def run_steps(self, n: int) -> dict[str, Any]:
        """Return losses, seconds and peak memory of n updates."""
        return self._ask("run_steps", n=n)

    def _ask(self, task: str, **arguments: Any) -> dict[str, Any]:
        try:
            [answer] = self._worker.run(f"{WORKER}:{task}", **arguments)
        except GptxError as error:
            self.close()
            reason = str(error)
            if reason.startswith(("ModuleNotFoundError: ", "ImportError: ")):
                reason = f"{reason.partition(': ')[2]}: pip install {TABLE[self.name].needs}"
            raise LeftOut(f"{self.name} is left out: {reason}, see {self._log}") from None
        return answer

    def close(self) -> None:
        """End the process."""
        self._worker.close()


def check_losses(name: str, losses: Sequence[float], expected: float) -> None:
    """Check the first losses of an engine.

    Raises
    ------
    LeftOut
        The first loss is not the expected one, or updates do not make it smaller.
    """
    if not abs(losses[0] - expected) <= MAX_LOSS_DIFFERENCE * expected:
        raise LeftOut(f"{name} is left out: its loss is {losses[0]:.5f}, not {expected:.5f}")
    if not losses[-1] < losses[0]:
        raise LeftOut(f"{name} is left out: its loss does not fall ({losses[0]} to {losses[-1]})")


def measure(
    run: Run, workload: Workload, folder: Path, names: Sequence[str], args: argparse.Namespace
) -> None:
    """Check and time the engines on a workload, in turns; an engine that fails is dropped."""
    tokens = random_ids(MODELS[workload.model], workload.B, workload.T + 1)
    engines: dict[str, EngineProcess] = {}
    records: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        print(f"{workload.name}: losses of {', '.join(names)}", file=sys.stderr)
        for name in names:
            log = folder.with_name(f"{name}.log")
            try:
                engine = EngineProcess(name, folder, tokens, args, log)
                stack.callback(engine.close)
                losses = engine.run_steps(CHECK_STEPS)["losses"]
                first = next(iter(records.values()), {"losses": losses})
                check_losses(name, losses, first["losses"][0])
            except LeftOut as error:
                print(error, file=sys.stderr)
                continue
            engines[name] = engine
            records[name] = {"workload": workload.name, "engine": name, **engine.about}
            records[name] |= {"losses": losses, "seconds": []}
        for turn in range(args.rounds):
            for name, engine in list(engines.items()):
                run.about["pauses"] += 1
                run.about["busy_pauses"] += pause(args.pause)
                try:
                    found = engine.run_steps(workload.steps)
                except LeftOut as error:
                    print(error, file=sys.stderr)
                    del engines[name]
                    continue
                seconds = float(np.median(found["seconds"]))
                print(f"{turn + 1} of {args.rounds}, {name}: {seconds:.3f} s", file=sys.stderr)
                records[name]["seconds"].append(seconds)
                records[name]["peak_memory"] = found["peak_memory"]
    run.records += records.values()


COLUMNS = (
    Column("workload", lambda r: r["workload"], right=False),
    Column("engine", lambda r: r["engine"], right=False),
    Column("a step", lambda r: f"{r['quartiles'][1]:,.0f} ms"),
    Column("quartiles", lambda r: f"{r['quartiles'][0]:,.0f}–{r['quartiles'][2]:,.0f}"),
    Column("tokens/s", lambda r: f"{r['rate']:,.0f}"),
    Column("peak memory", lambda r: megabytes(r["peak_memory"])),
    Column(f"time / {REFERENCE}", lambda r: ratio(r["time_ratio"])),
    Column("memory", lambda r: ratio(r["memory_ratio"])),
)


def results_table(run: Run) -> str:
    """Render a row for each workload and engine, and the versions of the engines."""
    versions = dict.fromkeys(f"{r['engine']}: {r['version']}" for r in run.records)
    return "\n".join([markdown(list(_rows(run)), COLUMNS), "", *versions])


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    for record in run.records:
        if not record["seconds"]:
            continue
        workload, seconds = WORKLOADS[record["workload"]], np.median(record["seconds"])
        peer = run.find(record["workload"], REFERENCE)
        yield record | {
            "quartiles": 1e3 * np.percentile(record["seconds"], [25, 50, 75]),
            "rate": workload.B * workload.T / seconds,
            "time_ratio": seconds / np.median(peer["seconds"]) if peer else None,
            "memory_ratio": record["peak_memory"] / peer["peak_memory"] if peer else None,
        }


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=[*WORKLOADS])
    parser.add_argument("--engines", nargs="+", choices=tuple(TABLE), default=[*TABLE])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: 7)")
    parser.add_argument(
        "--pause", type=float, default=0.3, help="seconds before each measurement (default: 0.3)"
    )
    parser.add_argument("--isa", choices=tuple(ISAS), help="restrict engines to instructions")
    parser.add_argument("--work", type=Path, help="folder that keeps the random models")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables and one line of JSON."""
    args = parse_options(arguments)
    about = {
        "threads": args.threads,
        "cpu": cpu_name(),
        "instructions": NAMES[args.isa] if args.isa else instruction_set(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    run = Run(about | {"pauses": 0, "busy_pauses": 0})
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for name in args.workloads:
            workload = WORKLOADS[name]
            folder = work / f"random-{workload.model}"
            if not folder.exists():
                write_random_model(folder, MODELS[workload.model])
            measure(run, workload, folder, args.engines, args)
    if run.about["busy_pauses"] > run.about["pauses"] / 50:
        print(
            f"other programs were running in {run.about['busy_pauses']} of {run.about['pauses']} "
            "pauses: run this again on a quiet machine",
            file=sys.stderr,
        )
    print(f"{about['cpu']}, {about['instructions']}, {args.threads} threads, {about['date']}\n")
    print(results_table(run))
    print()
    print(goals_table(list_goals(run)))
    print()
    print(json.dumps(run.to_dict()))


if __name__ == "__main__":
    main()
