"""Times of the same weights in several engines, which take turns."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.engines import Engine, GptxEngine
from benchmarks.gpu.models import load_model, prompt_flops, step_bytes, token_cache_bytes
from gptx.bench.sources import random_ids
from gptx.bench.worker import Event
from gptx.config import GPT2Config

ROUNDS = 7
MIN_ROUNDS = 2  # if the rounds of a row have taken ROW_SECONDS
ROW_SECONDS = 12.0
CHECKED_TOKENS = 64  # of the prompt for the check of the logits
COUNTED_STEPS = 8  # decode steps in which kernels are counted
LOGITS_LIMITS = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.03}  # relative, root mean square
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}

GPTX: dict[str, dict[str, Any]] = {
    "gptx": {},  # the compiled pass, a CUDA graph
    "gptx pdl": {"attributes": {"dependent_launch": True}},  # with programmatic dependent launch
    "gptx no pdl": {"attributes": {"dependent_launch": False}},
    "gptx cublas": {"attributes": {"max_graph_macs": 0}},  # prompts without a graph
    "gptx ops": {"compile": False},  # the backend's own ops, one by one
    "gptx generic": {"generic": True},  # the generic ops
}
PLAIN: dict[str, dict[str, Any]] = {
    "torch graph": {"graph": True},
    "torch compile": {"compiled": "reduce-overhead"},
    "torch compile graph": {"compiled": "default", "graph": True},
}
TRANSFORMERS = {
    "transformers": {},
    "transformers compile": {"compiled": "reduce-overhead"},
}
MLX = "gptx on MLX"
ENGINES = (*GPTX, *PLAIN, *TRANSFORMERS, MLX)


@dataclass(frozen=True)
class Row:
    """A workload: prompts of one length, read as a batch, and new tokens for each."""

    batch: int
    prompt: int
    new: int

    @property
    def capacity(self) -> int:
        """Number of positions: the last new token is not read."""
        return self.prompt + self.new - 1


@dataclass(frozen=True)
class Setting:
    """One model at one precision.

    Attributes
    ----------
    dtype
        The type of activations, keys, values and float weights.
    quantize
        "int8", "int4", or "" for floats.
    backend, device
        "cupy" for gptx and "cuda" for PyTorch; "numpy" and "cpu" in a dry run.
    """

    size: str
    dtype: str
    quantize: str = ""
    backend: str = "cupy"
    device: str = "cuda"


class LoadedEngines:
    """Engines with one model.

    Attributes
    ----------
    failed
        A record for each engine that could not be loaded.
    """

    def __init__(self, setting: Setting, names: Sequence[str]) -> None:
        self.setting = setting
        self.config, self._weights = load_model(setting.size, setting.quantize or None)
        self._models: dict[str, Any] = {}  # shared by the engines of a kind
        self.engines: list[Engine] = []
        self.failed: list[Event] = []
        for name in names:
            try:
                self.engines.append(self._make(name))
            except Exception as error:  # of any library
                self.failed.append({"engine": name, "error": format_error(error)})
        del self._weights

    def _make(self, name: str) -> Engine:
        config, weights, dtype = self.config, self._weights, self.setting.dtype
        if name == MLX:
            return GptxEngine(name, config, weights, backend="mlx", dtype=dtype)
        if name in GPTX:
            backend = self.setting.backend
            return GptxEngine(name, config, weights, backend=backend, dtype=dtype, **GPTX[name])
        from benchmarks.gpu.peers import pytorch_peer

        kind = pytorch_peer.plain_model if name in PLAIN else pytorch_peer.transformers_model
        if kind.__name__ not in self._models:
            floats = {n: x for n, x in weights.items() if isinstance(x, np.ndarray)}
            self._models[kind.__name__] = kind(config, floats, dtype, self.setting.device)
        model = self._models[kind.__name__]
        if name in PLAIN:
            return pytorch_peer.PlainEngine(name, model, **PLAIN[name])
        return pytorch_peer.TransformersEngine(name, model, **TRANSFORMERS[name])

    def logits_errors(self) -> dict[str, float]:
        """Return the error of each engine's logits, relative to those of the first engine."""
        [ids] = random_ids(self.config, 1, CHECKED_TOKENS)
        logits: dict[str, np.ndarray] = {}
        for engine in self.engines:
            try:
                logits[engine.name] = engine.logits(ids).astype(np.float64)
            except Exception as error:
                self.failed.append({"engine": engine.name, "error": format_error(error)})
        expected = next(iter(logits.values()), np.zeros(0))
        size = np.linalg.norm(expected)
        return {name: float(np.linalg.norm(x - expected) / size) for name, x in logits.items()}


def run_times(
    until: float, setting: dict[str, Any], names: Sequence[str], rows: Sequence[Sequence[int]]
) -> Iterator[Event]:
    """Check the logits of each engine against the first, then time every row.

    Yield a record for each engine in each row, or for its failure. The run ends at `until`.
    """
    chosen = Setting(**setting)
    loaded = LoadedEngines(chosen, names)
    errors, limit = loaded.logits_errors(), LOGITS_LIMITS[chosen.dtype]
    for failure in loaded.failed:
        yield {"section": "times", **asdict(chosen), **failure}
    for name, error in list(errors.items())[1:]:
        text = f"{name}, {chosen.size} {chosen.quantize or chosen.dtype}"
        finding = {"check": text, "error": error, "limit": limit, "ok": error <= limit}
        yield {"section": "checks", "group": f"the logits of {names[0]}", **finding}
    for numbers in rows:
        if time.time() > until:
            return
        row = Row(*numbers)
        shared = {**asdict(chosen), **asdict(row), **_count_work(chosen, loaded.config, row)}
        for record in measure(row, loaded, until):
            error = errors.get(record["engine"])
            yield {"section": "times", **shared, **record, "logits_error": error}


