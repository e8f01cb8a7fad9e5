"""The keyword options of `load`, `generate` and `stream`, named and explained once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from gptx.cache import KVCache
from gptx.engine import Overflow

Prompt = str | Sequence[int]


class Options(TypedDict, total=False):
    """What `generate` and `stream` take beside the prompt.

    The options of `SamplingParams` (temperature, top_k, top_p, min_p, repetition_penalty,
    presence_penalty, frequency_penalty, logit_bias, seed), and:

    max_tokens
        New tokens at most, default 100; None goes on to the end of the context.
    stop
        A string or several: generation ends where one of them appears, and the text ends before it.
    ignore_eos
        Go on past the end of a text.
    overflow
        "error" (default), "truncate" or "slide", where prompt and output do not fit the context
        (see `gptx.engine.Generation`).
    logprobs
        Return the log-probability of each token, too.
    allow_special
        Read `<|endoftext|>` in the prompt as that token, not as text.
    batch_size
        How many prompts are computed at once, default 8.
    cache
        What `Model.prefill` returned: the part of a single prompt that it shares is not computed
        again.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float] | None
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    ignore_eos: bool
    overflow: Overflow
    logprobs: bool
    allow_special: bool
    batch_size: int
    cache: KVCache | None


class LoadOptions(TypedDict, total=False):
    """The options of `load` beside the model."""

    backend: Any
    dtype: str | None
    device: Any
    threads: int | None
    generic: bool
    revision: str | None
    offline: bool
    token: str | None


class AllOptions(Options, LoadOptions, total=False):
    """The options of `load` and of `Model.generate` together."""
