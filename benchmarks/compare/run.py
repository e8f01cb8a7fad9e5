"""Measure the same weights in every engine that is installed, each in its own process.

python -m benchmarks.compare --size 124M --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.engine_process import EngineProcess, LeftOut
from benchmarks.compare.peers import PRECISIONS, REFERENCE, TABLE
from benchmarks.compare.report import Run, list_goals, results_table
from benchmarks.compare.workloads import WORKLOADS, letter_prompts
from benchmarks.goals import goals_table
from benchmarks.instruction_sets import ISAS, NAMES, instruction_set
from gptx.bench.machine import cpu_name
from gptx.bench.sources import RANDOM, find_source, write_source
from gptx.bench.worker import run_task
from gptx.config import SIZES, GPT2Config

# Largest error of the logits: root mean square, relative to that of the reference. llama.cpp has
# float16 keys and values at any precision; 4 bits change the model most.
LOGITS_LIMITS = {"float32": 0.002, "16 bits": 0.03, "int8": 0.05, "int4": 0.4}

# Settings that must be those of OpenAI's models.
SETTINGS = (
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
    "quantization",
)
BANDWIDTH_TASK = "gptx.bench.machine:measure_bandwidth"
BUSY_SHARE = 0.2  # of a core, in a pause


def main() -> None:
    """Parse the command line, measure, and print the tables and one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Measure the same weights in every engine that is installed.",
    )
    parser.add_argument(
        "--size", default="124M", choices=tuple(SIZES), help="random weights of this size"
    )
    parser.add_argument("--model", type=Path, help="folder of a model, instead of --size")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: 7)")
    parser.add_argument(
        "--pause", type=float, default=0.3, help="seconds before each measurement (default: 0.3)"
    )
    parser.add_argument(
        "--workloads", nargs="+", choices=tuple(WORKLOADS), default=[*WORKLOADS], help="see README"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS], help="of the weights"
    )
    parser.add_argument(
        "--engines", nargs="+", help="engines whose names begin with one of these (default: all)"
    )
    parser.add_argument(
        "--apart", action="store_true", help="run one precision after the other: less memory"
    )
    parser.add_argument("--isa", choices=tuple(ISAS), help="restrict engines to instructions")
    parser.add_argument("--work", type=Path, help="folder that keeps converted models")
    args = parser.parse_args()
    prefixes = tuple(prefix.lower() for prefix in args.engines or ("",))
    names = [
        name
        for name, row in TABLE.items()
        if row.precision in args.precisions
        and not set(args.workloads) <= set(row.skips)
        and name.lower().startswith(prefixes)
    ]
    if not names:
        parser.error(f"the options leave out every engine, expected some of {', '.join(TABLE)}")
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder, work = prepare_folders(args.model, args.size, work)
        run = compare(folder, work, names, args)
    if run.about["busy_pauses"] > run.about["pauses"] / 50:
        print(
            f"other programs were running in {run.about['busy_pauses']} of {run.about['pauses']} "
            "pauses: run this again on a quiet machine",
            file=sys.stderr,
        )
    print(results_table(run, args.workloads))
    if free := run.unrestricted():
        print(f"\nnot restricted to {NAMES[args.isa]}: {', '.join(free)}")
    print()
    print(goals_table(list_goals(run)))
    print()
    print(json.dumps(run.to_dict()))


def prepare_folders(model: Path | None, size: str, work: Path) -> tuple[Path, Path]:
    """Return the folders of the model and of conversions; write random weights if missing."""
    work.mkdir(parents=True, exist_ok=True)
    if model is None:
        source = find_source(RANDOM + size, work)
        write_source(source)
        model = source.path
    converted = work / f"{model.resolve().name}-converted"
    converted.mkdir(exist_ok=True)
    return model, converted


