"""The same weights in several engines, in turns: how long a token takes each of them."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import models as gpu_models
from benchmarks.gpu.engines import Engine, Gptx
from gptx.config import GPT2Config

Record = dict[str, Any]

ROUNDS = 7
FEWEST = 2  # rounds, if those of a row have taken ...
ENOUGH = 12.0  # ... so many seconds
COMPARED = 64  # tokens of the prompt whose logits are compared
COUNTED = 8  # steps in which kernels are counted
AGREE = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.03}  # logits, root mean square
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}

GPTX: dict[str, dict[str, Any]] = {
    "gptx": {},  # layer c: the compiled pass, a CUDA graph
    "gptx early": {"attributes": {"early": True}},  # kernels begin before those ahead have ended,
    "gptx late": {"attributes": {"early": False}},  # or never do
    "gptx cublas": {"attributes": {"most_in_graph": 0}},  # prompts not in a graph
    "gptx ops": {"compile": False},  # layer b
    "gptx generic": {"generic": True},  # layer a
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
    """What is timed: prompts of so many tokens, read together, and new tokens for each."""

    batch: int
    prompt: int
    new: int

    @property
    def room(self) -> int:
        """Positions that are filled: the last token is not fed back."""
        return self.prompt + self.new - 1


@dataclass(frozen=True)
class Setting:
    """One model at one precision.

    Attributes
    ----------
    dtype
        Of activations, keys and values, and of weights that are not quantized.
    quantize
        "int8", "int4", or "" for floats.
    backend, device
        Where gptx and PyTorch run: "cupy" and "cuda", or for a dry run "numpy" and "cpu".
    """

    size: str
    dtype: str
    quantize: str = ""
    backend: str = "cupy"
    device: str = "cuda"


class Loaded:
    """Engines with one model; those that cannot be had are left out, and `failed` says why."""

    def __init__(self, setting: Setting, names: Sequence[str]) -> None:
        self.setting = setting
        self.config, self._weights = gpu_models.model(setting.size, setting.quantize or None)
        self._models: dict[str, Any] = {}  # one of a kind for all of its engines
        self.engines: list[Engine] = []
        self.failed: list[Record] = []
        for name in names:
            try:
                self.engines.append(self._make(name))
            except Exception as error:  # of whichever library
                self.failed.append({"engine": name, "error": told(error)})
        del self._weights

    def _make(self, name: str) -> Engine:
        config, weights, dtype = self.config, self._weights, self.setting.dtype
        if name == MLX:
            return Gptx(name, config, weights, backend="mlx", dtype=dtype)
        if name in GPTX:
            backend = self.setting.backend
            return Gptx(name, config, weights, backend=backend, dtype=dtype, **GPTX[name])
        from benchmarks.gpu.peers import pytorch as gpu_peers

        kind = gpu_peers.plain_model if name in PLAIN else gpu_peers.transformers_model
        if kind.__name__ not in self._models:
            floats = {n: x for n, x in weights.items() if isinstance(x, np.ndarray)}
            self._models[kind.__name__] = kind(config, floats, dtype, self.setting.device)
        model = self._models[kind.__name__]
        if name in PLAIN:
            return gpu_peers.Plain(name, model, **PLAIN[name])
        return gpu_peers.Transformers(name, model, **TRANSFORMERS[name])

    def agreement(self) -> dict[str, float]:
        """How far each engine's logits are from those of the first, relative to their size."""
        ids = random_ids(self.config, 1, COMPARED)[0].tolist()
        logits: dict[str, np.ndarray] = {}
        for engine in self.engines:
            try:
                logits[engine.name] = engine.logits(ids).astype(np.float64)
            except Exception as error:
                self.failed.append({"engine": engine.name, "error": told(error)})
        expected = next(iter(logits.values()), np.zeros(0))
        size = np.linalg.norm(expected)
        return {name: float(np.linalg.norm(x - expected) / size) for name, x in logits.items()}


def run(
    setting: Setting, names: Sequence[str], rows: Sequence[Row], until: float
) -> Iterator[Record]:
    """Time every row; one record for each engine in it.

    Before that, each has to compute what the first one does. An engine that fails is noted, and
    left out of that row. At the time `until` it ends with what it has.
    """
    loaded = Loaded(setting, names)
    errors, limit = loaded.agreement(), AGREE[setting.dtype]
    for failure in loaded.failed:
        yield {**asdict(setting), **failure}
    for name, error in list(errors.items())[1:]:
        what = f"{name}, {setting.size} {setting.quantize or setting.dtype}"
        finding = {"check": what, "error": error, "limit": limit, "ok": error <= limit}
        yield {"section": "checks", "group": f"the same logits as {names[0]}'s", **finding}
    for row in rows:
        if time.time() > until:
            return
        shared = {**asdict(setting), **asdict(row), **_floor(setting, loaded.config, row)}
        for record in measure(row, loaded, until):
            yield {**shared, **record, "logits_error": errors.get(record["engine"])}