def measure(row: Row, loaded: LoadedEngines, until: float) -> Iterator[Event]:
    """Time one row, the engines in turns."""
    prompts = np.array(random_ids(loaded.config, row.batch, row.prompt))
    ready: dict[Engine, Event] = {}
    times: dict[Engine, list[list[float]]] = {}
    for engine in loaded.engines:
        try:
            ready[engine], times[engine] = _first_run(engine, row, prompts), []
        except Exception as error:
            yield {"engine": engine.name, "error": format_error(error)}
    start = time.time()
    for turn in range(ROUNDS):
        if time.time() > until or (turn >= MIN_ROUNDS and time.time() > start + ROW_SECONDS):
            break
        for engine in list(ready):
            try:
                times[engine].append(arrivals(engine, prompts, row.new))
            except Exception as error:
                yield {"engine": engine.name, "error": format_error(error)}
                del ready[engine]
    expected: list[int] = next((facts["tokens"] for facts in ready.values()), [])
    for engine, facts in ready.items():
        if times[engine]:
            same = _common_prefix(facts.pop("tokens"), expected)
            try:
                device = [engine.device_seconds(prompts, row.new) for _ in range(3)]
            except Exception as error:
                yield {"engine": engine.name, "error": format_error(error)}
                continue
            yield facts | {"same_tokens": same} | compute_figures(row, facts, times[engine], device)


def arrivals(engine: Engine, prompts: np.ndarray, n: int) -> list[float]:
    """Return the seconds from the call to each of the `n` tokens on the host."""
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in engine.tokens(prompts, n)]


def _first_run(engine: Engine, row: Row, prompts: np.ndarray) -> Event:
    """Run with compilation, and measure the memory."""
    engine.release()
    before = engine.memory()[0]
    start = time.perf_counter()
    engine.prepare(row.batch, row.capacity, row.new)
    tokens = [step[0] for step in engine.tokens(prompts, row.new)]
    return {
        "engine": engine.name,
        "first_run": time.perf_counter() - start,
        "memory": engine.weights_bytes + engine.memory()[1] - before,
        "kernels": engine.kernels,
        "tokens": tokens,
    }


def _common_prefix(tokens: Sequence[int], expected: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    pairs = zip(tokens, expected, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))


def compute_figures(
    row: Row,
    facts: Event,
    times: Sequence[Sequence[float]],
    device: Sequence[tuple[float, float]],
) -> Event:
    """Compute the figures of an engine in a row.

    Parameters
    ----------
    facts
        The record of the first run.
    times
        The arrivals of each round.
    device
        Results of `Engine.device_seconds`.
    """
    whole = [each[-1] for each in times]
    first, step = np.median(device, axis=0).tolist()
    record = {
        "first": [each[0] for each in times],
        "first_device": first,
        "whole_rate": [row.batch * row.new / seconds for seconds in whole],
        "compile_time": max(facts["first_run"] - float(np.median(whole)), 0.0),
    }
    if row.new > 1:
        p50, p99 = np.percentile(np.concatenate([np.diff(each) for each in times]), [50, 99])
        decoded = row.batch * (row.new - 1)
        record |= {
            "rate": [decoded / (each[-1] - each[0]) for each in times],
            "step_p50": float(p50),
            "step_p99": float(p99),
            "step_device": step,
        }
    return record


def _count_work(setting: Setting, config: GPT2Config, row: Row) -> Event:
    """Return the bytes that a decode step reads and the operations of the prompts."""
    itemsize = ITEMSIZE[setting.dtype]
    context = row.prompt + row.new / 2  # on average
    return {
        "weights_read": step_bytes(config, itemsize),
        "cache_read": int(row.batch * context * token_cache_bytes(config, itemsize)),
        "prompt_flops": row.batch * prompt_flops(config, row.prompt),
    }


def count_kernels(until: float, setting: dict[str, Any], names: Sequence[str]) -> Iterator[Event]:
    """Yield the kernels and copies of a decode step of one sequence, from the profiler."""
    chosen = Setting(**setting)
    loaded = LoadedEngines(chosen, names)
    for failure in loaded.failed:
        yield {"section": "kernels", **asdict(chosen), **failure}
    prompts = np.array(random_ids(loaded.config, 1, 16))
    for engine in loaded.engines:
        if time.time() > until:
            return
        engine.prepare(1, 16 + 2 * COUNTED_STEPS, 2 * COUNTED_STEPS + 1)
        for _ in range(2):  # compiles, and does first-time work
            arrivals(engine, prompts, 2 * COUNTED_STEPS + 1)
        short = _count_device_events(engine, prompts, COUNTED_STEPS + 1)
        long = _count_device_events(engine, prompts, 2 * COUNTED_STEPS + 1)
        counts = {kind: (long[kind] - short[kind]) / COUNTED_STEPS for kind in long}
        yield {
            "section": "kernels",
            **asdict(chosen),
            "engine": engine.name,
            "kernels": counts["kernel"],
            "copies": counts["gpu_memcpy"],
            "fills": counts["gpu_memset"],
        }


def _count_device_events(engine: Engine, prompts: np.ndarray, n: int) -> dict[str, int]:
    """Count the kernels, copies and fills of `n` tokens by any library in this process."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        arrivals(engine, prompts, n)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        kinds = [
            event.get("cat")
            for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        ]
    return {kind: kinds.count(kind) for kind in ("kernel", "gpu_memcpy", "gpu_memset")}


def format_error(error: Exception) -> str:
    """Format an error as one line."""
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0]}"[:300]