def compare(folder: Path, work: Path, names: Sequence[str], args: argparse.Namespace) -> Run:
    """Check and time all engines that can be loaded."""
    config = GPT2Config.from_file(folder / "config.json")
    for setting in SETTINGS:
        given, expected = getattr(config, setting), getattr(GPT2Config, setting)
        if given != expected:
            sys.exit(f"{setting} is {given!r}, expected {expected!r}: engines support only that")
    run = Run(
        {
            "model": folder.name,
            "size": size_of(config),
            "threads": args.threads,
            "cpu": cpu_name(),
            "isa": args.isa,
            "instructions": NAMES[args.isa] if args.isa else instruction_set(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "pauses": 0,
            "busy_pauses": 0,
        }
    )
    groups = [[n for n in names if TABLE[n].precision == p] for p in args.precisions]
    with ExitStack() as stack:
        reference = sample(start(REFERENCE, folder, args, work, stack), config)
    for group in groups if args.apart else [names]:
        with ExitStack() as stack:
            engines = {}
            for name in group:
                try:
                    engine = start(name, folder, args, work, stack)
                    check_model(run, name, sample(engine, config), reference)
                    run.engines[name] = engine.about
                    engines[name] = engine
                except LeftOut as error:
                    print(error, file=sys.stderr)
            measure(run, engines, config, args)
    return run


def size_of(config: GPT2Config) -> str | None:
    """Return the name of OpenAI's size with this shape, whatever the vocabulary."""
    shape = (config.n_layer, config.n_head, config.n_embd)
    return next((size for size, row in SIZES.items() if row == shape), None)


def start(
    name: str, folder: Path, args: argparse.Namespace, work: Path, stack: ExitStack
) -> EngineProcess:
    """Start an engine that ends with the stack."""
    engine = EngineProcess(name, folder, args.threads, work, args.isa)
    stack.callback(engine.close)
    return engine


def sample(engine: EngineProcess, config: GPT2Config) -> dict[str, Any]:
    """Return the logits and the greedy tokens of an engine after one prompt."""
    [ids] = letter_prompts(config, 1, 64, seed=1)
    return engine.ask("sample", ids=ids, n_tokens=16)


def check_model(run: Run, name: str, ours: dict[str, Any], reference: dict[str, Any]) -> None:
    """Store the distance of an engine from the reference; raise LeftOut if it is too large."""
    tokens = reference["tokens"]
    if len(ours["tokens"]) != len(tokens):
        raise LeftOut(f"{name} is left out: it made {len(ours['tokens'])} of {len(tokens)} tokens")
    pairs = zip(ours["tokens"], tokens, strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))
    run.agreement[name] = {"same_tokens": same}
    if ours["logits"] is None:
        if same < len(tokens):
            raise LeftOut(f"{name} is left out: token {same} differs from the reference")
        return
    expected = np.array(reference["logits"])
    error = float(np.linalg.norm(ours["logits"] - expected) / np.linalg.norm(expected))
    run.agreement[name]["logits_error"] = round(error, 6)
    if not error <= LOGITS_LIMITS[TABLE[name].precision]:
        raise LeftOut(f"{name} is left out: its logits are off by {error:.1%}")


def measure(
    run: Run, engines: dict[str, EngineProcess], config: GPT2Config, args: argparse.Namespace
) -> None:
    """Time every workload, the engines in turns; an engine that fails is dropped."""
    for turn in range(args.rounds + 1):
        print(f"round {turn} of {args.rounds}", file=sys.stderr)
        pause(args.pause)
        [event] = run_task(BANDWIDTH_TASK, backend="numpy", threads=args.threads)
        run.bandwidth.append(event["bandwidth"])
        for key in args.workloads:
            for name in [name for name in engines if key not in TABLE[name].skips]:
                run.about["pauses"] += 1
                run.about["busy_pauses"] += pause(args.pause)
                try:
                    seconds = WORKLOADS[key].measure(engines[name], config, turn)
                except LeftOut as error:
                    print(error, file=sys.stderr)
                    del engines[name]
                    continue
                if turn:  # the first round fills caches
                    run.seconds.setdefault(key, {}).setdefault(name, []).append(seconds)


def pause(seconds: float) -> bool:
    """Wait until the threads of the last engine stop spinning; return True if programs run then.

    Another program costs more than its share: an engine's threads spin until the last one is done.
    """
    time.sleep(seconds * 2 / 3)
    before = cpu_seconds()
    time.sleep(seconds / 3)
    return cpu_seconds() - before > BUSY_SHARE * seconds / 3


def cpu_seconds() -> float:
    """Return the seconds that all cores have worked since the system started, 0 if unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system = map(int, fields[:3])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")
