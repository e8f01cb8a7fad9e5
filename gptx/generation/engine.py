"""The engine: prompts of token ids in, token ids out, one step at a time, without text.

A batch of prompts of different lengths is one ragged prefill, then one decode step for each token.
Each sequence gets the tokens of a separate run. Finished sequences leave the batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator

from gptx.backends.base import HostTokens
from gptx.errors import ParameterError, PromptError, argument
from gptx.generation.batching import Batch
from gptx.generation.logprobs import KnownLogprobs
from gptx.generation.options import MAX_TOKENS, Overflow
from gptx.generation.params import SamplingParams
from gptx.generation.results import Token
from gptx.generation.sampling import ALL_BANNED, NOT_FINITE
from gptx.kv_cache import KVCache
from gptx.logits import non_finite_error
from gptx.model import Transformer


class TokenGenerator:
    """Generator of the continuations of B prompts; iterating yields a list of `Token` each step.

    It can be iterated over once. The caller has checked the arguments.

    Parameters
    ----------
    prompts
        Token ids of each prompt, at least one each.
    params
        Sampling parameters; without a seed, the seed is 0.
    copies
        Number of sequences that continue each prompt, which is read once. Those of the first prompt
        come first.
    streams
        Stream of random numbers of each sequence; the default is `streams_of` their prompts.
    max_tokens
        Limit of new tokens for each sequence; None generates to the end of the context, of which a
        truncated prompt leaves half.
    eos_ids
        Token ids that end a sequence.
    overflow
        Action if prompt and output do not fit the context. "error" raises an error at the start.
        "truncate" drops the oldest tokens of the prompt, but keeps at least half a context of it,
        and stops at the end of the context. "slide" truncates in the same way, and whenever the
        context is full, it continues with the newer half, which is computed again.
    logprobs, top_logprobs
        Compute `Token.logprob`, and `Token.top_logprobs` of N tokens.
    prompt_logprobs
        N: compute the log-probabilities of the prompts, with those of the N most probable tokens.
    cache
        KV cache of an earlier prompt, one sequence. The tokens that a single prompt shares with it
        are not computed again. The cache does not change.

    Attributes
    ----------
    prompts
        The prompt of each sequence, after truncation.
    prompt_logprobs
        Log-probabilities of each sequence's prompt without its first token, after the first step;
        empty if not requested.
    prefill_seconds
        Seconds of the first step: until each prompt is read and has its first token.

    Raises
    ------
    PromptError
        A prompt does not fit the context, and `overflow` is "error".
    NonFiniteError
        While iterating: the model computed a NaN or an infinity.
    ParameterError
        While iterating: the options ban every token, or the result of `logits_processor` is
        invalid.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        copies: int = 1,
        streams: list[int] | None = None,
        max_tokens: int | None = MAX_TOKENS,
        eos_ids: Collection[int] = (),
        overflow: Overflow = "error",
        logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_logprobs: int | None = None,
        cache: KVCache | None = None,
    ) -> None:
        self.model = model
        self.params = params
        self.eos_ids = frozenset(eos_ids)
        self.logprobs = logprobs
        self.top_logprobs = top_logprobs
        self.prompt_logprobs: list[KnownLogprobs] = []
        n_positions = model.config.n_positions
        self._once = [
            fit_prompt(ids, n_positions, max_tokens=max_tokens, overflow=overflow)
            for ids in prompts
        ]
        self._copies, self._prompt_logprobs = copies, prompt_logprobs
        self.prompts = [ids for ids in self._once for _ in range(copies)]
        self.streams = streams_of(self.prompts) if streams is None else streams
        self.prefill_seconds = 0.0
        fits = [n_positions - len(ids) + 1 for ids in self.prompts]
        self._left = [
            n if max_tokens is None else max_tokens if overflow == "slide" else min(max_tokens, n)
            for n in fits
        ]
        self._rows = list(range(len(self.prompts)))  # index of the sequence of each row
        self._finished: set[int] = set()
        self._cache = cache
        self._batch: Batch | None = None
        self._row: list[int] = []  # tokens of the first row
        self._n_cached = 0  # number of them that its cache has, also after an interrupt

    def finish(self, sequence: int) -> None:
        """End a sequence: the next step leaves it out."""
        self._finished.add(sequence)

    def cache(self) -> KVCache | None:
        """Return a KV cache of the only sequence, of all tokens read so far; None before that.

        It holds the prompt and the output, without the newest token. After an interrupt, too.
        """
        n = self._n_cached
        if self._batch is None or n == 0:
            return None
        with self.model.backend.scope():
            cache = self._batch.cache.prefix(n, n)
        cache.tokens = [self._row[:n]]
        return cache

    def __iter__(self) -> Iterator[list[Token]]:
        windows = [list(ids) for ids in self.prompts]  # tokens of the cache, and the newest token
        backend = self.model.backend
        start = time.perf_counter()
        with backend.scope():
            self._batch = batch = Batch(
                self.model,
                self.params,
                windows,
                self.streams,
                logprobs=self.logprobs,
                top_logprobs=self.top_logprobs,
                end_ids=self.eos_ids,
            )
            capacity = self._capacity(windows)
            tokens = batch.prefill(
                self._once, capacity, self._cache, self._copies, self._prompt_logprobs
            )
            self.prompt_logprobs = [x for x in batch.prompt_logprobs for _ in range(self._copies)]
        self._cache = None
        while True:
            with backend.scope():
                # The device computes the next step while the host reads the tokens of this one.
                ahead = batch.decode(tokens) if self._may_run_ahead(windows) else None
                read = batch.read(tokens)
            self._check(read.ids)
            self._row, self._n_cached = windows[0], len(windows[0])
            if not self.prefill_seconds:
                self.prefill_seconds = time.perf_counter() - start
            yield [self._token(row, read, i) for i, row in enumerate(self._rows)]
            kept = [i for i, row in enumerate(self._rows) if row not in self._finished]
            if not kept:
                return
            for window, id in zip(windows, read.ids, strict=True):
                window.append(id)
            with backend.scope():
                tokens = ahead or tokens
                if len(kept) < len(self._rows):
                    self._rows = [self._rows[i] for i in kept]
                    windows = [windows[i] for i in kept]
                    tokens = batch.keep(kept, tokens)
                if max(map(len, windows)) > self.model.config.n_positions:
                    windows = [self._slide(window) for window in windows]
                    self._n_cached = 0
                    tokens = batch.prefill(windows, self._capacity(windows))
                elif ahead is None:
                    tokens = batch.decode(tokens)

    def _may_run_ahead(self, windows: list[list[int]]) -> bool:
        """Return True if the device can start the next step before this one's tokens are read.

        It can unless the counts of tokens show that this step ends a sequence, or a step of the
        sampler depends on its tokens. No step starts before the first tokens are read: it would
        delay them. Hooks see no step that is dropped.
        """
        return (
            self.model.backend.asynchronous
            and not self.model.has_hooks
            and not (self._batch and self._batch.needs_tokens)
            and self.prefill_seconds > 0
            and min(self._left[row] for row in self._rows) > 1
            and max(map(len, windows)) < self.model.config.n_positions
        )

    def _check(self, ids: list[int]) -> None:
        """Raise the error of a step whose sampler has no token for a sequence."""
        if NOT_FINITE in ids:
            raise non_finite_error(self.model)
        if ALL_BANNED in ids:
            raise ParameterError(
                f"no token is left after the tokens so far: {argument('logit_bias')}, "
                f"{argument('sequence_bias')}, {argument('ban')}, "
                f"{argument('no_repeat_ngram_size')}, {argument('min_tokens')} and "
                f"{argument('logits_processor')} have to leave one with a finite logit"
            )

    def _token(self, row: int, read: HostTokens, i: int) -> Token:
        """Return token `i` of a step, of the sequence `row`."""
        self._left[row] -= 1
        id = read.ids[i]
        logprob = None if read.logprobs is None else read.logprobs[i]
        top = None if read.top_logprobs is None else read.top_logprobs[i]
        if id in self.eos_ids:
            self._finished.add(row)
            return Token(row, None, logprob, "stop", top, id)
        if self._left[row] == 0:
            self._finished.add(row)
            return Token(row, id, logprob, "length", top)
        return Token(row, id, logprob, None, top)

    def _slide(self, window: list[int]) -> list[int]:
        n_positions = self.model.config.n_positions
        return window if len(window) <= n_positions else window[-(n_positions - n_positions // 2) :]

    def _capacity(self, windows: list[list[int]]) -> int:
        """Return the number of positions that the longest sequence will fill."""
        longest = max(
            len(window) + self._left[row] - 1
            for window, row in zip(windows, self._rows, strict=True)
        )
        return min(self.model.config.n_positions, longest)


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
