"""Sequences: a prompt, the parameters of its continuation, and its state in a batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from gptx.errors import PromptError, argument
from gptx.generation.logprobs import KnownLogprobs
from gptx.generation.options import MAX_TOKENS, Overflow
from gptx.generation.params import SamplingParams


@dataclass(frozen=True, eq=False)
class Sampling:
    """Parameters that the sequences of a request share.

    Attributes
    ----------
    params
        Sampling parameters; without a seed, the seed is 0.
    end_ids
        Token ids that end a sequence.
    logprobs, top_logprobs
        Compute `Token.logprob`, and `Token.top_logprobs` of N tokens.
    """

    params: SamplingParams
    end_ids: frozenset[int] = frozenset()
    logprobs: bool = False
    top_logprobs: int = 0

    @cached_property
    def without_seed(self) -> tuple[Any, ...]:
        """All parameters but the seed; sequences with equal ones can share a sampler."""
        params = replace(self.params, seed=None)
        return params, self.end_ids, self.logprobs, self.top_logprobs


@dataclass(eq=False)
class Sequence:
    """One continuation of a prompt.

    Attributes
    ----------
    prompt
        Token ids, at least one, which fit the context (see `fit_prompt`).
    sampling
        Sampling parameters and ends.
    n_left
        Number of tokens that it may still get, at least 1.
    stream
        Stream of random numbers.
    slides
        True to continue with the newer half of a full context, which is computed again.
    index
        `Token.sequence` of its tokens.
    output
        Tokens so far, without an end token. A sequence that already has some continues after them.
    window
        Tokens that are in the cache or belong there next, the newest one included; set by a batch.
    n_cached
        Number of tokens of `window` that the cache has.
    n_reused
        Number of prompt tokens that were not computed, because the cache had them.
    prompt_logprobs
        Log-probabilities of the prompt without its first token; None if not requested.
    added, prefill_seconds
        Time when it joined a batch, of `time.perf_counter`; seconds until its first token.
    """

    prompt: list[int]
    sampling: Sampling
    n_left: int
    stream: int = 0
    slides: bool = False
    index: int = 0
    output: list[int] = field(default_factory=list)
    window: list[int] = field(default_factory=list)
    n_cached: int = 0
    n_reused: int = 0
    prompt_logprobs: KnownLogprobs | None = None
    added: float = 0.0
    prefill_seconds: float = 0.0


def fit_prompt(
    ids: list[int], n_positions: int, *, max_tokens: int | None, overflow: Overflow
) -> list[int]:
    """Return the prompt if it and the output fit the context, its newest tokens otherwise.

    The last new token is never an input, so it takes no position.

    Raises
    ------
    PromptError
        They do not fit, and `overflow` is "error".
    """
    if len(ids) + (max_tokens or 1) - 1 <= n_positions:
        return ids
    if overflow == "error":
        if len(ids) > n_positions:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, the context holds {n_positions}: shorten the "
                f"prompt, or use {argument('overflow', 'truncate', 'slide')}"
            )
        given = f"{len(ids)} prompt token{'s' * (len(ids) > 1)} and {max_tokens} new tokens"
        raise PromptError(
            f"{given} exceed the context of {n_positions}: shorten the prompt, lower "
            f"{argument('max_tokens')}, or use {argument('overflow', 'truncate', 'slide')}"
        )
    half = n_positions // 2
    n_output = half if max_tokens is None else min(max_tokens - 1, half)
    return ids[-(n_positions - n_output) :]


def make_sequences(
    prompts: list[list[int]],
    sampling: Sampling,
    n_positions: int,
    *,
    copies: int = 1,
    streams: list[int] | None = None,
    max_tokens: int | None = MAX_TOKENS,
    overflow: Overflow = "error",
) -> list[list[Sequence]]:
    """Return the sequences that continue each prompt, `copies` of each.

    Parameters
    ----------
    prompts
        Token ids of each prompt, at least one each.
    n_positions
        The context.
    streams
        Stream of random numbers of each sequence; the default is `streams_of` their prompts.
    max_tokens
        Limit of new tokens for each sequence; None generates to the end of the context, of which a
        truncated prompt leaves half.
    overflow
        Action if prompt and output do not fit the context. "error" raises an error. "truncate"
        drops the oldest tokens of the prompt, but keeps at least half a context of it, and stops at
        the end of the context. "slide" truncates in the same way, and whenever the context is full,
        it continues with the newer half, which is computed again.

    Raises
    ------
    PromptError
        A prompt does not fit the context, and `overflow` is "error".
    """
    fitted = [
        fit_prompt(ids, n_positions, max_tokens=max_tokens, overflow=overflow) for ids in prompts
    ]
    if streams is None:
        streams = streams_of([ids for ids in fitted for _ in range(copies)])
    made = []
    for i, ids in enumerate(fitted):
        n = n_positions - len(ids) + 1
        if max_tokens is not None:
            n = max_tokens if overflow == "slide" else min(max_tokens, n)
        rows = range(i * copies, (i + 1) * copies)
        slides = overflow == "slide"
        made.append([Sequence(ids, sampling, n, streams[row], slides, index=row) for row in rows])
    return made


def streams_of(prompts: list[list[int]]) -> list[int]:
    """Return the stream of random numbers of each prompt: 0, and n for the n-th copy of a prompt.

    So a prompt gets the same tokens in every batch, and copies of one prompt differ.
    """
    copies: Counter[tuple[int, ...]] = Counter()
    streams = []
    for ids in map(tuple, prompts):
        streams.append(copies[ids])
        copies[ids] += 1
    return streams
