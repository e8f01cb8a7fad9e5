"""The engine: prompts of token ids in, token ids out, one step at a time, without text."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from gptx.errors import GptxError
from gptx.generation.batching import Batch
from gptx.generation.options import MAX_TOKENS, Overflow
from gptx.generation.params import SamplingParams
from gptx.generation.results import Token
from gptx.generation.sequences import Sampling, make_sequences
from gptx.kv_cache import KVCache
from gptx.model import Transformer


class TokenGenerator:
    """Generator of the continuations of B prompts; iterating yields a list of `Token` each step.

    The prompts are read in one pass. It can be iterated over once. The caller has checked the
    arguments.

    Parameters
    ----------
    prompts, copies, streams, max_tokens, overflow
        See `gptx.generation.sequences.make_sequences`.
    params
        Sampling parameters; without a seed, the seed is 0.
    eos_ids
        Token ids that end a sequence.
    logprobs, top_logprobs
        Compute `Token.logprob`, and `Token.top_logprobs` of N tokens.
    prompt_logprobs
        N: compute the log-probabilities of the prompts, with those of the N most probable tokens.
    cache
        KV cache of an earlier prompt, one sequence. The tokens that a single prompt shares with it
        are not computed again. The cache does not change.

    Attributes
    ----------
    sequences
        The sequences; those of the first prompt come first.

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
        self._made = make_sequences(
            prompts,
            Sampling(params, frozenset(eos_ids), logprobs, top_logprobs),
            model.config.n_positions,
            copies=copies,
            streams=streams,
            max_tokens=max_tokens,
            overflow=overflow,
        )
        self.sequences = [sequence for copies in self._made for sequence in copies]
        self._prompt_logprobs = prompt_logprobs
        self._cache = cache if len(prompts) == 1 else None
        self._batch: Batch | None = None

    def finish(self, sequence: int) -> None:
        """End a sequence: the next step leaves it out."""
        if self._batch is not None:
            self._batch.remove(self.sequences[sequence])

    def cache(self) -> KVCache | None:
        """Return a KV cache of the only sequence, of all tokens read so far; None before that.

        It holds the prompt and the output, without the newest token. After an interrupt, too.
        """
        only = self.sequences[0]
        if self._batch is None or only.n_cached == 0:
            return None
        with self.model.backend.scope():
            cache = self._batch.cache.prefix(only.n_cached, only.n_cached)
        cache.tokens = [only.window[: only.n_cached]]
        return cache

    def __iter__(self) -> Iterator[list[Token]]:
        n_positions = self.model.config.n_positions
        longest = max(len(one.prompt) + one.n_left - 1 for one in self.sequences)
        with self.model.backend.scope():
            batch = Batch(self.model, len(self.sequences), min(n_positions, longest))
        self._batch = batch
        for copies in self._made:
            batch.add(copies, known=self._cache, prompt_logprobs=self._prompt_logprobs)
        self._cache = None
        while not batch.is_idle:
            tokens = []
            for _, made in batch.step():
                if isinstance(made, GptxError):
                    raise made
                tokens.append(made)
            yield tokens
