"""The preset `budget`: what a fixed time for each call allows, with and without what makes it fast.

Two questions: how many tokens of input still leave time for one token of output, and how many
tokens of output there are for a given input. Without a cache, each new token reads the whole text
again; generic, the backend does without its own ops. Loading is not counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from gptx.bench.grid import measured, numbered
from gptx.bench.machine import about
from gptx.bench.plan import Settings, Setup, check_context, setups
from gptx.bench.process import Events
from gptx.bench.sources import sources
from gptx.bench.speed import GREEDY
from gptx.errors import ParameterError
from gptx.generation.api import Model
from gptx.generation.engine import TokenGenerator, prefill
from gptx.kv_cache import KVCache

PROMPTS = (19,)


def run(settings: Settings) -> Events:
    """Ask both questions of each setup, with its own ops and with the generic ones."""
    prompts = settings.prompts or PROMPTS
    if min(prompts) < 1:
        raise ParameterError(f"-p has {min(prompts)}, this preset expects at least 1 input token")
    if not 0 < settings.budget < math.inf:
        raise ParameterError(f"budget is {settings.budget}, expected seconds, more than 0")
    with sources(settings.models, offline=settings.offline) as found:
        for source in found.values():
            check_context(source, max(prompts), f"an input of {max(prompts)} tokens")
        plan = [
            setup
            for generic in (False, True)
            for setup in setups(replace(settings, generic=generic), found.values())
        ]
        for title, setup in numbered(plan):
            arguments = {
                "prompts": prompts,
                "budget": settings.budget,
                "repetitions": settings.repetitions,
            }
            yield from measured("budget", title, setup, found[setup.model], **arguments)


def measure(setup: dict[str, Any], prompts: list[int], budget: float, repetitions: int) -> Events:
    """Yield a record with a cache and one without.

    Parameters
    ----------
    setup
        A `Setup` as JSON has it.
    prompts
        Numbers of input tokens.
    budget
        Seconds for a call.
    repetitions
        Each time that is compared with the budget, and each count, is the median of so many.
    """
    chosen = Setup(**setup)
    model = chosen.load()
    n_positions = model.config.n_positions
    random = np.random.default_rng(0)
    text = random.integers(0, model.config.vocab_size, n_positions).tolist()
    for _ in _cached(model, text[:1], 3):  # what has to be compiled
        pass

    def in_time(n: int) -> bool:
        return _median(lambda: _seconds(_cached(model, text[:n], 1)), repetitions) <= budget

    yield {"progress": "how much input"}
    inputs = largest(in_time, n_positions)  # a cache is of no use to a single output
    for name, steps in (("yes", _cached), ("no", _uncached)):
        outputs = {}
        for n in prompts:
            yield {"progress": f"how much output for {n} tokens, cache: {name}"}
            room = n_positions - n + 1
            counts = [
                count(steps(model, text[:n], room), budget, time.perf_counter)
                for _ in range(repetitions)
            ]
            outputs[str(n)] = round(statistics.median(counts))
        yield {
            **chosen.facts,
            "cache": name == "yes",
            "budget": budget,
            "context": n_positions,
            "inputs": inputs,
            "outputs": outputs,
            **about(model.backend),
        }


def largest(in_time: Callable[[int], bool], limit: int) -> int:
    """The largest of 1 ... `limit` that is in time, 0 if none is, by bisection."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if in_time(middle) else (low, middle)
    return low


def count(steps: Iterator[Any], budget: float, clock: Callable[[], float]) -> int:
    """How many steps end within `budget` seconds of `clock`."""
    n, end = 0, clock() + budget
    for _ in steps:
        if clock() > end:
            break
        n += 1
    return n


def _cached(model: Model, ids: list[int], n: int) -> Iterator[Any]:
    return iter(TokenGenerator(model.gpt2, [ids], GREEDY, max_tokens=n))


def _uncached(model: Model, ids: list[int], n: int) -> Iterator[Any]:
    backend = model.backend
    ids = list(ids)
    for _ in range(n):
        with backend.scope():
            cache = KVCache(model.config, backend, 1, len(ids))
            best = backend.xp.argmax(prefill(model.gpt2, [ids], cache), axis=-1)
            ids.append(int(backend.to_numpy(best)[0]))
        yield ids


def _seconds(steps: Iterator[Any]) -> float:
    start = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - start


def _median(measure: Callable[[], float], repetitions: int) -> float:
    return statistics.median(measure() for _ in range(repetitions))
