"""GPT-2 in WebAssembly: with and without SIMD, with and without the KV cache, float32 and int8.

    npm install --prefix /tmp/new --ignore-scripts onnxruntime-web@1.30.0
    npm install --prefix /tmp/old --ignore-scripts onnxruntime-web@1.17.3
    python -m benchmarks.wasm --ort /tmp/new --scalar-ort /tmp/old -m shakespeare

The graph is that of `gptx page`, with its weights in one file. Each setting of onnxruntime-web is a
process of Node.js; the settings and graphs take turns. 1.17.3 is the last version with a build
without SIMD. The second table has the tokens that a call of fixed time reads and writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.instruction_sets import instruction_set
from benchmarks.wasm_graphs import VARIANTS, quantized
from gptx.bench.machine import cpu_name
from gptx.bench.sources import find_source, write_source
from gptx.config import GPT2Config
from gptx.conversions import read
from gptx.conversions.checkpoint import Checkpoint, float_array
from gptx.process import count_cores
from gptx.server.sites.graphs import step_graph

RUNS = Path(__file__).with_name("wasm_runs.mjs")
PAGE = Path(__file__).parents[1] / "gptx" / "server" / "page"
FLOAT32 = "float32"
FASTEST = "int8 DynamicQuantizeMatMul"
CONTEXT = 100  # tokens before the timed steps
PROMPTS = (4, 12, 24, 48, 76)  # of calls with a budget: those of the seed's tables
MAX_WRITTEN = 150  # tokens of a call with a budget


@dataclass(frozen=True)
class Setting:
    """A version of onnxruntime-web, its instructions, its threads, and the graphs to time."""

    name: str
    module: Path
    simd: str
    threads: int
    graphs: tuple[str, ...]
    with_budget: bool


class Runs:
    """A process of `wasm_runs.mjs`."""

    def __init__(self, setting: Setting, config: Path, graphs: dict[str, Path]) -> None:
        self.setting = setting
        files = [f"{name}={graphs[name]}" for name in setting.graphs]
        command = [str(setting.module), setting.simd, str(setting.threads), str(PAGE), str(config)]
        self.process = subprocess.Popen(
            ["node", str(RUNS), *command, *files],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def __call__(self, graph: str, prompt: int, steps: int, **options: Any) -> dict[str, Any]:
        """Return the milliseconds of a prompt and of the steps after it, and the token ids."""
        assert self.process.stdin is not None
        request = {"graph": graph, "prompt": prompt, "steps": steps, **options}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"{self.setting.name} ended with {self.process.wait()}"
        return dict(json.loads(line))


def settings(ort: Path, scalar: Path, every: bool) -> list[Setting]:
    """Return the settings: without `every`, the newest version and two graphs."""
    new = ort / "node_modules" / "onnxruntime-web" / "dist" / "ort.node.min.mjs"
    old = scalar / "node_modules" / "onnxruntime-web" / "dist" / "ort.node.min.js"
    few = (FLOAT32, FASTEST)
    threads = Setting("1.30.0, SIMD, 2 threads", new, "simd", 2, few, False)
    if not every:
        return [Setting("1.30.0, SIMD", new, "simd", 1, few, False), threads]
    exported = (FLOAT32, "int8 DequantizeLinear")
    return [
        Setting("1.17.3, scalar", old, "scalar", 1, exported, True),
        Setting("1.17.3, SIMD", old, "simd", 1, exported, True),
        Setting("1.30.0, SIMD", new, "simd", 1, (FLOAT32, *VARIANTS), True),
        threads,
    ]


def write_graphs(checkpoint: Checkpoint, folder: Path, every: bool) -> dict[str, Path]:
    """Write the graph with float32 weights and its quantized variants; return their files."""
    config = checkpoint.config
    model = step_graph(config, dict.fromkeys(config.tensor_shapes(), FLOAT32))
    for name, tensor in checkpoint.tensors.items():
        floats = np.ascontiguousarray(float_array(tensor), np.float32)
        model.graph.initializer.append(numpy_helper.from_array(floats, name))
    inputs = [x for x in model.graph.input if x.name not in checkpoint.stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    found = {}
    for name in (FLOAT32, *(VARIANTS if every else (FASTEST,))):
        graph = model if name == FLOAT32 else quantized(model, VARIANTS[name])
        found[name] = folder / f"{len(found)}.onnx"
        onnx.save(graph, found[name])
    return found


@contextmanager
def processes(
    chosen: list[Setting], config: GPT2Config, graphs: dict[str, Path], folder: Path
) -> Iterator[list[Runs]]:
    """Start a process for each setting; end them at the end."""
    file = folder / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    with ExitStack() as stack:
        runs = []
        for setting in chosen:
            runs.append(Runs(setting, file, graphs))
            stack.callback(runs[-1].close)
        yield runs


def measure(
    runs: list[Runs], rounds: int, prompt: int, steps: int, budget: float
) -> tuple[dict[Any, list[float]], dict[Any, list[int]]]:
    """Return the samples of (setting, graph, what), and tokens in a budget of each case."""
    times: dict[Any, list[float]] = defaultdict(list)
    written: dict[Any, list[int]] = defaultdict(list)
    for number in range(rounds + 1):
        for one in runs if number % 2 else runs[::-1]:
            name = one.setting.name
            for graph in one.setting.graphs:
                found = {
                    "prompt": one(graph, prompt, 0, cached=True)["times"],
                    "cached": one(graph, CONTEXT, steps, cached=True)["times"][1:],
                    "uncached": one(graph, CONTEXT, max(2, steps // 5), cached=False)["times"][1:],
                }
                for what, samples in found.items():
                    if number:  # the first round compiles the code
                        times[name, graph, what] += samples
            if not one.setting.with_budget or not number:
                continue
            for n in PROMPTS:
                for cached in (False, True):
                    call = one(FLOAT32, n, MAX_WRITTEN, cached=cached, budget=budget)
                    written[name, cached, n].append(len(call["ids"]))
    return times, written


def report(
    times: dict[Any, list[float]], written: dict[Any, list[int]], prompt: int, budget: float
) -> str:
    """Return the tables."""

    def cell(samples: list[float]) -> str:
        low, middle, high = np.percentile(samples, [25, 50, 75])
        return f"{middle:.1f} ({low:.1f}–{high:.1f})"

    whats = ("prompt", "cached", "uncached")
    lines = [
        f"| onnxruntime-web | graph | prompt of {prompt}, ms | step with cache, ms | without, ms |",
        "|---|---|---:|---:|---:|",
    ]
    for name, graph in dict.fromkeys((name, graph) for name, graph, _ in times):
        cells = " | ".join(cell(times[name, graph, what]) for what in whats)
        lines.append(f"| {name} | {graph} | {cells} |")
    if not written:
        return "\n".join(lines)
    columns = " | ".join(f"{n} in" for n in PROMPTS)
    heads = [f"| float32, {budget:g} ms a call | {columns} |", "|---|" + "---:|" * len(PROMPTS)]
    lines += ["", *heads]
    for name, cached in dict.fromkeys((name, cached) for name, cached, _ in written):
        cells = " | ".join(f"{np.median(written[name, cached, n]):.0f} out" for n in PROMPTS)
        lines.append(f"| {name}, {'with' if cached else 'no'} cache | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Measure a model and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--ort", type=Path, required=True, help="folder with onnxruntime-web 1.30.0"
    )
    parser.add_argument("--scalar-ort", type=Path, required=True, help="the same of 1.17.3")
    parser.add_argument("-m", "--model", default="shakespeare", help="or random:124M")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=200, help="tokens of the timed prompt")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a round")
    parser.add_argument("--budget", type=float, default=100, help="milliseconds of a call")
    parser.add_argument("--few", action="store_true", help="1.30.0 with two graphs only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = find_source(options.model, folder)
        write_source(source)
        checkpoint = read(source.path)[1].as_floats()
        graphs = write_graphs(checkpoint, folder, not options.few)
        chosen = settings(options.ort, options.scalar_ort, not options.few)
        with processes(chosen, checkpoint.config, graphs, folder) as runs:
            print(f"{cpu_name()}, {instruction_set()}, {count_cores()} cores; {options.model}")
            figures = (options.prompt, options.steps, options.budget)
            times, written = measure(runs, options.rounds, *figures)
            print(report(times, written, options.prompt, options.budget), flush=True)


if __name__ == "__main__":
    main()
