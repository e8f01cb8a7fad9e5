"""How close to the memory's speed the NumPy backend decodes, and what loading costs.

    python benchmarks/cpu.py --size 124M --threads 2

The floor of a decode step is the time to read the weights once. It is measured in the same run, on
the same memory-mapped arrays, alternating with decode steps at each context: by gptx (its whole
engine, from one token to the next) and by the NumPy loop that one writes first (`plain_numpy.py`).
Then, each in a fresh process: the import, the load and its peak memory. Prints medians with
quartiles as a table, and one JSON line. The weights are random, or those of a folder (`--model`,
float32); the file is read once before anything is timed, so that it lies in the page cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import threadpoolctl

import gptx
from benchmarks.compare.peers.plain_numpy import PlainGPT2
from gptx.config import GPT2Config
from gptx.generation.engine import TokenGenerator
from gptx.generation.sampling import SamplingParams
from gptx.random_weights import random_weights
from gptx.safetensors_file import read_safetensors
from tests.support.random_models import write_model

STEPS = 16  # tokens per measurement of a decode step

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


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--size", default="124M")
    arguments.add_argument("--model", type=Path)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--contexts", type=int, nargs="+", default=[20, 1000])
    arguments.add_argument("--rounds", type=int, default=15)
    args = arguments.parse_args()
    with folder_of(args.model, args.size) as folder:
        rows = decoding(folder, args.threads, args.contexts, args.rounds)
        rows |= loading(folder, min(args.rounds, 7))
    weights = rows["read weights"]
    print(f"| {'':<27} | median | quartiles | of reading |\n|---|---:|---:|---:|")
    for name, values in rows.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        if name.endswith("memory"):
            print(f"| {name:<27} | {middle / 1e6:.0f} MB | {low / 1e6:.0f}–{high / 1e6:.0f} | |")
        else:
            of = f"{middle / np.median(weights):.2f}" if name.startswith("decode") else ""
            spread = f"{low * 1e3:.2f}–{high * 1e3:.2f}"
            print(f"| {name:<27} | {middle * 1e3:.2f} ms | {spread} | {of} |")
    about = {
        "size": args.size,
        "threads": args.threads,
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "gptx": gptx.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(about | {name: [round(x, 7) for x in xs] for name, xs in rows.items()}))


def decoding(
    folder: Path, threads: int, contexts: list[int], rounds: int
) -> dict[str, list[float]]:
    """Seconds to read the weights, and for a decode step at each context, alternating."""
    model = gptx.load(folder, threads=threads)
    measures: dict[str, Callable[[], float]] = {"read weights": reader(model)}
    for context in contexts:
        measures[f"decode at {context}"] = decoder(model, context)
        measures[f"decode at {context}, plain loop"] = plain(model, context, threads)
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if turn:  # the first round is for the caches
                seconds[name].append(value)
    return seconds


def reader(model: gptx.Model) -> Callable[[], float]:
    """Time to read the weights once: each file, seen as one matrix, times a vector.

    A single product of the same BLAS with the same threads, and hardly any arithmetic: as fast as
    these arrays can be read (two Python threads with a `np.dot` each are no faster).
    """
    width = model.config.n_embd
    matrices = []
    for path in model.files.weights:
        tensors = sorted(read_safetensors(path)[0].values(), key=lambda x: x.ctypes.data)
        if any(x.dtype != np.float32 for x in tensors):
            sys.exit(f"{path} is not all float32, which is what this benchmark reads")
        n = sum(x.size for x in tensors) // width  # they lie side by side
        matrices.append(np.lib.stride_tricks.as_strided(tensors[0], (n, width), (4 * width, 4)))
    vector = np.ones(width, np.float32)

    def measure() -> float:
        times = []
        with model.backend.scope():
            for _ in range(STEPS):
                start = time.perf_counter()
                for matrix in matrices:
                    matrix @ vector
                times.append(time.perf_counter() - start)
        return float(np.median(times))

    return measure


def decoder(model: gptx.Model, context: int) -> Callable[[], float]:
    """Time from one greedy token to the next with about `context` tokens in the cache."""
    start_at = min(context, model.config.n_positions - STEPS)
    random = np.random.default_rng(0)
    prompt = random.integers(0, model.config.vocab_size, start_at).tolist()
    cache = model.prefill(prompt)

    def measure() -> float:
        times = []
        steps = iter(
            TokenGenerator(model.gpt2, [prompt], SamplingParams(), max_tokens=STEPS, cache=cache)
        )
        next(steps)
        for _ in range(STEPS - 1):
            start = time.perf_counter()
            next(steps)
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    return measure


def plain(model: gptx.Model, context: int, threads: int) -> Callable[[], float]:
    """The same for the NumPy loop that one writes first."""
    n_context = model.config.n_positions
    start_at = min(context, n_context - STEPS)
    peer = PlainGPT2(model.gpt2.weights, model.config.n_head, n_context)
    for position in range(start_at):
        peer.step(0, position)

    def measure() -> float:
        times = []
        token = 0
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            for position in range(start_at, start_at + STEPS):
                start = time.perf_counter()
                token = peer.step(token, position)
                times.append(time.perf_counter() - start)
        return float(np.median(times))

    return measure


def loading(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Import, load, first token and peak memory, each in fresh processes."""
    names = ["import gptx", "import the rest", "load", "first two tokens", "peak memory"]
    values: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        command = [sys.executable, "-c", LOAD, str(folder.resolve())]
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        for name, value in zip(names, out.stdout.split(), strict=True):
            values[name].append(float(value))
    return values


@contextmanager
def folder_of(model: Path | None, size: str) -> Iterator[Path]:
    """The given folder, or a temporary one with random weights of that size."""
    if model is not None:
        yield model
        return
    config = GPT2Config.of_size(size)
    with tempfile.TemporaryDirectory() as name:
        yield write_model(Path(name), config, random_weights(config))


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
