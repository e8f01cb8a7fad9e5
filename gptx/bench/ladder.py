"""The preset `ablation`: the rungs of `ablation.py` side by side, and the engine for comparison."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gptx.bench.ablation import REUSES, Ablation, continued
from gptx.bench.grid import measured, numbered
from gptx.bench.machine import about
from gptx.bench.plan import Settings, Setup, check_context, setups, single
from gptx.bench.process import Events
from gptx.bench.sources import sources
from gptx.bench.speed import GREEDY, rates
from gptx.generation.engine import TokenGenerator
from gptx.model import Transformer

PROMPT, OUTPUT = 19, 20
ENGINE = "the engine, generic ops"


def run(settings: Settings) -> Events:
    """Climb the ladder with each model and number of threads; yield a record for each rung."""
    prompt = single(settings.prompts, PROMPT, "-p")
    output = single(settings.outputs, OUTPUT, "-n")
    with sources(settings.models, offline=settings.offline) as found:
        for source in found.values():
            check_context(source, prompt + output - 1, f"{prompt} + {output} tokens")
        for title, setup in numbered(setups(replace(settings, generic=True), found.values())):
            arguments = {"prompt": prompt, "output": output, "repetitions": settings.repetitions}
            yield from measured("ablation", title, setup, found[setup.model], **arguments)


def measure(setup: dict[str, Any], prompt: int, output: int, repetitions: int) -> Events:
    """Yield a record for each rung; they take turns, and the first turn is thrown away.

    Parameters
    ----------
    setup
        A `Setup` as JSON has it, on NumPy and with the generic ops.
    prompt, output
        Tokens to read, and tokens to generate after them.
    """
    chosen = Setup(**setup)
    model = chosen.load()
    random = np.random.default_rng(0)
    ids = random.integers(0, model.config.vocab_size, prompt).tolist()
    ways = rungs(model.gpt2, ids, output)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[int]] = {}
    for turn in range(repetitions + 1):
        for name, generate in ways.items():
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
            **rates(output, seconds),
            "speedup": slowest / float(np.median(seconds)),
            "same_tokens": tokens[name] == tokens[ENGINE],
            **about(model.backend),
        }


def rungs(model: Transformer, ids: list[int], output: int) -> dict[str, Callable[[], list[int]]]:
    """What is compared: name -> a function that continues `ids` with so many greedy tokens."""

    def way(n: int, *, table: bool = False) -> Callable[[], list[int]]:
        return partial(continued, model, Ablation(model, REUSES[:n], table=table), ids, output)

    ways = {"no cache": way(0)}
    ways |= {f"+ {reuse}": way(n) for n, reuse in enumerate(REUSES, start=1)}
    ways[ENGINE] = partial(_engine, model, ids, output)
    if model.config.activation_function != "relu":
        ways["no cache, GELU from a table"] = way(0, table=True)
        ways["all reused, GELU from a table"] = way(len(REUSES), table=True)
    return ways


def _engine(model: Transformer, ids: list[int], output: int) -> list[int]:
    steps = TokenGenerator(model, [ids], GREEDY, max_tokens=output)
    return [token.id for step in steps for token in step if token.id is not None]
