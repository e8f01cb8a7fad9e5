"""The trials of one setup, in the process that was started for it.

Reading a prompt (pp) is what the engine does until the first new token: the forward pass over the
prompt, and the choice of the token. Generating (tg) is the engine itself, greedy, one token after
the other, and the end of a text does not end it. All trials read the same random text, so that at
depth d the cache holds its first d tokens, whichever trial was there before.

The trials take turns, so that a slow minute of the machine is shared by all; the first turns are
for the caches and for what has to be compiled, and are kept apart. The peak of the memory is that
of the process, or of the library's own pool on a device, with the largest of its trials.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from gptx.bench.machine import about
from gptx.bench.plan import Setup, Trial
from gptx.bench.process import Event, Events
from gptx.generation.api import Model
from gptx.generation.engine import TokenGenerator, prefill
from gptx.generation.sampling import Sampler, SamplingParams
from gptx.kv_cache import KVCache
from gptx.model import Transformer

GREEDY = SamplingParams(seed=0)


def measure(setup: dict[str, Any], trials: list[list[int]], repetitions: int) -> Events:
    """Yield a record for each trial of a setup (`Setup` and `Trial`, as JSON has them)."""
    chosen, wanted = Setup(**setup), [Trial(*numbers) for numbers in trials]
    start = time.perf_counter()
    model = chosen.load()
    model.backend.synchronize()
    load_time = time.perf_counter() - start
    bench = Bench(model, chosen.batch, wanted)
    samples: dict[Trial, list[list[float]]] = {trial: [] for trial in wanted}
    warm_up = model.backend.warm_up
    for turn in range(1 - warm_up, repetitions + 1):
        for trial in wanted:
            what = f"round {turn} of {repetitions}" if turn > 0 else "warm-up"
            yield {"progress": f"{trial}, {what}"}
            samples[trial].append(bench.run(trial))
    size, read = weights_bytes(model.gpt2)
    shared = chosen.facts | {
        "dtype": dtype_of(model),
        "parameters": model.config.n_parameters,
        "size": size,
        "read": read,
        "load_time": load_time,
        "peak_memory": model.backend.peak_memory(),
        "kernels": getattr(model.gpt2.forward, "kernels_per_token", None),
    }
    for trial, (first, *others) in samples.items():
        numbers = record(trial, chosen.batch, first, others[warm_up - 1 :])
        yield shared | numbers | about(model.backend)


def record(trial: Trial, batch: int, first: list[float], others: list[list[float]]) -> Event:
    """The numbers of a trial, from the seconds of each step of its runs (see `Bench.run`).

    Parameters
    ----------
    first
        The run that may have to compile; it counts for `first_run` alone.
    others
        Those that are measured, at least one.
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
        **rates(batch * (trial.prompt or trial.output), seconds),
    }


def rates(tokens: int, samples: list[float]) -> Event:
    """Tokens per second, mean and standard deviation (None of a single one), from seconds."""
    values = tokens / np.array(samples)
    return {
        "tokens_per_second": float(values.mean()),
        "tokens_per_second_sd": float(values.std(ddof=1)) if len(samples) > 1 else None,
        "seconds_per_token": float(np.mean(samples)) / tokens,
        "samples": samples,
    }


class Bench:
    """A loaded model, a random text for each sequence of the batch, and the cache of its depths."""

    def __init__(self, model: Model, batch: int, trials: list[Trial]) -> None:
        self.model = model
        self.batch = batch
        config = model.config
        random = np.random.default_rng(0)
        self.texts = random.integers(0, config.vocab_size, (batch, config.n_positions)).tolist()
        # The engine takes a cache for a single sequence; a batch reads its depth anew.
        cached = [trial for trial in trials if trial.prompt or batch == 1]
        depth = max((trial.depth for trial in cached), default=0)
        room = max((trial.depth + trial.prompt for trial in cached), default=0)
        with model.backend.scope():
            self.cache = KVCache(config, model.backend, batch, max(room, 1))
            if depth:
                model.backend.to_numpy(prefill(model.gpt2, self._texts(0, depth), self.cache))
        self.cache.tokens = self._texts(0, depth)

    def _texts(self, start: int, stop: int) -> list[list[int]]:
        return [text[start:stop] for text in self.texts]

    def run(self, trial: Trial) -> list[float]:
        """Seconds of each step of a trial: of one that reads, or of each new token."""
        return [self._read(trial)] if trial.prompt else self._generate(trial)

    def _read(self, trial: Trial) -> float:
        model, backend = self.model, self.model.backend
        prompts = self._texts(trial.depth, trial.depth + trial.prompt)
        self.cache.lengths = np.full(self.batch, trial.depth, dtype=np.int64)
        with backend.scope():
            backend.synchronize()
            start = time.perf_counter()
            sampler = Sampler(
                GREEDY, backend, prompts, list(range(self.batch)), model.config.vocab_size
            )
            backend.to_numpy(sampler(prefill(model.gpt2, prompts, self.cache)))
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
        next(steps)  # the prompt, and the first token
        self.model.backend.synchronize()
        times = [time.perf_counter()]
        for _ in range(trial.output):
            next(steps)
            times.append(time.perf_counter())
        self.model.backend.synchronize()
        times[-1] = time.perf_counter()
        return np.diff(times).tolist()


def dtype_of(model: Model) -> str:
    """What the grid calls it; files may be quantized where nothing was asked for."""
    how, dtype = model.config.quantization, model.backend.dtype
    if how is None:
        return dtype
    return f"int{how.bits}" if dtype == "float32" else f"int{how.bits}/{dtype}"


def weights_bytes(model: Transformer) -> tuple[int, int]:
    """Bytes of all weights as the backend holds them, and of those that a decode step reads.

    A step reads a row or so of the tables of positions and (where the head is another) of tokens.
    """
    weights = model.weights
    skipped = [weights.wpe] if model.config.tie_word_embeddings else [weights.wpe, weights.wte]
    size = _bytes(weights)
    return size, size - sum(map(_bytes, skipped))


def _bytes(node: Any) -> int:
    """Bytes of the arrays of a tree of namespaces, lists and objects."""
    if hasattr(node, "nbytes"):
        return int(node.nbytes)
    children = node if isinstance(node, list | tuple) else getattr(node, "__dict__", {}).values()
    return sum(map(_bytes, children))
