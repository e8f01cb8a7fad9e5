"""Options of `load`, `generate` and `stream`, and the checks of a request.

A request is checked once: `check_options` runs before a model is loaded, the checks of
`gptx.generation.prompts` on each prompt. The engine checks only that the prompts and their output
fit the context.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

import numpy as np

from gptx.config import GPT2Config
from gptx.errors import ParameterError, argument, shown
from gptx.generation.checks import check_bool, check_count, is_int
from gptx.generation.names import check_names
from gptx.generation.params import LogitsProcessor, SamplingParams, random_seed
from gptx.kv_cache import KVCache
from gptx.tokenization.protocol import Tokenizer

Overflow = Literal["error", "truncate", "slide"]
MAX_TOKENS = 100  # default number of new tokens for each prompt
BATCH_SIZE = 8  # default number of prompts in a batch


class OneOptions(TypedDict, total=False):
    """Options of `generate` and `stream` without `n`.

    The fields of `SamplingParams` (temperature, top_k, top_p, min_p, typical_p, repetition_penalty,
    presence_penalty, frequency_penalty, logit_bias, sequence_bias, ban, no_repeat_ngram_size,
    dry_multiplier, dry_base, dry_allowed_length, dry_range, dry_sequence_breakers, min_tokens,
    logits_processor, seed), and:

    best_of
        Number of continuations to generate for each prompt, at least `n`, of which the `n` with the
        largest mean log-probability per token are returned, best first. The default is `n`.
    max_tokens
        Limit of new tokens, default 100; None generates to the end of the context.
    stop
        A string or several: generation ends where one of them appears. The text ends before it.
    stop_token_ids
        Token ids that end a sequence, besides the end-of-text tokens of the model.
    ignore_eos
        Continue after the end-of-text tokens of the model; `stop_token_ids` still end a sequence.
    overflow
        "error" (default), "truncate" or "slide": see `gptx.generation.engine.TokenGenerator`.
    logprobs
        True: return the log-probability of each token, too. A number N: and those of the N most
        probable tokens; 0 is the same as True.
    prompt_logprobs
        The same for the tokens of the prompt. A `cache` is not used then.
    allow_special
        Read `<|endoftext|>` in the prompt as that token, not as text.
    batch_size
        Number of sequences in a batch, default 8; all copies of a prompt are in one batch.
    cache
        Result of `Model.prefill`, with a single prompt. The tokens that the prompt shares with the
        cache are not computed again.
    generation_config
        True: take the options that are not given from the model's generation_config.json, see
        `gptx.generation.suggested`.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float] | None
    sequence_bias: Mapping[str | tuple[int, ...], float] | None
    ban: str | Sequence[str | Sequence[int]] | None
    no_repeat_ngram_size: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_range: int
    dry_sequence_breakers: Sequence[str | int] | None
    min_tokens: int
    logits_processor: LogitsProcessor | None
    seed: int | None
    best_of: int | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    overflow: Overflow
    logprobs: bool | int
    prompt_logprobs: bool | int
    allow_special: bool
    batch_size: int
    cache: KVCache | None
    generation_config: bool


class Options(OneOptions, total=False):
    """Options of `generate` and `stream`: those of `OneOptions`, and:

    n
        Number of continuations of each prompt, which is read once. Copies take streams of random
        numbers of their own, as copies of a prompt in a list do; with temperature 0 they are equal.
        With `n`, `generate` returns a list: n results for each prompt, in order.
    """

    n: int | None


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


class AllOneOptions(OneOptions, LoadOptions, total=False):
    """Options of `load` and of `Model.generate` together, without `n`."""


class AllOptions(AllOneOptions, Options, total=False):
    """Options of `load` and of `Model.generate` together."""


