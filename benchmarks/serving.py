"""Measure servers with the same weights under the same load, each in turn.

    pip install '.[fast,serve]' 'llama-cpp-python[server]' mlx-lm 'transformers[serving]'
    LLAMA_SERVER=/tmp/llama-server python -m benchmarks.serving --threads 2 --work /tmp/models

The clients of a run send streamed completions of ragged lengths, half of which begin with a shared
prefix, after exponential pauses; each has sent some before. They run on the same cores.
`LLAMA_SERVER` names llama.cpp's own server; without it, that of llama-cpp-python runs, which
answers one request at a time. A server that is not installed is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.engine_process import LeftOut
from benchmarks.goals import Goal, goals_table
from benchmarks.instruction_sets import NAMES, instruction_set
from benchmarks.serving_load import (
    Job,
    Target,
    Traffic,
    draw_text,
    run_beside_long,
    run_clients,
    summarize,
)
from benchmarks.serving_peers import PRECISIONS, TABLE, server_class
from benchmarks.serving_peers.base import Server
from gptx.bench.machine import cpu_name
from gptx.bench.sources import RANDOM, find_source, write_source
from gptx.bench.tables import NOTHING, Column, duration, markdown
from gptx.config import SIZES, GPT2Config
from gptx.embedded import EMBEDDED
from gptx.generation.found_model import find_model
from gptx.server.replicas.upstream import Broken, Unreachable
from gptx.tokenization.protocol import Tokenizer

LONG_TOKENS, LONG_OUTPUT = 900, 4
LONG_CLIENTS = 4  # beside a long prompt
WARM_UP_REQUESTS = 4  # of each client
# Throughput of 8 clients in int8: relative to llama.cpp, and to one client.
THROUGHPUT_LIMITS = {"AVX2": (1.25, 2.0)}
WIDE_LIMITS = (1.5, 3.0)  # with VNNI or AMX


@dataclass
class Run:
    """All figures of one run.

    Attributes
    ----------
    about
        Model, threads, processor, date.
    records
        One for each server and load: "server", "clients" or "beside" (the tokens of the long
        prompt, 0 for none), and the figures of `summarize`.
    """

    about: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    def find(self, server: str, **load: int) -> dict[str, Any] | None:
        """Return the record of a server under a load; None if it was not measured."""
        for record in self.records:
            if record["server"] == server and load.items() <= record.items():
                return record
        return None

    def rate(self, server: str, clients: int) -> float | None:
        """Return the tokens per second of a server; None if they were not measured."""
        record = self.find(server, clients=clients)
        return None if record is None else float(record["tokens_per_second"])

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for one line of JSON."""
        goals = [vars(goal) | {"verdict": goal.verdict} for goal in list_goals(self)]
        return self.about | {"records": self.records, "goals": goals}


def list_goals(run: Run) -> list[Goal]:
    """Return the goals of gptx; a limit depends on the processor."""
    limits = THROUGHPUT_LIMITS.get(run.about["instructions"], WIDE_LIMITS)
    eight, one = run.rate("gptx int8", 8), run.rate("gptx int8", 1)
    theirs = run.rate("llama.cpp Q8_0", 8)
    goals = [
        Goal("8 clients int8 / llama.cpp Q8_0", "≥", limits[0], _divided(eight, theirs)),
        Goal("8 clients int8 / 1 client", "≥", limits[1], _divided(eight, one)),
    ]
    for precision in PRECISIONS:
        with_long = run.find(f"gptx {precision}", beside=LONG_TOKENS)
        without = run.find(f"gptx {precision}", beside=0)
        delay = None
        if with_long is not None and without is not None:
            later = with_long["first"]["p95"] - without["first"]["p95"]
            # Beside the long prompt, a chunk of it is between two tokens.
            allowed = with_long["between"]["p50"] + without["between"]["p50"]
            delay = max(0.0, later) / allowed
        goals.append(
            Goal(f"delay by a long prompt, {precision} / 2 decode steps, 1 chunk", "≤", 1.0, delay)
        )
    return goals


