"""The preset `ablation`: the reuses of `reuse.py` switched on one after the other.

Each state is a rung; the last ones are the engine with its cache, and GELU from a table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gptx.bench import tables
from gptx.bench.machine import describe
from gptx.bench.reuse import REUSES, ReuseBackend, generate_greedy
from gptx.bench.setups import GREEDY, Settings, Setup, run_setups, single_count, token_rates
from gptx.bench.sources import random_ids
from gptx.bench.tables import Column, duration
from gptx.bench.worker import Events
from gptx.generation.engine import TokenGenerator
from gptx.model import Transformer

PROMPT_TOKENS, OUTPUT_TOKENS = 19, 20
ENGINE = "the engine, generic ops"

COLUMNS = (
    tables.MODEL,
    tables.THREADS,
    Column("reused", lambda r: r["rung"], right=False),
    tables.RATE,
    Column("a token", lambda r: duration(r["seconds_per_token"]), wide=True),
    Column("times faster", lambda r: f"{r['speedup']:.2f}"),
    Column("tokens", lambda r: "the same" if r["same_tokens"] else "others", right=False),
)


def run(settings: Settings) -> Events:
    """Measure each model and number of threads; yield a record for each rung."""
    prompt = single_count(settings.prompts, PROMPT_TOKENS, "prompts")
    output = single_count(settings.outputs, OUTPUT_TOKENS, "outputs")
    yield from run_setups(
        "gptx.bench.ablation:measure",
        [replace(settings, generic=True)],
        prompt + output - 1,
        f"{prompt} + {output} tokens",
        prompt=prompt,
        output=output,
        repetitions=settings.repetitions,
    )


def measure(setup: dict[str, Any], prompt: int, output: int, repetitions: int) -> Events:
    """Read `prompt` tokens and generate `output` tokens; yield a record for each rung.

    The rungs take turns, and the first turn is a warm-up.
    """
    chosen = Setup(**setup)
    model = chosen.load()
    [ids] = random_ids(model.config, 1, prompt)
    generators = make_rungs(model.gpt2, ids, output)
    samples: dict[str, list[float]] = {name: [] for name in generators}
    tokens: dict[str, list[int]] = {}
    for turn in range(repetitions + 1):
        for name, generate in generators.items():
            what = f"round {turn} of {repetitions}" if turn else "warm-up"
            yield {"progress": f"{name}, {what}"}
            start = time.perf_counter()
            tokens[name] = generate()
            if turn:
                samples[name].append(time.perf_counter() - start)
    slowest = float(np.median(next(iter(samples.values()))))
    for name, seconds in samples.items():
        yield {
            **chosen.facts,
            "rung": name,
            "prompt": prompt,
            "output": output,
            **token_rates(output, seconds),
            "speedup": slowest / float(np.median(seconds)),
            "same_tokens": tokens[name] == tokens[ENGINE],
            **describe(model.backend),
        }


def make_rungs(
    model: Transformer, ids: list[int], output: int
) -> dict[str, Callable[[], list[int]]]:
    """Return the rungs: name -> a function that continues `ids` by `output` greedy tokens."""

    def rung(n_reuses: int, *, gelu_table: bool = False) -> Callable[[], list[int]]:
        backend = ReuseBackend(model, REUSES[:n_reuses], gelu_table=gelu_table)
        return partial(generate_greedy, model, backend, ids, output)

    rungs = {"no cache": rung(0)}
    rungs |= {f"+ {reuse}": rung(n) for n, reuse in enumerate(REUSES, start=1)}
    rungs[ENGINE] = partial(_engine_tokens, model, ids, output)
    if model.config.activation_function != "relu":
        rungs["no cache, GELU from a table"] = rung(0, gelu_table=True)
        rungs["all reused, GELU from a table"] = rung(len(REUSES), gelu_table=True)
    return rungs


def _engine_tokens(model: Transformer, ids: list[int], output: int) -> list[int]:
    steps = TokenGenerator(model, [ids], GREEDY, max_tokens=output)
    return [token.id for step in steps for token in step if token.id is not None]
