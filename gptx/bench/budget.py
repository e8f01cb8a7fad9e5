"""The preset `budget`: the tokens that fit a fixed time for each call, for several setups.

It answers two questions. How many input tokens leave time for one output token? How many output
tokens fit after a given input? Each is answered with a cache and without (each new token reads the
whole text again), with the backend's own ops and with the generic ones. Loading does not count.
With a cache, each number is that of calls of the server (`gptx serve --budget`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from gptx.bench import tables
from gptx.bench.machine import describe
from gptx.bench.setups import Settings, Setup, run_setups
from gptx.bench.sources import random_ids
from gptx.bench.tables import Column
from gptx.bench.worker import Event, Events
from gptx.errors import ParameterError, argument
from gptx.generation.options import check_options
from gptx.generation.request import Request
from gptx.generation.results import Chunk
from gptx.generation.text_model import Model
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits
from gptx.server.scheduler import Paused, Scheduler

PROMPT_TOKENS = (19,)
WARM_UPS = 2  # calls, the first of which compiles
WARM_UP_TOKENS = 3


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
    calls = Calls(model)

    def fits(n: int) -> bool:
        counts = [calls.count(text[:n], 1, budget) for _ in range(repetitions)]
        return statistics.median(counts) >= 1

    def count_uncached(ids: list[int], n: int, budget: float) -> int:
        return count_steps(_uncached_steps(model, ids, n), budget, time.perf_counter)

    yield {"progress": "input tokens for one output token"}
    inputs = largest(fits, n_positions)  # a cache is of no use to a single output token
    for cache, count in ((True, calls.count), (False, count_uncached)):
        outputs = {}
        for n in prompts:
            name = "with a cache" if cache else "without a cache"
            yield {"progress": f"output tokens for {tables.count(n, 'input token')}, {name}"}
            limit = n_positions - n + 1
            counts = [count(text[:n], limit, budget) for _ in range(repetitions)]
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
    calls.close()


class Calls:
    """Calls of the server's scheduler with a budget.

    Each call has a salt of its own: none finds its prompt in the prefix cache.
    """

    def __init__(self, model: Model) -> None:
        self._scheduler = Scheduler(model, max_running=1, prefix_bytes=0)
        self._n_calls = 0
        for length in (1, model.config.n_positions // 2):  # compiles, and measures steps
            for _ in range(WARM_UPS):
                self.count([0] * length, WARM_UP_TOKENS, math.inf)

    def count(self, ids: list[int], max_tokens: int, budget: float) -> int:
        """Return the number of tokens that a call returns within its budget in seconds."""
        options = check_options({"max_tokens": max_tokens, "ignore_eos": True})
        ended: Future[None] = Future()
        times: list[float] = []

        def listen(event: Chunk | Exception) -> None:
            if isinstance(event, Paused):
                ended.set_result(None)
            elif isinstance(event, Exception):
                ended.set_exception(event)
            else:
                times.append(time.perf_counter())
                if event.finish_reason is not None:
                    ended.set_result(None)

        self._n_calls += 1
        limit = None if math.isinf(budget) else budget
        start = time.perf_counter()
        request = Request([ids], options)
        self._scheduler.submit(request, listen, salt=str(self._n_calls), budget=limit)
        ended.result()
        return sum(moment <= start + budget for moment in times)

    def close(self) -> None:
        """End the engine thread."""
        self._scheduler.close()


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


def _uncached_steps(model: Model, ids: list[int], n: int) -> Iterator[Any]:
    backend = model.backend
    ids = list(ids)
    for _ in range(n):
        with backend.scope():
            cache = KVCache(model.config, backend, 1, len(ids))
            best = backend.xp.argmax(next_token_logits(model.gpt2, [ids], cache), axis=-1)
            ids.append(int(backend.to_numpy(best)[0]))
        yield ids


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
