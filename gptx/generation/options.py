"""The keyword options of `load`, `generate` and `stream`, named and explained once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypedDict

import numpy as np

from gptx.errors import ParameterError
from gptx.generation.engine import Overflow, check_limits
from gptx.generation.sampling import SamplingParams, is_int
from gptx.kv_cache import KVCache

Prompt = str | Sequence[int]
BATCH_SIZE = 8
ENGINE_OPTIONS = ("max_tokens", "overflow", "logprobs", "cache")


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
        (see `gptx.generation.engine.TokenGenerator`).
    logprobs
        Return the log-probability of each token, too.
    allow_special
        Read `<|endoftext|>` in the prompt as that token, not as text.
    batch_size
        How many prompts are computed at once, default 8.
    cache
        What `Model.prefill` returned, with a single prompt: the part of the prompt that it shares
        is not computed again.
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
    """The options of `load` beside the model.

    backend, dtype, device, threads, generic, compile, cache_dtype
        See `gptx.get_backend`. Where a model is loaded for one call (`gptx.generate`, `gptx.stream`
        and the command line), the default is to compile it if that pays within the call.
    quantize
        "int8" or "int4": quantize linear layers and token embeddings; the default is to take the
        weights as they are stored.
    group_size
        How many weights share a scale, 32, 64 (default) or 128: fewer are more exact and larger.
    revision
        Branch, tag or commit on the Hub.
    offline
        Make no connection: use what was downloaded before.
    token
        For gated models on the Hub; the default is the one that `hf auth login` stored.
    """

    backend: Any
    dtype: str | None
    device: Any
    threads: int | None
    generic: bool
    compile: bool
    cache_dtype: str | None
    quantize: str | None
    group_size: int
    revision: str | None
    offline: bool
    token: str | None


class AllOptions(Options, LoadOptions, total=False):
    """The options of `load` and of `Model.generate` together."""


def check_options(options: Options) -> tuple[SamplingParams, list[str]]:
    """Check what can be checked without a model; the sampling parameters and the stop strings.

    Raises
    ------
    ParameterError
        An option is unknown or outside its range.
    """
    if unknown := set(options) - set(Options.__annotations__):
        raise ParameterError(
            f"unknown option {', '.join(sorted(unknown))}: see gptx.generation.options for those there are"
        )
    check_limits(options.get("max_tokens", 1), options.get("overflow", "error"))
    cache = options.get("cache")
    if cache is not None and not isinstance(cache, KVCache):
        raise ParameterError(f"cache is {cache!r}, expected what Model.prefill returned")
    batch_size = options.get("batch_size", BATCH_SIZE)
    if not is_int(batch_size) or batch_size < 1:
        raise ParameterError(f"batch_size is {batch_size!r}, expected a whole number of at least 1")
    given = {f.name: options[f.name] for f in fields(SamplingParams) if f.name in options}  # type: ignore[literal-required]
    return SamplingParams(**given), _stop_strings(options.get("stop"))


def _stop_strings(stop: Any) -> list[str]:
    if not isinstance(stop, str | Sequence | None):
        raise ParameterError(f"stop is {stop!r}, expected a string or several")
    strings = [stop] if isinstance(stop, str) else list(stop or [])
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ParameterError(f"stop has {string!r}, expected strings of at least one character")
    return strings


def is_ids(prompt: Any) -> bool:
    """Whether a prompt is one list of token ids, and not one of prompts."""
    return isinstance(prompt, np.ndarray) or (
        len(prompt) > 0 and isinstance(prompt[0], (int, np.integer))
    )
