"""The engine: prompts of token ids in, token ids out, one step at a time. It knows no text.

A batch of prompts of different lengths is one ragged prefill and then one decode step a token; each
sequence gets exactly what it would get alone. Sequences that are done leave the batch.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal, get_args

import numpy as np

from gptx.backends.base import NextTokens
from gptx.errors import NonFiniteError, ParameterError, PromptError
from gptx.generation.sampling import SamplingParams, is_int, make_sampler
from gptx.kv_cache import KVCache, pad
from gptx.model import Transformer

Array = Any
MAX_TOKENS = 100  # unless another number is asked for
Overflow = Literal["error", "truncate", "slide"]
FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Token:
    """One new token of one sequence.

    Attributes
    ----------
    sequence
        Which prompt it continues, counted from 0.
    id
        The token, or None if the sequence ended without one (an end-of-text token ended it).
    logprob
        The logarithm of the model's own probability for it, before penalties and temperature;
        None unless asked for.
    finish_reason
        "stop" or "length" if it is the sequence's last.
    """

    sequence: int
    id: int | None
    logprob: float | None
    finish_reason: FinishReason | None


class TokenGenerator:
    """The continuation of B prompts; iterate over it, once, for one list of `Token` a step.

    Parameters
    ----------
    prompts
        Token ids of each prompt, at least one each.
    params
        How to choose tokens.
    streams
        Which stream of random numbers each prompt draws from; the default is `streams_of(prompts)`.
    max_tokens
        New tokens for each prompt; None goes on to the end of the context, of which a truncated
        prompt leaves half.
    eos_id
        The token that ends a sequence; None if nothing does.
    overflow
        What to do when prompt and output do not fit the context. "error": refuse at the start.
        "truncate": drop the oldest tokens of the prompt, keeping at least half a context of it, and
        stop where the context ends. "slide": the same at the start, and whenever the context is
        full, go on with its newer half (which is computed anew).
    logprobs
        Whether to compute `Token.logprob`.
    cache
        Keys and values of an earlier prompt (one sequence); what a single prompt has in common with
        it is not computed again. It is left as it is.

    Attributes
    ----------
    prompts
        The prompts as they are used, after truncation.
    prefill_seconds
        How long the first step took: until all prompts were read and each had its first token.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        streams: list[int] | None = None,
        max_tokens: int | None = MAX_TOKENS,
        eos_id: int | None = None,
        overflow: Overflow = "error",
        logprobs: bool = False,
        cache: KVCache | None = None,
    ) -> None:
        check_limits(max_tokens, overflow)
        params.check_bias(model.config.vocab_size)
        if cache is not None and (cache.config, cache.backend) != (model.config, model.backend):
            raise ParameterError(
                "the cache belongs to another model or backend: save it, and load it for this one"
            )
        self.model = model
        self.params = params if params.seed is not None else replace(params, seed=fresh_seed())
        self.eos_id = eos_id
        self.logprobs = logprobs
        self.overflow = overflow
        self.prompts = [self._fit(check_ids(ids, model), max_tokens) for ids in prompts]
        self.streams = streams_of(self.prompts) if streams is None else streams
        self.prefill_seconds = 0.0
        n_context = model.config.n_positions
        fits = [n_context - len(ids) + 1 for ids in self.prompts]
        self._left = [
            n if max_tokens is None else max_tokens if overflow == "slide" else min(max_tokens, n)
            for n in fits
        ]
        self._rows = list(range(len(prompts)))  # which prompt each row of the batch continues
        self._finished: set[int] = set()
        self._cache = cache

    def _fit(self, ids: list[int], max_tokens: int | None) -> list[int]:
        n_context = self.model.config.n_positions
        # The last token of all is never fed back, so it needs no place in the context.
        if len(ids) + (max_tokens or 1) - 1 <= n_context:
            return ids
        if self.overflow == "error":
            if len(ids) > n_context:
                problem = f"the prompt has {len(ids)} tokens, the context holds {n_context}"
            else:
                problem = (
                    f"a prompt of {len(ids)} tokens and {max_tokens} new ones do not fit the "
                    f"context of {n_context}"
                )
            raise PromptError(
                f"{problem}: shorten it, lower max_tokens, or use overflow='truncate' or 'slide'"
            )
        room = n_context // 2 if max_tokens is None else min(max_tokens - 1, n_context // 2)
        return ids[-(n_context - room) :]

    def finish(self, sequence: int) -> None:
        """End a sequence; it takes no part in the next step."""
        self._finished.add(sequence)

    def __iter__(self) -> Iterator[list[Token]]:
        windows = [list(ids) for ids in self.prompts]  # what the cache stands for, and the newest
        backend = self.model.backend
        start = time.perf_counter()
        with backend.scope():
            batch = Batch(self, windows)
            step = batch.prefill(windows, self._capacity(windows), self._cache)
        self._cache = None
        while True:
            with backend.scope():
                # The device goes on while its newest tokens are read and looked at.
                ahead = batch.decode(step) if self._may_go_ahead(windows) else None
                host, logprobs = batch.read(step)
            if min(host) < 0:
                raise NonFiniteError(
                    "the model computed a NaN or an infinity: its weights are damaged, "
                    f"or their range is too large for {backend.dtype}"
                )
            if not self.prefill_seconds:
                self.prefill_seconds = time.perf_counter() - start
            yield [
                self._token(row, token, logprob)
                for row, token, logprob in zip(
                    self._rows, host, logprobs or repeat(None), strict=False
                )
            ]
            stay = [i for i, row in enumerate(self._rows) if row not in self._finished]
            if not stay:
                return
            for window, token in zip(windows, host, strict=True):
                window.append(token)
            with backend.scope():
                step = ahead or step
                if len(stay) < len(self._rows):
                    self._rows = [self._rows[i] for i in stay]
                    windows = [windows[i] for i in stay]
                    step = batch.keep(stay, step)
                if max(map(len, windows)) > self.model.config.n_positions:
                    windows = [self._slide(window) for window in windows]
                    step = batch.prefill(windows, self._capacity(windows))
                elif ahead is None:
                    step = batch.decode(step)

    def _may_go_ahead(self, windows: list[list[int]]) -> bool:
        """Whether the step at hand ends no sequence, as far as is known before its tokens are.

        Not so before the first tokens, which nothing is to delay.
        """
        return (
            self.model.backend.asynchronous
            and self.prefill_seconds > 0
            and min(self._left[row] for row in self._rows) > 1
            and max(map(len, windows)) < self.model.config.n_positions
        )

    def _token(self, row: int, token: int, logprob: float | None) -> Token:
        self._left[row] -= 1
        if token == self.eos_id:
            self._finished.add(row)
            return Token(row, None, None, "stop")
        if self._left[row] == 0:
            self._finished.add(row)
            return Token(row, token, logprob, "length")
        return Token(row, token, logprob, None)

    def _slide(self, window: list[int]) -> list[int]:
        n_context = self.model.config.n_positions
        return window if len(window) <= n_context else window[-(n_context - n_context // 2) :]

    def _capacity(self, windows: list[list[int]]) -> int:
        """How many positions the longest sequence will fill."""
        longest = max(
            len(window) + self._left[row] - 1
            for window, row in zip(windows, self._rows, strict=True)
        )
        return min(self.model.config.n_positions, longest)


class Batch:
    """The cache and the sampler of a `TokenGenerator`, and the calls to the backend.

    Only `read` waits for the device. A decode step is two calls: `decode`, `read`.
    """

    cache: KVCache

    def __init__(self, run: TokenGenerator, windows: list[list[int]]) -> None:
        self.model = run.model
        self.backend = run.model.backend
        self.logprobs = run.logprobs
        vocab_size = run.model.config.vocab_size
        self.sampler = make_sampler(run.params, self.backend, windows, run.streams, vocab_size)

    def prefill(
        self, windows: list[list[int]], capacity: int, known: KVCache | None = None
    ) -> NextTokens:
        """Read whole windows into a new cache."""
        common = 0
        if known is not None and len(windows) == 1:
            common = common_prefix(known, windows[0])
        if common and known is not None:
            self.cache = known.prefix(common, capacity)
        else:
            self.cache = KVCache(self.model.config, self.model.backend, len(windows), capacity)
        logits = prefill(self.model, [ids[common:] for ids in windows], self.cache)
        return self.backend.sample(logits, self.sampler, logprobs=self.logprobs)

    def decode(self, tokens: NextTokens) -> NextTokens:
        """Start the step that adds `tokens` to the sequences."""
        positions = self.cache.extend([1] * len(self.cache.lengths))
        return self.backend.decode(
            self.model, tokens.ids, positions, self.cache, self.sampler, logprobs=self.logprobs
        )

    def read(self, tokens: NextTokens) -> tuple[list[int], list[float] | None]:
        """Wait for the tokens of a step; return their ids [B] and log-probabilities [B] or None."""
        return self.backend.read_tokens(tokens)

    def keep(self, rows: list[int], tokens: NextTokens) -> NextTokens:
        """Drop all sequences but `rows`; return the tokens of the newest step without them."""
        self.sampler.keep(rows)
        self.cache.keep(rows)
        return self.backend.keep_tokens(tokens, rows)


def check_limits(max_tokens: int | None, overflow: str) -> None:
    """Raise ParameterError unless these are what `TokenGenerator` takes."""
    if overflow not in get_args(Overflow):
        raise ParameterError(
            f"overflow is {overflow!r}, expected one of {', '.join(get_args(Overflow))}"
        )
    if max_tokens is None and overflow == "slide":
        raise ParameterError("max_tokens is None, but with overflow='slide' there is no end")
    if max_tokens is not None and (not is_int(max_tokens) or max_tokens < 1):
        raise ParameterError(f"max_tokens is {max_tokens!r}, expected a whole number of at least 1")


def fresh_seed() -> int:
    """64 random bits."""
    return int.from_bytes(os.urandom(8), "little")


def streams_of(prompts: list[list[int]]) -> list[int]:
    """The stream of random numbers for each prompt: 0, and n for the n-th further copy of one.

    So a prompt of a batch gets what it gets alone, and copies of one prompt differ.
    """
    copies: Counter[tuple[int, ...]] = Counter()
    streams = []
    for ids in map(tuple, prompts):
        streams.append(copies[ids])
        copies[ids] += 1
    return streams


def prefill(model: Transformer, prompts: list[list[int]], cache: KVCache) -> Array:
    """Add prompts of any lengths to a cache; logits [B, V] of each one's next token."""
    positions = cache.extend([len(ids) for ids in prompts])
    ids = model.backend.asarray(pad(prompts))
    return model.forward(ids, positions, cache, last_only=True)[:, -1, :]


def common_prefix(cache: KVCache, ids: list[int]) -> int:
    """How many of `ids` the cache's first sequence begins with: not all, the last is computed."""
    n = 0
    for known, wanted in zip((cache.tokens or [[]])[0], ids[:-1], strict=False):
        if known != wanted:
            break
        n += 1
    return n


def check_ids(ids: Sequence[int], model: Transformer) -> list[int]:
    """Token ids as a list of ints, each in the vocabulary, at least one.

    Raises
    ------
    PromptError
        There is none, one is not an integer, or one is outside the vocabulary.
    """
    vocab_size = model.config.vocab_size
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError, OverflowError):  # lists of different lengths, say
        array = np.asarray(None)
    if array.shape == (0,):
        raise PromptError("the prompt is empty: give at least one token")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        given = " ".join(str(ids)[:60].split())
        raise PromptError(f"token ids are {given}, expected one list of whole numbers")
    if array.min() < 0 or array.max() >= vocab_size:
        bad = int(array[(array < 0) | (array >= vocab_size)][0])
        raise PromptError(f"token id is {bad}, expected 0 to {vocab_size - 1}")
    return array.tolist()
