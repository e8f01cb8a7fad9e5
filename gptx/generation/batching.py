"""Batches: the KV cache and the sampler of some sequences, and the calls to the backend."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from gptx.backends.base import HostTokens, NextTokens
from gptx.generation.logprobs import KnownLogprobs, logprobs_of
from gptx.generation.params import SamplingParams
from gptx.generation.sampling import make_sampler
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits, prompt_logits
from gptx.model import Transformer


class Batch:
    """Sequences that are computed together.

    A decode step is two calls to the backend: `decode` starts it, `read` waits for its tokens. Of
    the other methods, only `prefill` with `prompt_logprobs` waits for the device.

    Parameters
    ----------
    params
        Sampling parameters of all sequences.
    prompts
        Token ids of each sequence.
    streams
        Stream of random numbers of each sequence.
    logprobs, top_logprobs
        Compute the log-probability of each new token; and those of the N most probable ones.
    end_ids
        Token ids that end a sequence.

    Attributes
    ----------
    prompt_logprobs
        Log-probabilities of each prompt of `prefill`, without its first token; empty if not
        requested.
    """

    cache: KVCache

    def __init__(
        self,
        model: Transformer,
        params: SamplingParams,
        prompts: list[list[int]],
        streams: list[int],
        *,
        logprobs: bool,
        top_logprobs: int = 0,
        end_ids: Collection[int] = (),
    ) -> None:
        self.model = model
        self.backend = model.backend
        self.prompt_logprobs: list[KnownLogprobs] = []
        self._options: dict[str, Any] = {"logprobs": logprobs, "top_logprobs": top_logprobs}
        vocab_size = model.config.vocab_size
        self.sampler = make_sampler(params, model.backend, prompts, streams, vocab_size, end_ids)
        self._history = self.sampler.history if params.uses_history else None

    @property
    def needs_tokens(self) -> bool:
        """True if a step of the sampler depends on the tokens of the step before, on the host."""
        return self._history is not None

    def prefill(
        self,
        prompts: list[list[int]],
        capacity: int,
        known: KVCache | None = None,
        copies: int = 1,
        prompt_logprobs: int | None = None,
    ) -> NextTokens:
        """Read prompts into a new cache of `capacity` tokens; start to sample the token after each.

        Parameters
        ----------
        known
            Cache of an earlier prompt. The tokens that a single prompt shares with it are not
            computed again, unless their log-probabilities are requested.
        copies
            Number of sequences that continue each prompt. A prompt is read once.
        prompt_logprobs
            N: compute the log-probabilities of the prompts, and of the N most probable tokens.
        """
        if prompt_logprobs is not None:
            known = None
        n_known = common_prefix(known, prompts[0]) if known and len(prompts) == 1 else 0
        if known and n_known:
            self.cache = known.prefix(n_known, capacity)
        else:
            self.cache = KVCache(self.model.config, self.model.backend, len(prompts), capacity)
        new = [ids[n_known:] for ids in prompts]
        if prompt_logprobs is None:
            logits = next_token_logits(self.model, new, self.cache)
        else:
            after_each = prompt_logits(self.model, new, self.cache)
            self.prompt_logprobs = [
                logprobs_of(
                    self.model, after_each[row, : len(ids) - 1, :], ids[1:], prompt_logprobs
                )
                for row, ids in enumerate(new)
            ]
            logits = after_each[:, -1, :]
        if copies > 1:
            rows = [row for row in range(len(prompts)) for _ in range(copies)]
            self.cache.keep(rows)
            index = self.model.backend.asarray(np.asarray(rows))
            logits = self.model.backend.xp.take(logits, index, axis=0)
        return self.backend.sample(logits, self.sampler, **self._options)

    def decode(self, tokens: NextTokens) -> NextTokens:
        """Start the step that adds `tokens` to the sequences."""
        positions = self.cache.extend([1] * len(self.cache.lengths))
        return self.backend.decode(
            self.model, tokens.ids, positions, self.cache, self.sampler, **self._options
        )

    def read(self, tokens: NextTokens) -> HostTokens:
        """Wait for the tokens of a step."""
        read = self.backend.read_tokens(tokens)
        if self._history is not None:
            self._history.add(read.ids)
        return read

    def keep(self, rows: list[int], tokens: NextTokens) -> NextTokens:
        """Drop all sequences but `rows`; return their part of `tokens`, of the newest step."""
        self.sampler.keep(rows)
        self.cache.keep(rows)
        return self.backend.keep_tokens(tokens, rows)


def common_prefix(cache: KVCache, ids: list[int]) -> int:
    """Return the number of tokens at the start of `ids` that the cache's first sequence has too.

    The last of `ids` does not count: its logits have to be computed.
    """
    n = 0
    for known, wanted in zip((cache.tokens or [[]])[0], ids[:-1], strict=False):
        if known != wanted:
            break
        n += 1
    return n