def _divided(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None else None


def results_table(run: Run) -> str:
    """Render the records of one kind of load."""
    loads = [record for record in run.records if "clients" in record]
    beside = [record for record in run.records if "beside" in record]
    parts = []
    for rows, column in (
        (loads, Column("clients", lambda r: str(r["clients"]))),
        (beside, Column("long prompt", lambda r: str(r["beside"] or NOTHING))),
    ):
        if rows:
            parts.append(markdown(rows, [SERVER, column, *FIGURES]))
    return "\n\n".join(parts)


def _percentile(part: str, name: str) -> Column:
    title = "first" if part == "first" else "between"
    return Column(f"{title} {name}", lambda r: duration(r[part][name]))


SERVER = Column("server", lambda r: r["server"], right=False)
FIGURES = (
    Column("req/s", lambda r: f"{r['requests_per_second']:.2f}"),
    Column("tokens/s", lambda r: f"{r['tokens_per_second']:.1f}"),
    *(_percentile(part, name) for part in ("first", "between") for name in ("p50", "p95", "p99")),
)


def main() -> None:
    """Parse the command line, measure, and print the tables and one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Measure servers with the same weights under the same load, each in turn.",
    )
    parser.add_argument(
        "--size", default="124M", choices=tuple(SIZES), help="random weights of this size"
    )
    parser.add_argument("--model", type=Path, help="folder of a model, instead of --size")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 4, 8, 16], help="numbers of clients"
    )
    parser.add_argument(
        "--requests", type=int, default=6, help="requests of each client (default: 6)"
    )
    parser.add_argument(
        "--pause", type=float, default=0.05, help="mean seconds before a request (default: 0.05)"
    )
    parser.add_argument("--no-long", action="store_true", help="no runs beside a long prompt")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS], help="of the weights"
    )
    parser.add_argument(
        "--servers", nargs="+", help="servers whose names begin with one of these (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=1, help="times that each server is measured")
    parser.add_argument("--work", type=Path, help="folder that keeps converted models")
    args = parser.parse_args()
    prefixes = tuple(prefix.lower() for prefix in args.servers or ("",))
    names = [
        name
        for name, row in TABLE.items()
        if row.precision in args.precisions and name.lower().startswith(prefixes)
    ]
    if not names:
        parser.error(f"the options leave out every server, expected some of {', '.join(TABLE)}")
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        folder = args.model or prepare_model(args.size, work)
        run = measure(folder, work, names, args)
    print(results_table(run))
    print()
    print(goals_table(list_goals(run)))
    print()
    print(json.dumps(run.to_dict()))


def prepare_model(size: str, work: Path) -> Path:
    """Return a folder with random weights and a tokenizer of the full vocabulary."""
    source = find_source(f"{RANDOM}{size}", work / "served")
    source.path.parent.mkdir(exist_ok=True)
    write_source(source)
    write_tokenizer(source.path, source.config)
    return source.path


def write_tokenizer(folder: Path, config: GPT2Config) -> None:
    """Write the embedded tokenizer with unused tokens, up to a vocabulary of V.

    An unused token is a word of ASCII letters, so each generated token has a text of its own.
    """
    tokenizer = json.loads((EMBEDDED["shakespeare"] / "tokenizer.json").read_text("utf-8"))
    vocab, end = tokenizer["model"]["vocab"], config.vocab_size - 1
    [added] = tokenizer["added_tokens"]
    vocab["unused0"] = vocab.pop(added["content"])
    for id in range(len(vocab), end):
        vocab[f"unused{id}"] = id
    vocab[added["content"]] = added["id"] = end
    merges = [pair if isinstance(pair, str) else " ".join(pair)
              for pair in tokenizer["model"]["merges"]]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.n_positions})
    )


def measure(folder: Path, work: Path, names: Sequence[str], args: argparse.Namespace) -> Run:
    """Start each server in turn, and measure it under each load; a server that fails is dropped."""
    converted = work / f"{folder.resolve().name}-served"
    converted.mkdir(exist_ok=True)
    tokenizer = find_model(str(folder)).info.tokenizer
    run = Run(
        {
            "model": folder.name,
            "threads": args.threads,
            "cpu": cpu_name(),
            "instructions": NAMES.get(os.environ.get("GPTX_ISA", ""), instruction_set()),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "rounds": args.rounds,
        }
    )
    for turn in range(args.rounds):
        for name in names:
            print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr)
            try:
                server = start(name, folder, converted, args.threads, max(args.clients))
            except LeftOut as error:
                print(error, file=sys.stderr)
                continue
            try:
                run.records += measure_server(name, server, tokenizer, args, turn)
            except* (RuntimeError, OSError, Broken, Unreachable) as errors:
                print(f"{name} is left out: {errors.exceptions[0]}", file=sys.stderr)
            finally:
                server.close()
    return run


def start(name: str, folder: Path, work: Path, threads: int, slots: int) -> Server:
    """Start a server and wait until it answers."""
    server: Server = server_class(name)(name, folder, work, threads, slots, **TABLE[name].options)
    return server


def measure_server(
    name: str, server: Server, tokenizer: Tokenizer, args: argparse.Namespace, seed: int
) -> list[dict[str, Any]]:
    """Return the records of one server."""
    target, traffic = Target(server.port, server.model, server.extra), Traffic()
    # As after hours of service: kernels are compiled, and all memory of caches has been used.
    most = max(args.clients)
    warm_up = traffic.draw(tokenizer, WARM_UP_REQUESTS * most, seed + 1000)
    asyncio.run(run_clients(target, warm_up, most, 0, seed))
    records = []
    for n in args.clients:
        jobs = traffic.draw(tokenizer, n * args.requests, seed)
        timings, seconds = asyncio.run(run_clients(target, jobs, n, args.pause, seed))
        records.append({"server": name, "clients": n, **summarize(timings, seconds)})
    if not args.no_long:
        short = Traffic(prompt_tokens=(8, 32), output_tokens=(16, 32), shared=0.0)
        jobs = short.draw(tokenizer, LONG_CLIENTS * args.requests, seed)
        prompt = draw_text(tokenizer, LONG_TOKENS, np.random.default_rng(seed))
        for beside in (0, LONG_TOKENS):
            long = Job(prompt, LONG_OUTPUT) if beside else None
            began = time.perf_counter()
            timings = asyncio.run(
                run_beside_long(target, jobs, long, LONG_CLIENTS, args.pause, seed)
            )
            figures = summarize(timings, time.perf_counter() - began)
            records.append({"server": name, "beside": beside, **figures})
    return records


if __name__ == "__main__":
    main()
