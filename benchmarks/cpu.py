"""Measure how close the NumPy backend decodes to the memory bandwidth, and the costs of loading.

    python -m benchmarks.cpu --size 124M --threads 2

The floor of a decode step is the time to read the weights once, at the bandwidth of `gptx bench`.
It is measured in turns with decode steps of gptx's engine and of a plain NumPy loop. Fresh
processes measure import, load and peak memory; the file is in the page cache. The weights are
random, or those of a folder (`--model`, float32).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

import gptx
from benchmarks.compare.peers.plain_numpy import PlainGPT2
from gptx.bench.grid import weights_bytes
from gptx.bench.machine import MIN_READ_BYTES, cpu_name, read_bandwidth
from gptx.bench.setups import GREEDY
from gptx.bench.sources import RANDOM, find_source, random_ids, write_source
from gptx.bench.tables import NOTHING, Column, markdown
from gptx.bench.worker import time_process
from gptx.generation.engine import TokenGenerator

N_STEPS = 16  # decode steps in a measurement
MAX_LOADING_ROUNDS = 7

LOAD = """
import sys, time
import numpy
start = time.perf_counter()
import gptx
imported = time.perf_counter()
import gptx.generation.api
ready = time.perf_counter()
model = gptx.load(sys.argv[1])
loaded = time.perf_counter()
model.generate([464], max_tokens=2, ignore_eos=True)
first = time.perf_counter()
print(imported - start, ready - imported, loaded - ready, first - loaded,
      model.backend.peak_memory())
"""
PARTS = ("import gptx", "import the rest", "load", "first two tokens", "peak memory")

COLUMNS = (
    Column("", lambda r: r["name"], right=False),
    Column("median", lambda r: f"{r['median']:.2f} {r['unit']}"),
    Column("quartiles", lambda r: f"{r['low']:.2f}–{r['high']:.2f}"),
    Column("of reading", lambda r: r["of_reading"]),
)


def main() -> None:
    """Measure, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--size", default="124M", help="random weights of this size")
    parser.add_argument("--model", type=Path, help="folder of a float32 model, instead of --size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", type=int, nargs="+", default=[20, 1000], help="tokens")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = find_source(str(args.model or RANDOM + args.size), Path(scratch), offline=True)
        write_source(source)
        samples = measure_decoding(source.folder, args.threads, args.contexts, args.rounds)
        samples |= measure_loading(source.folder, min(args.rounds, MAX_LOADING_ROUNDS))
    reading = float(np.median(samples["read weights"]))
    print(markdown([summarize(name, values, reading) for name, values in samples.items()], COLUMNS))
    about = {
        "size": args.size,
        "threads": args.threads,
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "gptx": gptx.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(about | {name: [round(x, 7) for x in xs] for name, xs in samples.items()}))


def summarize(name: str, values: list[float], reading: float) -> dict[str, Any]:
    """Return a row: quartiles in ms or MB, and the ratio of a decode step to `reading` seconds."""
    unit, scale = ("MB", 1e-6) if name.endswith("memory") else ("ms", 1e3)
    low, median, high = np.percentile(values, [25, 50, 75])
    of_reading = f"{median / reading:.2f}" if name.startswith("decode") else NOTHING
    quartiles = {"low": low * scale, "median": median * scale, "high": high * scale}
    return {"name": name, "unit": unit, "of_reading": of_reading, **quartiles}


def measure_decoding(
    folder: Path, threads: int, contexts: list[int], rounds: int
) -> dict[str, list[float]]:
    """Return the seconds to read the weights, and of a decode step at each context, in turns."""
    model = gptx.load(folder, threads=threads)
    n_bytes = weights_bytes(model.gpt2)[1]
    measures: dict[str, Callable[[], float]] = {
        "read weights": lambda: n_bytes / read_bandwidth(model.backend, MIN_READ_BYTES)
    }
    for context in contexts:
        measures[f"decode at {context}"] = make_decoder(model, context)
        measures[f"decode at {context}, plain loop"] = make_plain_decoder(model, context, threads)
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if turn:  # the first round fills caches
                seconds[name].append(value)
    return seconds


def make_decoder(model: gptx.Model, context: int) -> Callable[[], float]:
    """Return a function that measures a greedy step of the engine after `context` tokens."""
    [prompt] = random_ids(model.config, 1, min(context, model.config.n_positions - N_STEPS))
    cache = model.prefill(prompt)

    def measure() -> float:
        generator = TokenGenerator(model.gpt2, [prompt], GREEDY, max_tokens=N_STEPS, cache=cache)
        steps = iter(generator)
        next(steps)
        times = [time.perf_counter()]
        for _ in steps:
            times.append(time.perf_counter())
        return float(np.median(np.diff(times)))

    return measure


def make_plain_decoder(model: gptx.Model, context: int, threads: int) -> Callable[[], float]:
    """Return a function that measures a step of the plain NumPy loop after `context` tokens."""
    n_positions = model.config.n_positions
    first = min(context, n_positions - N_STEPS)
    peer = PlainGPT2(model.gpt2.weights, model.config.n_head, n_positions)
    for position in range(first):
        peer.step(0, position)

    def measure() -> float:
        token = 0
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            times = [time.perf_counter()]
            for position in range(first, first + N_STEPS):
                token = peer.step(token, position)
                times.append(time.perf_counter())
        return float(np.median(np.diff(times)))

    return measure


def measure_loading(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of import, load and first tokens, and the peak memory, of processes."""
    values: dict[str, list[float]] = {name: [] for name in PARTS}
    for _ in range(rounds):
        _, done = time_process([sys.executable, "-c", LOAD, str(folder.resolve())])
        done.check_returncode()
        for name, value in zip(PARTS, done.stdout.split(), strict=True):
            values[name].append(float(value))
    return values


if __name__ == "__main__":
    main()
