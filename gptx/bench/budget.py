"""The preset `budget`: the tokens that fit a fixed time for each call, for several setups.

It answers two questions. How many input tokens leave time for one output token? How many output
tokens fit after a given input? Each is answered with a cache and without (each new token reads the
whole text again), with the backend's own ops and with the generic ones. Loading does not count.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from gptx.bench import tables
from gptx.bench.machine import describe
from gptx.bench.setups import GREEDY, Settings, Setup, run_setups
from gptx.bench.sources import random_ids
from gptx.bench.tables import Column
from gptx.bench.worker import Event, Events
from gptx.errors import ParameterError, argument
from gptx.generation.engine import TokenGenerator
from gptx.generation.text_model import Model
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits

PROMPT_TOKENS = (19,)


def run(settings: Settings) -> Events:
    """Measure each setup, with the backend's own ops and with the generic ones."""
    prompts = settings.prompts or PROMPT_TOKENS
    if min(prompts) < 1:
        raise ParameterError(
            f"{argument('prompts')} has {min(prompts)}, this preset expects at least 1 input token"
        )
    if not 0 < settings.budget < math.inf:
        raise ParameterError(
            f"{argument('budget')} is {settings.budget}, expected more than 0 seconds"
        )
    yield from run_setups(
        "gptx.bench.budget:measure",
        [replace(settings, generic=generic) for generic in (False, True)],
        max(prompts),
        f"an input of {max(prompts)} tokens",
        prompts=prompts,
        budget=settings.budget,
        repetitions=settings.repetitions,
    )


def measure(setup: dict[str, Any], prompts: list[int], budget: float, repetitions: int) -> Events:
    """Yield a record with a cache and one without, for `prompts` input tokens and `budget` seconds.

    The median time of the `repetitions` is compared with the budget; the median count is reported.
    """
    chosen = Setup(**setup)
    model = chosen.load()
    n_positions = model.config.n_positions
    [text] = random_ids(model.config, 1, n_positions)
    for _ in _cached_steps(model, text[:1], 3):  # compiles
        pass

    def fits(n: int) -> bool:
        times = [_seconds(_cached_steps(model, text[:n], 1)) for _ in range(repetitions)]
        return statistics.median(times) <= budget

    yield {"progress": "input tokens for one output token"}
    inputs = largest(fits, n_positions)  # a cache is of no use to a single output token
    for cache, steps in ((True, _cached_steps), (False, _uncached_steps)):
        outputs = {}
        for n in prompts:
            name = "with a cache" if cache else "without a cache"
            yield {"progress": f"output tokens for {tables.count(n, 'input token')}, {name}"}
            limit = n_positions - n + 1
            counts = [
                count_steps(steps(model, text[:n], limit), budget, time.perf_counter)
                for _ in range(repetitions)
            ]
            outputs[str(n)] = round(statistics.median(counts))
        yield {
            **chosen.facts,
            "cache": cache,
            "budget": budget,
            "context": n_positions,
            "inputs": inputs,
            "outputs": outputs,
            **describe(model.backend),
        }


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest of 1 ... `limit` that fits, 0 if none does, by bisection."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def count_steps(steps: Iterator[Any], budget: float, clock: Callable[[], float]) -> int:
    """Count the steps that end within `budget` seconds of `clock`."""
    n, end = 0, clock() + budget
    for _ in steps:
        if clock() > end:
            break
        n += 1
    return n


def _cached_steps(model: Model, ids: list[int], n: int) -> Iterator[Any]:
    return iter(TokenGenerator(model.gpt2, [ids], GREEDY, max_tokens=n))


def _uncached_steps(model: Model, ids: list[int], n: int) -> Iterator[Any]:
    backend = model.backend
    ids = list(ids)
    for _ in range(n):
        with backend.scope():
            cache = KVCache(model.config, backend, 1, len(ids))
            best = backend.xp.argmax(next_token_logits(model.gpt2, [ids], cache), axis=-1)
            ids.append(int(backend.to_numpy(best)[0]))
        yield ids


def _seconds(steps: Iterator[Any]) -> float:
    start = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - start


def columns(records: Sequence[Event]) -> tuple[Column, ...]:
    """Return the columns: one for each length of the input."""

    def outputs(prompt: str) -> Column:
        def text(record: Event) -> str:
            return mark_full(record["outputs"][prompt], record["context"] - int(prompt) + 1)

        return Column(f"outputs for {tables.count(int(prompt), 'input')}", text)

    def mark_full(n: int, limit: int) -> str:
        return f"{n} (all)" if n == limit else str(n)

    return (
        tables.MODEL,
        tables.BACKEND,
        tables.DTYPE,
        tables.THREADS,
        Column("budget", lambda r: f"{r['budget']:g} s", setup=True),
        Column("cache", lambda r: "yes" if r["cache"] else "no", right=False),
        Column("inputs for 1 output", lambda r: mark_full(r["inputs"], r["context"])),
        *(outputs(prompt) for prompt in (records[0]["outputs"] if records else ())),
    )
