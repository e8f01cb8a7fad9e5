"""Measure conversions of 124M to each format and back, beside a plain copy of the file.

    python -m benchmarks.conversions [--model FOLDER] [--rounds 3] [--work DIR]

Without a model, the weights are random, in float32. A copy ends when it is on the disk (fsync), as
a file of `gptx convert` does. Each round copies, then converts to all formats, in one process. The
first round, with imports, is discarded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptx.bench.machine import cpu_name
from gptx.bench.sources import write_random_model
from gptx.bench.tables import NOTHING, Column, markdown
from gptx.config import GPT2Config
from gptx.conversions import FORMATS, convert

ONE_ROUND = ("json",)  # text: slow

Samples = dict[str, dict[str, list[float]]]  # format -> "to" or "back" -> seconds


def copy(source: Path, destination: Path) -> None:
    """Copy a file to the disk."""
    shutil.copyfile(source, destination)
    with open(destination, "rb+") as file:
        os.fsync(file.fileno())


def measure(model: Path, work: Path, rounds: int) -> Samples:
    """Return the seconds of each round: of copies, and to each format and back."""
    config = model / "config.json"
    converted, restored = work / "converted", work / "restored"
    actions: dict[str, dict[str, Callable[[], Any]]] = {
        "copy": {"to": partial(copy, model / "model.safetensors", converted)}
    }
    for name, row in FORMATS.items():
        if row.writes:
            actions[name] = {"to": partial(convert, model, converted, name)}
        if row.writes and row.reads:
            actions[name]["back"] = partial(
                convert, converted, restored, "safetensors", config=config
            )
    samples: Samples = {name: {way: [] for way in ways} for name, ways in actions.items()}
    for turn in range(rounds + 1):
        for name, ways in actions.items():
            if name in ONE_ROUND and turn != 1:
                continue
            print(f"round {turn} of {rounds}: {name}", file=sys.stderr)
            for way, action in ways.items():
                start = time.perf_counter()
                action()
                if turn:
                    samples[name][way].append(time.perf_counter() - start)
            for path in (converted, restored):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(True)
    return samples


def render_table(samples: Samples) -> str:
    """Render a row for each format: medians, ranges, and ratios to a copy."""
    copied = float(np.median(samples["copy"]["to"]))
    columns = [Column("format", lambda r: r["format"], right=False)]
    for way, header in (("to", "to it"), ("back", "back")):

        def column(header: str, text: Callable[[list[float]], str], way: str = way) -> Column:
            return Column(header, lambda r: text(r[way]) if r.get(way) else NOTHING)

        columns += [
            column(header, lambda values: f"{np.median(values):.2f} s"),
            column("range", lambda values: f"{min(values):.2f}–{max(values):.2f}"),
            column("× copy", lambda values: f"{np.median(values) / copied:.1f}"),
        ]
    return markdown([{"format": name, **ways} for name, ways in samples.items()], columns)


def main() -> None:
    """Measure, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversions", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--model", type=Path, help="folder with safetensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder to write to (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        model = args.model or write_random_model(work / "model", GPT2Config.of_size("124M"))
        samples = measure(model, work, args.rounds)
    print(render_table(samples))
    about = {"date": str(datetime.date.today()), "cpu": cpu_name(), "rounds": args.rounds}
    print("\n" + json.dumps(about | {"seconds": samples}))


if __name__ == "__main__":
    main()
