"""The grid: every setup and each of its trials, with the conventions of llama-bench.

`run` works in the parent process and starts a worker for each setup; `measure` works there.

Reading a prompt (pp) is the engine's work up to the first new token: the forward pass over the
prompt and the choice of the token. Generating (tg) is the engine itself, greedy, token after token,
past the end of a text. All trials read the same random text: at depth d the cache holds its first d
tokens, whichever trial ran before.

Trials take turns, so that a slow minute of the machine affects all of them. The first turns fill
caches and compile; the figures leave them out. Peak memory is that of the process, or of the
library's pool on a device, and covers all trials of a setup.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from gptx.bench import tables, worker
from gptx.bench.machine import describe
from gptx.bench.setups import (
    GREEDY,
    Settings,
    Setup,
    check_context,
    measure_setup,
    number_setups,
    plan_setups,
    token_rates,
)
from gptx.bench.sources import Source, open_sources, random_ids
from gptx.bench.tables import Column, duration
from gptx.bench.worker import Event, Events
from gptx.errors import ParameterError, argument
from gptx.generation.engine import TokenGenerator
from gptx.generation.sampling import make_sampler
from gptx.generation.text_model import Model
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits
from gptx.model import Transformer
from gptx.process import count_cores
from gptx.weights import array_bytes

PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128  # the defaults of llama-bench


@dataclass(frozen=True)
class Trial:
    """A test of llama-bench: read a prompt or generate, after `depth` tokens in the cache.

    Either `prompt` or `output` is 0.
    """

    prompt: int
    output: int
    depth: int = 0

    def __str__(self) -> str:
        name = f"pp{self.prompt}" if self.prompt else f"tg{self.output}"
        return f"{name} @ d{self.depth}" if self.depth else name


# In the parent process


def run(settings: Settings) -> Events:
    """Measure the grid; yield progress, and the records of each setup when it is done.

    The memory bandwidth is measured once for each backend and number of threads. A separate worker
    does it, so that its buffer does not count as memory of the model.
    """
    bandwidths: dict[tuple[str, int | None], float] = {}
    with open_sources(settings.models, offline=settings.offline) as sources:
        trials = {name: plan_trials(settings, source) for name, source in sources.items()}
        for title, setup in number_setups(plan_setups(settings, sources.values())):
            chosen = trials[setup.model]
            where = setup.backend, setup.threads
            if where not in bandwidths and any(trial.output for trial in chosen):
                yield {"progress": f"{title}: bandwidth of the memory"}
                task = "gptx.bench.machine:measure_bandwidth"
                for event in worker.run_task(task, backend=setup.backend, threads=setup.threads):
                    bandwidths[where] = event["bandwidth"]
            events = measure_setup(
                "gptx.bench.grid:measure",
                title,
                setup,
                sources[setup.model],
                trials=[astuple(trial) for trial in chosen],
                repetitions=settings.repetitions,
            )
            for event in events:
                yield event if "progress" in event else add_bandwidth(event, bandwidths.get(where))


def run_threads(settings: Settings) -> Events:
    """Measure the grid over 1, 2, 4 ... threads, up to the number of cores."""
    return run(replace(settings, threads=powers_of_two(count_cores())))


def powers_of_two(limit: int) -> tuple[int, ...]:
    """Return 1, 2, 4 ... below `limit`, and `limit`."""
    return (*(2**k for k in range(limit.bit_length()) if 2**k < limit), limit)


def plan_trials(settings: Settings, source: Source) -> list[Trial]:
    """Plan the trials of one model: depth by depth, prompts before outputs.

    Without numbers from the user, the lengths are those of llama-bench or what the context allows.

    Raises
    ------
    ParameterError
        All numbers are 0, or a trial does not fit the context.
    """
    deepest = max(settings.depths)
    check_context(source, deepest + 1, f"a depth of {deepest}")
    free = source.config.n_positions - deepest
    prompts = (min(PROMPT_TOKENS, free),) if settings.prompts is None else settings.prompts
    # Generating starts from one token.
    outputs = (min(OUTPUT_TOKENS, free - 1),) if settings.outputs is None else settings.outputs
    trials = []
    for depth in settings.depths:
        trials += [Trial(n, 0, depth) for n in prompts if n]
        trials += [Trial(0, n, depth) for n in outputs if n]
    if not trials:
        raise ParameterError(
            f"nothing to measure: give {argument('prompts')} or {argument('outputs')} more than 0 "
            "tokens"
        )
    for trial in trials:
        check_context(source, trial.depth + (trial.prompt or trial.output + 1), str(trial))
    return trials


def add_bandwidth(record: Event, bandwidth: float | None) -> Event:
    """Add the bandwidth of the memory (bytes per second) and the share of it that decoding used.

    The share is the weights that a step reads (bytes) times steps per second over the bandwidth.
    """
    share = None
    if record["output"] and bandwidth:
        steps_per_second = record["tokens_per_second"] / record["batch"]
        share = record["read"] * steps_per_second / bandwidth
    return record | {"bandwidth": bandwidth, "of_bandwidth": share}


# In the worker


def measure(setup: dict[str, Any], trials: list[list[int]], repetitions: int) -> Events:
    """Yield a record for each trial of a setup (the fields of `Setup` and `Trial`)."""
    chosen, planned = Setup(**setup), [Trial(*numbers) for numbers in trials]
    start = time.perf_counter()
    model = chosen.load()
    model.backend.synchronize()
    load_time = time.perf_counter() - start
    runner = TrialRunner(model, chosen.batch, planned)
    samples: dict[Trial, list[list[float]]] = {trial: [] for trial in planned}
    warm_up = model.backend.warm_up
    for turn in range(1 - warm_up, repetitions + 1):
        for trial in planned:
            what = f"round {turn} of {repetitions}" if turn > 0 else "warm-up"
            yield {"progress": f"{trial}, {what}"}
            samples[trial].append(runner.run(trial))
    size, read = weights_bytes(model.gpt2)
    shared = chosen.facts | {
        "dtype": dtype_name(model),
        "parameters": model.config.n_parameters,
        "size": size,
        "read": read,
        "load_time": load_time,
        "peak_memory": model.backend.peak_memory(),
        "kernels": getattr(model.gpt2.forward, "kernels_per_token", None),
        "notes": list(model.notes),
    }
    for trial, (first, *others) in samples.items():
        figures = trial_figures(trial, chosen.batch, first, others[warm_up - 1 :])
        yield shared | figures | describe(model.backend)


def trial_figures(trial: Trial, batch: int, first: list[float], others: list[list[float]]) -> Event:
    """Compute the figures of a trial from the seconds of each step (see `TrialRunner.run`).

    Parameters
    ----------
    first
        The run that may compile; only `first_run` uses it.
    others
        The measured runs, at least one.
    """
    seconds = [sum(steps) for steps in others]
    p50, p99 = np.percentile(np.concatenate(others), [50, 99]).tolist()
    return {
        "test": str(trial),
        "prompt": trial.prompt,
        "output": trial.output,
        "depth": trial.depth,
        "time_to_first_token": float(np.mean(seconds)) if trial.prompt else None,
        "step_p50": p50 if trial.output else None,
        "step_p99": p99 if trial.output else None,
        "first_run": sum(first),
        **token_rates(batch * (trial.prompt or trial.output), seconds),
    }


class TrialRunner:
    """A loaded model, a random text for each sequence, and a cache that holds the depths."""

    def __init__(self, model: Model, batch: int, trials: Sequence[Trial]) -> None:
        self.model = model
        self.batch = batch
        self.texts = random_ids(model.config, batch, model.config.n_positions)
        # The engine takes a cache for a single sequence; a batch reads its depth again.
        cached = [trial for trial in trials if trial.prompt or batch == 1]
        depth = max((trial.depth for trial in cached), default=0)
        capacity = max((trial.depth + trial.prompt for trial in cached), default=0)
        with model.backend.scope():
            self.cache = KVCache(model.config, model.backend, batch, max(capacity, 1))
            if depth:
                model.backend.to_numpy(
                    next_token_logits(model.gpt2, self._texts(0, depth), self.cache)
                )
        self.cache.tokens = self._texts(0, depth)

    def _texts(self, start: int, stop: int) -> list[list[int]]:
        return [text[start:stop] for text in self.texts]

    def run(self, trial: Trial) -> list[float]:
        """Run a trial; return the seconds of the prompt, or of each new token."""
        return [self._read(trial)] if trial.prompt else self._generate(trial)

    def _read(self, trial: Trial) -> float:
        model, backend = self.model, self.model.backend
        prompts = self._texts(trial.depth, trial.depth + trial.prompt)
        self.cache.lengths = np.full(self.batch, trial.depth, dtype=np.int64)
        with backend.scope():
            backend.synchronize()
            start = time.perf_counter()
            streams = list(range(self.batch))
            sampler = make_sampler(GREEDY, backend, prompts, streams, model.config.vocab_size)
            backend.read_tokens(
                backend.sample(next_token_logits(model.gpt2, prompts, self.cache), sampler)
            )
            backend.synchronize()
            return time.perf_counter() - start

    def _generate(self, trial: Trial) -> list[float]:
        steps = iter(
            TokenGenerator(
                self.model.gpt2,
                self._texts(0, trial.depth + 1),
                GREEDY,
                max_tokens=trial.output + 1,
                cache=self.cache if trial.depth and self.batch == 1 else None,
            )
        )
        next(steps)  # the prompt and the first token
        self.model.backend.synchronize()
        times = [time.perf_counter()]
        for _ in range(trial.output):
            next(steps)
            times.append(time.perf_counter())
        self.model.backend.synchronize()
        times[-1] = time.perf_counter()
        return np.diff(times).tolist()


def dtype_name(model: Model) -> str:
    """Return the grid's name of a model's types; its files may be quantized."""
    quantization, dtype = model.config.quantization, model.backend.dtype
    if quantization is None:
        return dtype
    return f"int{quantization.bits}" + (f"/{dtype}" if dtype != "float32" else "")


def weights_bytes(model: Transformer) -> tuple[int, int]:
    """Return the bytes of all weights on the backend, and of those that a decode step reads.

    A step reads next to nothing of the positions and, with an untied head, of the token embeddings.
    """
    weights = model.weights
    skipped = [weights.wpe] if model.config.tie_word_embeddings else [weights.wpe, weights.wte]
    size = array_bytes(weights)
    return size, size - sum(map(array_bytes, skipped))


# The table


def _format_step(p50: float | None, p99: float | None) -> str:
    return tables.NOTHING if p50 is None else f"{duration(p50)} ({duration(p99)})"


COLUMNS = (
    tables.MODEL,
    Column("size", lambda r: tables.megabytes(r["size"]), wide=True),
    Column("params", lambda r: tables.parameters(r["parameters"]), setup=True),
    tables.BACKEND,
    tables.DTYPE,
    tables.THREADS,
    Column("batch", lambda r: str(r["batch"]), setup=True, usual="1"),
    Column("test", lambda r: r["test"], setup=True),
    tables.RATE,
    Column("first token", lambda r: duration(r["time_to_first_token"]), wide=True),
    Column("a step (p99)", lambda r: _format_step(r["step_p50"], r["step_p99"]), wide=True),
    Column("first run", lambda r: duration(r["first_run"]), wide=True),
    replace(tables.LOAD, wide=True),
    tables.MEMORY,
    Column("bandwidth", lambda r: tables.percent(r["of_bandwidth"])),
)
KERNELS = Column("kernels a token", lambda r: str(r["kernels"] or tables.NOTHING), wide=True)


def columns(records: Sequence[Event]) -> tuple[Column, ...]:
    """Return the columns, with the kernels of a decode step where a backend counts them."""
    return (*COLUMNS, KERNELS) if any(record["kernels"] for record in records) else COLUMNS
