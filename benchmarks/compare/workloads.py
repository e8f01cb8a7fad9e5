"""The workloads of the comparison: what is timed, and with which prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.compare.engine_process import EngineProcess
from gptx.bench.sources import random_ids
from gptx.config import GPT2Config

N_LETTERS = 94  # tokens 0 to 93 of GPT-2 are single letters


@dataclass(frozen=True)
class Workload:
    """One kind of measurement.

    Attributes
    ----------
    part
        "first": from the prompts to the first token of each. "step": from each token to the next,
        the mean over `n_tokens` - 1 steps. "process": a fresh process from its start to its end.
    n_counted
        Number of tokens read or generated in that time, for a rate; 0 for no rate.
    known
        True if the prompt is the same in each round: the engine may keep its keys and values.
    times
        Number of runs in a turn; the median counts, without the first, which wakes the threads.
    """

    title: str
    part: str
    n_prompt: int
    n_tokens: int
    n_counted: int
    n_prompts: int = 1
    known: bool = False
    times: int = 1

    def measure(self, engine: EngineProcess, config: GPT2Config, seed: int) -> float:
        """Return the seconds of one turn; each seed has other prompts."""
        prompts = letter_prompts(config, self.n_prompts, self.n_prompt, 0 if self.known else seed)
        if self.part == "process":
            return engine.time_whole_process(prompts[0], self.n_tokens)
        workload = {"n_tokens": self.n_tokens, "known": self.known, "times": self.times}
        seconds = engine.ask("time_generation", prompts=prompts, **workload)[self.part]
        return float(np.median(seconds[1:] or seconds))


WORKLOADS = {
    "decode": Workload("decode from 20 to 84", "step", 20, 65, 1),
    "deep": Workload("decode at 1,000", "step", 985, 33, 1, known=True),
    "prefill19": Workload("prefill of 19", "first", 19, 1, 19, times=6),
    "prefill512": Workload("prefill of 512", "first", 512, 1, 512, times=2),
    "batch": Workload("decode 8 sequences", "step", 20, 33, 8, n_prompts=8),
    "process": Workload("whole process, 19 + 20", "process", 19, 20, 0),
}


def letter_prompts(config: GPT2Config, n: int, length: int, seed: int) -> list[list[int]]:
    """Draw prompts of single-letter tokens, which fastGPT can read as a text."""
    letters = min(N_LETTERS, config.vocab_size)
    return [[i % letters for i in ids] for ids in random_ids(config, n, length, seed)]
