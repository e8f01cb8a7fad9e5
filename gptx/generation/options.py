"""Options of `load`, `generate` and `stream`, and the checks of a request.

A request is checked once: `check_options` runs before a model is loaded, the checks of
`gptx.generation.prompts` on each prompt. The engine checks only that the prompts and their output
fit the context.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from gptx.config import GPT2Config
from gptx.errors import ParameterError, argument
from gptx.generation.checks import check_bool, is_int, shown
from gptx.generation.names import check_names
from gptx.generation.sampling import SamplingParams, random_seed
from gptx.kv_cache import KVCache
from gptx.tokenization.protocol import Tokenizer

Overflow = Literal["error", "truncate", "slide"]
MAX_TOKENS = 100  # default number of new tokens for each prompt
BATCH_SIZE = 8  # default number of prompts in a batch


class Options(TypedDict, total=False):
    """Options of `generate` and `stream`.

    The fields of `SamplingParams` (temperature, top_k, top_p, min_p, repetition_penalty,
    presence_penalty, frequency_penalty, logit_bias, seed), and:

    max_tokens
        Limit of new tokens, default 100; None generates to the end of the context.
    stop
        A string or several: generation ends where one of them appears. The text ends before it.
    ignore_eos
        Continue after the end-of-text token.
    overflow
        "error" (default), "truncate" or "slide": see `gptx.generation.engine.TokenGenerator`.
    logprobs
        Return the log-probability of each token, too.
    allow_special
        Read `<|endoftext|>` in the prompt as that token, not as text.
    batch_size
        Number of prompts in a batch, default 8.
    cache
        Result of `Model.prefill`, with a single prompt. The tokens that the prompt shares with the
        cache are not computed again.
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
    """Options of `load`.

    backend, dtype, device, threads, generic, compile, cache_dtype
        See `gptx.get_backend`. `gptx.generate`, `gptx.stream` and the command line load a model for
        one call: by default they compile it only if that pays within the call.
    quantize
        "int8" or "int4": quantize linear layers and token embeddings. By default the weights stay
        as stored.
    group_size
        Number of weights that share a scale: 32, 64 (default) or 128. Smaller groups are more exact
        and take more memory.
    config
        A config.json or a `GPT2Config`, for a file without a complete configuration, such as the
        number of heads. It replaces the configuration of the model.
    tokenizer
        A folder with a tokenizer's files, a model that has a tokenizer, such as "gpt2", or a
        `gptx.Tokenizer`: any object with encode, decode and vocab_size. It replaces the tokenizer
        of the model.
    ignore_unknown
        Leave out tensors that a GPT-2 does not have, with a warning. Otherwise they are an error.
    revision
        Branch, tag or commit on the Hub.
    offline
        Make no connection; use files of earlier downloads.
    token
        Access token for gated models on the Hub; by default the one that `hf auth login` stored.
    """

    backend: Any
    dtype: str | Any
    device: Any
    threads: int | None
    generic: bool
    compile: bool
    cache_dtype: str | Any
    quantize: str | None
    group_size: int
    config: str | os.PathLike[str] | GPT2Config | None
    tokenizer: str | os.PathLike[str] | Tokenizer | None
    ignore_unknown: bool
    revision: str | None
    offline: bool
    token: str | None


class AllOptions(Options, LoadOptions, total=False):
    """Options of `load` and of `Model.generate` together."""


@dataclass(frozen=True)
class CheckedOptions:
    """Options of one request, checked by `check_options`; see `Options`.

    Attributes
    ----------
    params
        Sampling parameters, with a random seed if the request has none.
    stop
        Stop strings.
    """

    params: SamplingParams
    stop: list[str]
    max_tokens: int | None
    ignore_eos: bool
    overflow: Overflow
    logprobs: bool
    allow_special: bool
    batch_size: int
    cache: KVCache | None


def check_options(options: Options) -> CheckedOptions:
    """Check everything about a request that needs no model.

    Raises
    ------
    ParameterError
        An option is unknown or outside its range.
    """
    elsewhere = dict.fromkeys(LoadOptions.__annotations__, "gptx.load")
    check_names(options, Options.__annotations__, elsewhere)
    for name in ("ignore_eos", "logprobs", "allow_special"):
        check_bool(name, options.get(name, False))
    max_tokens, overflow = options.get("max_tokens", MAX_TOKENS), options.get("overflow", "error")
    _check_limits(max_tokens, overflow)
    cache = options.get("cache")
    if cache is not None and not isinstance(cache, KVCache):
        raise ParameterError(
            f"{argument('cache')} is {shown(cache)}, expected the result of Model.prefill "
            "or Model.load_cache"
        )
    batch_size = options.get("batch_size", BATCH_SIZE)
    if not is_int(batch_size) or batch_size < 1:
        raise ParameterError(
            f"{argument('batch_size')} is {shown(batch_size)}, "
            "expected a whole number of at least 1"
        )
    given = {f.name: options[f.name] for f in fields(SamplingParams) if f.name in options}  # type: ignore[literal-required]
    if given.get("seed") is None:
        given["seed"] = random_seed()
    return CheckedOptions(
        params=SamplingParams(**given),
        stop=_stop_strings(options.get("stop")),
        max_tokens=max_tokens,
        ignore_eos=options.get("ignore_eos", False),
        overflow=overflow,
        logprobs=options.get("logprobs", False),
        allow_special=options.get("allow_special", False),
        batch_size=int(batch_size),
        cache=cache,
    )


def check_load_options(options: LoadOptions) -> None:
    """Check the names of options of `load`, and the values that no other function checks.

    Raises
    ------
    ParameterError
        An option is unknown or of another type.
    """
    elsewhere = dict.fromkeys(Options.__annotations__, "generate")
    check_names(options, LoadOptions.__annotations__, elsewhere)
    for name in ("generic", "compile", "ignore_unknown", "offline"):
        check_bool(name, options.get(name, False))
    for name in ("revision", "token"):
        value = options.get(name)
        if value is not None and not isinstance(value, str):
            raise ParameterError(f"{argument(name)} is {shown(value)}, expected a string")


def _check_limits(max_tokens: int | None, overflow: str) -> None:
    if overflow not in get_args(Overflow):
        raise ParameterError(
            f"{argument('overflow')} is {shown(overflow)}, "
            f"expected one of {', '.join(get_args(Overflow))}"
        )
    if max_tokens is None and overflow == "slide":
        raise ParameterError(
            f"{argument('max_tokens')} is None, expected a number with "
            f"{argument('overflow', 'slide')}, which has no end"
        )
    if max_tokens is not None and (not is_int(max_tokens) or max_tokens < 1):
        raise ParameterError(
            f"{argument('max_tokens')} is {shown(max_tokens)}, "
            "expected a whole number of at least 1"
        )


def _stop_strings(stop: Any) -> list[str]:
    if not isinstance(stop, str | Sequence | None) or isinstance(stop, bytes | bytearray):
        raise ParameterError(
            f"{argument('stop')} is {shown(stop)}, expected a string or a list of strings"
        )
    strings = [stop] if isinstance(stop, str) else list(stop or [])
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ParameterError(
                f"{argument('stop')} has {shown(string)}, "
                "expected strings of at least one character"
            )
    return strings
