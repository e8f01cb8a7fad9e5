"""How long a conversion takes, beside a plain copy of the file: 124M to each format and back.

    python benchmarks/conversions.py [--model FOLDER] [--rounds 3] [--work DIR]

Without a model, random weights of 124M in float32. A copy is written to the disk before it counts
as done (fsync), as what `gptx convert` writes is. Each round copies, then goes through all formats;
one process does it all, so imports count once, in a first round that is thrown away.
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
from pathlib import Path

import numpy as np

from gptx.bench.machine import cpu_name
from gptx.config import GPT2Config
from gptx.conversions import FORMATS, convert
from gptx.random_weights import random_weights
from tests.support.random_models import write_model

SLOW = ("json",)  # text: it has a table row, but one round is enough


def seconds_of(use: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    use()
    return time.perf_counter() - start


def copy(source: Path, destination: Path) -> None:
    """Copy a file and have the disk hold it."""
    shutil.copyfile(source, destination)
    with open(destination, "rb+") as file:
        os.fsync(file.fileno())


def measure(model: Path, work: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round: of copies, and to each format and back."""
    config = model / "config.json"
    ways: dict[str, dict[str, list[float]]] = {"copy": {"to": []}}
    ways |= {name: {"to": [], "back": []} for name, row in FORMATS.items() if row.writes}
    for turn in range(rounds + 1):
        for name, found in ways.items():
            if name in SLOW and turn != 1:
                continue
            print(f"round {turn} of {rounds}: {name}", file=sys.stderr)
            there, back = work / "there", work / "back"
            if name == "copy":
                source = model / "model.safetensors"
                seconds = {"to": seconds_of(lambda s=source, d=there: copy(s, d))}
            else:
                seconds = {"to": seconds_of(lambda n=name, d=there: convert(model, d, n))}
                if FORMATS[name].reads:
                    seconds["back"] = seconds_of(
                        lambda s=there, d=back: convert(s, d, "safetensors", config=config)
                    )
            if turn:  # the first is for imports and caches
                for way, value in seconds.items():
                    found[way].append(value)
            for path in (there, back):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(True)
    return ways


def table(ways: dict[str, dict[str, list[float]]]) -> str:
    """One row a format: medians, their range, and the ratios to a copy."""
    copied = float(np.median(ways["copy"]["to"]))
    lines = ["| format | to it | range | × copy | back | range | × copy |"]
    lines.append("|---|---:|---|---:|---:|---|---:|")
    for name, found in ways.items():
        cells = []
        for way in ("to", "back"):
            values = found.get(way) or []
            if values:
                middle = float(np.median(values))
                spread = f"{min(values):.2f}–{max(values):.2f}"
                cells += [f"{middle:.2f} s", spread, f"{middle / copied:.1f}"]
            else:
                cells += ["", "", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a folder with safetensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        model = args.model
        if model is None:
            config = GPT2Config.of_size("124M")
            model = write_model(work / "model", config, random_weights(config))
        ways = measure(model, work, args.rounds)
    print(table(ways))
    about = {"date": str(datetime.date.today()), "cpu": cpu_name(), "rounds": args.rounds}
    print("\n" + json.dumps(about | {"seconds": ways}))


if __name__ == "__main__":
    main()