def measure(row: Row, loaded: Loaded, until: float) -> Iterator[Record]:
    """One row, engine by engine in turns."""
    prompts = random_ids(loaded.config, row.batch, row.prompt)
    ready: dict[Engine, Record] = {}
    times: dict[Engine, list[list[float]]] = {}
    for engine in loaded.engines:
        try:
            ready[engine], times[engine] = _first_run(engine, row, prompts), []
        except Exception as error:
            yield {"engine": engine.name, "error": told(error)}
    start = time.time()
    for turn in range(ROUNDS):
        if time.time() > until or (turn >= FEWEST and time.time() > start + ENOUGH):
            break
        for engine in list(ready):
            try:
                times[engine].append(arrivals(engine, prompts, row.new))
            except Exception as error:
                yield {"engine": engine.name, "error": told(error)}
                del ready[engine]
    expected: list[int] = next((facts["tokens"] for facts in ready.values()), [])
    for engine, facts in ready.items():
        if times[engine]:
            same = _common(facts.pop("tokens"), expected)
            try:
                device = [engine.device_seconds(prompts, row.new) for _ in range(3)]
            except Exception as error:
                yield {"engine": engine.name, "error": told(error)}
                continue
            yield facts | {"same_tokens": same} | numbers(row, facts, times[engine], device)


def random_ids(config: GPT2Config, batch: int, n: int) -> np.ndarray:
    """Prompts [B, T]."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, n))


def arrivals(engine: Engine, prompts: np.ndarray, n: int) -> list[float]:
    """Seconds from the call to each of the `n` tokens, on the host."""
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in engine.tokens(prompts, n)]


def _first_run(engine: Engine, row: Row, prompts: np.ndarray) -> Record:
    """A run with what has to be compiled, and the memory it takes."""
    engine.release()
    before = engine.memory()[0]
    start = time.perf_counter()
    engine.prepare(row.batch, row.room, row.new)
    tokens = [step[0] for step in engine.tokens(prompts, row.new)]
    return {
        "engine": engine.name,
        "first_run": time.perf_counter() - start,
        "memory": engine.weights_bytes + engine.memory()[1] - before,
        "kernels": engine.kernels,
        "tokens": tokens,
    }


def _common(tokens: Sequence[int], expected: Sequence[int]) -> int:
    """With how many tokens both begin."""
    pairs = zip(tokens, expected, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))


def numbers(
    row: Row,
    facts: Record,
    times: Sequence[Sequence[float]],
    device: Sequence[tuple[float, float]],
) -> Record:
    """What is reported of the arrivals of each round, and of what `device_seconds` gave; rates are
    tokens per second."""
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


def _floor(setting: Setting, config: GPT2Config, row: Row) -> Record:
    """What there is to do: bytes that a decode step reads, operations that the prompts take."""
    itemsize = ITEMSIZE[setting.dtype]
    context = row.prompt + row.new / 2  # on average
    return {
        "weights_read": gpu_models.read_bytes(config, itemsize),
        "cache_read": int(row.batch * context * gpu_models.cache_bytes(config, itemsize)),
        "prompt_flops": row.batch * gpu_models.prompt_flops(config, row.prompt),
    }


def count_kernels(setting: Setting, names: Sequence[str], until: float) -> Iterator[Record]:
    """Kernels and copies of a decode step with one sequence, as the profiler sees them."""
    loaded = Loaded(setting, names)
    yield from ({**asdict(setting), **failure} for failure in loaded.failed)
    prompts = random_ids(loaded.config, 1, 16)
    for engine in loaded.engines:
        if time.time() > until:
            return
        engine.prepare(1, 16 + 2 * COUNTED, 2 * COUNTED + 1)
        for _ in range(2):  # what has to be compiled, or comes the first time alone
            arrivals(engine, prompts, 2 * COUNTED + 1)
        some = _on_the_device(engine, prompts, COUNTED + 1)
        more = _on_the_device(engine, prompts, 2 * COUNTED + 1)
        yield {
            **asdict(setting),
            "engine": engine.name,
            "kernels": (more["kernel"] - some["kernel"]) / COUNTED,
            "copies": (more["gpu_memcpy"] - some["gpu_memcpy"]) / COUNTED,
            "fills": (more["gpu_memset"] - some["gpu_memset"]) / COUNTED,
        }


def _on_the_device(engine: Engine, prompts: np.ndarray, n: int) -> dict[str, int]:
    """How much of what was done on the device, by PyTorch or whoever else in this process."""
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


def told(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0]}"[:300]