@dataclass(frozen=True)
class CheckedOptions:
    """Options of one request, checked by `check_options`; see `Options`.

    Attributes
    ----------
    given
        The options as given.
    params
        Sampling parameters, with a random seed if the request has none.
    n, best_of
        Number of continuations to return for each prompt, None for one; and to generate.
    stop
        Stop strings.
    stop_token_ids
        Token ids that end a sequence.
    logprobs, top_logprobs
        True to return log-probabilities; the number of most probable tokens.
    prompt_logprobs
        Number of most probable tokens in the place of each prompt token; None for no
        log-probabilities of the prompt.
    """

    given: Options
    params: SamplingParams
    n: int | None
    best_of: int
    stop: list[str]
    stop_token_ids: tuple[int, ...]
    max_tokens: int | None
    ignore_eos: bool
    overflow: Overflow
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: int | None
    allow_special: bool
    batch_size: int
    cache: KVCache | None
    generation_config: bool

    @property
    def selects(self) -> bool:
        """True if more continuations are generated than are returned."""
        return self.best_of > (self.n or 1)


def check_options(options: Options) -> CheckedOptions:
    """Check everything about a request that needs no model.

    Raises
    ------
    ParameterError
        An option is unknown or outside its range, or two options contradict each other.
    """
    elsewhere = dict.fromkeys(LoadOptions.__annotations__, "gptx.load")
    check_names(options, Options.__annotations__, elsewhere)
    for name in ("ignore_eos", "allow_special", "generation_config"):
        check_bool(name, options.get(name, False))
    max_tokens, overflow = options.get("max_tokens", MAX_TOKENS), options.get("overflow", "error")
    _check_limits(max_tokens, overflow)
    cache = options.get("cache")
    if cache is not None and not isinstance(cache, KVCache):
        raise ParameterError(
            f"{argument('cache')} is {shown(cache)}, expected the result of Model.prefill "
            "or Model.load_cache"
        )
    batch_size = check_count("batch_size", options.get("batch_size", BATCH_SIZE))
    n, best_of = _check_copies(options.get("n"), options.get("best_of"))
    top_logprobs = _check_logprobs("logprobs", options.get("logprobs", False))
    given = {f.name: options[f.name] for f in fields(SamplingParams) if f.name in options}  # type: ignore[literal-required]
    if given.get("seed") is None:
        given["seed"] = random_seed()
    params = SamplingParams(**given)
    if max_tokens is not None and params.min_tokens > max_tokens:
        raise ParameterError(
            f"{argument('min_tokens')} is {params.min_tokens}, {argument('max_tokens')} is "
            f"{max_tokens}: give a smaller {argument('min_tokens')}"
        )
    return CheckedOptions(
        given=options,
        params=params,
        n=n,
        best_of=best_of,
        stop=_stop_strings(options.get("stop")),
        stop_token_ids=_stop_token_ids(options.get("stop_token_ids")),
        max_tokens=max_tokens,
        ignore_eos=options.get("ignore_eos", False),
        overflow=overflow,
        logprobs=top_logprobs is not None,
        top_logprobs=top_logprobs or 0,
        prompt_logprobs=_check_logprobs("prompt_logprobs", options.get("prompt_logprobs", False)),
        allow_special=options.get("allow_special", False),
        batch_size=batch_size,
        cache=cache,
        generation_config=bool(options.get("generation_config", False)),
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


def _check_copies(n: Any, best_of: Any) -> tuple[int | None, int]:
    """Return the number of continuations to return, None for one, and to generate."""
    n = None if n is None else check_count("n", n)
    best_of = (n or 1) if best_of is None else check_count("best_of", best_of)
    if best_of < (n or 1):
        raise ParameterError(
            f"{argument('best_of')} is {best_of}, expected at least {argument('n')}, which is {n}"
        )
    return n, best_of


def _check_logprobs(name: str, value: Any) -> int | None:
    """Return the number of most probable tokens; None for no log-probabilities."""
    if isinstance(value, bool | np.bool_) or value is None:
        return 0 if value else None
    if not is_int(value) or value < 0:
        raise ParameterError(
            f"{argument(name)} is {shown(value)}, expected True, False, or the number of most "
            "probable tokens to return, too"
        )
    return int(value)


def _stop_token_ids(given: Any) -> tuple[int, ...]:
    values = given.tolist() if hasattr(given, "tolist") else given
    if values is None:
        return ()
    if (
        isinstance(values, str | bytes | bytearray)
        or not isinstance(values, Sequence)
        or not all(map(is_int, values))
    ):
        raise ParameterError(
            f"{argument('stop_token_ids')} is {shown(given)}, expected a list of token ids"
        )
    return tuple(dict.fromkeys(int(id) for id in values))


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
