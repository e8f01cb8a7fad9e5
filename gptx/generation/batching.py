"""Batches: the KV cache and the sampler of some sequences, and the calls to the backend."""

from __future__ import annotations

from gptx.backends.base import NextTokens
from gptx.generation.sampling import SamplingParams, make_sampler
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits
from gptx.model import Transformer


class Batch:
    """Sequences that are computed together.

    A decode step is two calls to the backend: `decode` starts it, `read` waits for its tokens. No
    other method waits for the device.

    Parameters
    ----------
    params
        Sampling parameters of all sequences.
    prompts
        Token ids of each sequence.
    streams
        Stream of random numbers of each sequence.
    logprobs
        Compute the log-probability of each new token.
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
    ) -> None:
        self.model = model
        self.backend = model.backend
        self.logprobs = logprobs
        vocab_size = model.config.vocab_size
        self.sampler = make_sampler(params, model.backend, prompts, streams, vocab_size)

    def prefill(
        self, prompts: list[list[int]], capacity: int, known: KVCache | None = None
    ) -> NextTokens:
        """Read prompts into a new cache of `capacity` tokens; start to sample the token after each.

        The tokens that a single prompt shares with the cache `known` are not computed again.
        """
        n_known = common_prefix(known, prompts[0]) if known and len(prompts) == 1 else 0
        if known and n_known:
            self.cache = known.prefix(n_known, capacity)
        else:
            self.cache = KVCache(self.model.config, self.model.backend, len(prompts), capacity)
        logits = next_token_logits(self.model, [ids[n_known:] for ids in prompts], self.cache)
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
