"""Sampling: token ids from logits, on the device.

The order of the steps, each off by default:

1. `logit_bias` and `sequence_bias`: numbers to add (transformers' SequenceBiasLogitsProcessor).
2. `repetition_penalty` (Keskar et al., https://arxiv.org/abs/1909.05858).
3. `presence_penalty` and `frequency_penalty` (OpenAI's API).
4. `dry_multiplier`: DRY (github.com/oobabooga/text-generation-webui/pull/5677).
5. `no_repeat_ngram_size`, `ban`, `min_tokens`: bans (transformers' NoRepeatNGramLogitsProcessor,
   NoBadWordsLogitsProcessor and MinNewTokensLengthLogitsProcessor).
6. `logits_processor`: a function of the caller.
7. `temperature`.
8. `top_k` (Fan et al., https://arxiv.org/abs/1805.04833).
9. `top_p` (Holtzman et al., https://arxiv.org/abs/1904.09751).
10. `min_p` (Nguyen et al., https://arxiv.org/abs/2407.01082).
11. `typical_p` (Meister et al., https://arxiv.org/abs/2202.00666).
12. The draw.

It is that of transformers where both have a step; DRY has its place of llama.cpp. With temperature
0, the largest logit after step 6 selects the token. `gptx.generation.history` has the steps that
depend on the tokens so far.

A draw inverts the cumulative distribution at one uniform number per sequence and step. The numbers
come from a counter-based generator: Philox, keyed by seed and stream, counted by step. So a seed
gives the same tokens on every backend, in any batch, after any restart.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from gptx.backends import Backend
from gptx.errors import ParameterError, argument, shown
from gptx.generation.filters import draw, keep_min_p, keep_top_k, keep_top_p, keep_typical_p
from gptx.generation.history import (
    Dry,
    History,
    HistoryStep,
    MinTokens,
    NoRepeatNgram,
    SequenceBias,
)
from gptx.generation.params import SamplingParams

Array = Any
MIN_TEMPERATURE = 1e-30  # a smaller divisor can make a float32 logit overflow
# Ids in the place of a token: the model computed a NaN or an infinity; every token is banned.
NOT_FINITE, ALL_BANNED = -1, -2


def uniform(seed: int, stream: int, step: int) -> float:
    """Return random number `step` of a stream of a seed: 24 bits, 0 <= u < 1, exact in float32.

    Philox 4x64 (Salmon et al., SC 2011) computes any number without those before it.
    """
    key = np.array([seed, stream], np.uint64)
    random = np.random.Philox(key=key, counter=[step, 0, 0, 0])
    return float(int(random.random_raw()) >> 40) / 2**24


def make_sampler(
    params: SamplingParams,
    backend: Backend,
    prompts: list[list[int]],
    streams: list[int],
    vocab_size: int,
    end_ids: Collection[int] = (),
    outputs: list[list[int]] | None = None,
) -> Any:
    """Return the backend's own sampler, or a `Sampler`; same parameters.

    The backends' own samplers have no step that depends on the tokens so far.
    """
    if not params.uses_history:
        own = backend.sampler(params, prompts, streams, vocab_size, outputs)
        if own is not None:
            return own
    return Sampler(params, backend, prompts, streams, vocab_size, end_ids, outputs)


class Sampler:
    """The generic sampler of B sequences, with the state of its penalties.

    It defines what a backend's own sampler computes (`Backend.sampler`).

    Parameters
    ----------
    params
        Parameters, with token ids in the place of texts (`SamplingParams.with_ids`).
    prompts
        Token ids of each sequence, for the steps that depend on them.
    streams
        Stream of random numbers of each sequence.
    vocab_size
        V.
    end_ids
        Token ids that end a sequence, for `min_tokens`.
    outputs
        Tokens of each sequence so far; a sequence continues after them. None for none.

    Attributes
    ----------
    history
        Tokens of the sequences if a step depends on them, else None. The caller adds the tokens of
        each step (`History.add`) before the next one.
    """

    def __init__(
        self,
        params: SamplingParams,
        backend: Backend,
        prompts: list[list[int]],
        streams: list[int],
        vocab_size: int,
        end_ids: Collection[int] = (),
        outputs: list[list[int]] | None = None,
    ) -> None:
        self.params = params
        self.backend = backend
        self.streams = list(streams)
        self.seeds = [params.seed or 0] * len(prompts)
        outputs = outputs or [[] for _ in prompts]
        self.steps = [len(output) for output in outputs]
        self._bias = self._seen = self._output = None
        if params.logit_bias:
            bias = np.zeros(vocab_size, np.float32)
            bias[list(params.logit_bias)] = list(params.logit_bias.values())
            self._bias = backend.asarray(bias, "float32")
        if params.repetition_penalty != 1:
            seen = np.zeros((len(prompts), vocab_size), np.float32)
            for row, ids, output in zip(seen, prompts, outputs, strict=True):
                row[[*ids, *output]] = 1
            self._seen = backend.asarray(seen, "float32")
        if params.presence_penalty or params.frequency_penalty:
            counts = [np.bincount(output, minlength=vocab_size) for output in outputs]
            self._output = backend.asarray(np.array(counts, np.float32), "float32")
        self.history = History(prompts, outputs) if params.uses_history else None
        # The ids of a config can be beyond its vocabulary.
        ends = [id for id in end_ids if id < vocab_size]
        self._biases, self._bans = _history_steps(params, ends)

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but `rows`."""
        self.streams = [self.streams[row] for row in rows]
        self.seeds = [self.seeds[row] for row in rows]
        self.steps = [self.steps[row] for row in rows]
        index = self.backend.asarray(np.asarray(rows))
        if self._seen is not None:
            self._seen = self.backend.xp.take(self._seen, index, axis=0)
        if self._output is not None:
            self._output = self.backend.xp.take(self._output, index, axis=0)
        if self.history is not None:
            self.history.keep(rows)

    def join(self, other: Sampler) -> None:
        """Add the sequences of another sampler, whose parameters differ in the seed only."""
        concat = self.backend.xp.concat
        self.streams += other.streams
        self.seeds += other.seeds
        self.steps += other.steps
        if self._seen is not None:
            self._seen = concat([self._seen, other._seen])
        if self._output is not None:
            self._output = concat([self._output, other._output])
        if self.history is not None and other.history is not None:
            self.history.join(other.history)

    def __call__(self, logits: Array) -> tuple[Array, Any]:
        """Sample a token id from each row of logits [B, V].

        Returns
        -------
        ids
            Token ids [B] on the device; the next call may write over them. `NOT_FINITE` (-1) where
            a logit is not finite, `ALL_BANNED` (-2) where all tokens are banned.
        host_ids
            Their copy to the host, see `Backend.copy_to_host_async`.
        """
        xp, params = self.backend.xp, self.params
        finite = xp.all(xp.isfinite(logits), axis=-1)
        x = self.process(logits)
        if params.greedy:
            tokens = xp.argmax(x, axis=-1)
        else:
            u = [
                uniform(*numbers)
                for numbers in zip(self.seeds, self.streams, self.steps, strict=True)
            ]
            u_device = self.backend.asarray(np.array(u), "float32")
            tokens = draw(self.backend, self.filter(x), u_device)
        tokens = xp.astype(tokens, self.backend.int_dtype)
        self.steps = [step + 1 for step in self.steps]
        self._count(tokens, logits.shape[-1])
        if self.history is not None:
            largest = xp.max(xp.where(xp.isnan(x), math.inf, x), axis=-1)
            tokens = xp.where(xp.isfinite(largest), tokens, ALL_BANNED)
        ids = xp.where(finite, tokens, NOT_FINITE)
        return ids, self.backend.copy_to_host_async(ids)

    def process(self, logits: Array) -> Array:
        """Return logits [B, V] after the steps that a greedy choice has, too: 1 to 6."""
        x = self._penalize(logits)
        return x if self.history is None else self._process(x, self.history)

    def filter(self, x: Array) -> Array:
        """Return logits [B, V] after the steps from `temperature` to `typical_p`: 7 to 11."""
        backend, params = self.backend, self.params
        x = x / max(params.temperature, MIN_TEMPERATURE)
        x = keep_top_k(backend, x, params.top_k)
        x = keep_top_p(backend, x, params.top_p)
        x = keep_min_p(backend, x, params.min_p)
        return keep_typical_p(backend, x, params.typical_p)

    def _penalize(self, x: Array) -> Array:
        xp, params = self.backend.xp, self.params
        if self._bias is not None:
            x = x + self._bias
        x = self._add(x, self._biases)
        if self._seen is not None:
            p = params.repetition_penalty
            x = xp.where(self._seen > 0, xp.where(x > 0, x / p, x * p), x)
        if self._output is not None:
            present = xp.astype(self._output > 0, self._output.dtype)
            x = x - params.presence_penalty * present - params.frequency_penalty * self._output
        return x

    def _add(self, x: Array, steps: list[HistoryStep]) -> Array:
        """Add the biases of some steps to logits [B, V]."""
        if self.history is None or not steps:
            return x
        bias = self.history.bias(steps, x.shape[-1])
        return x if bias is None else x + self.backend.asarray(bias, "float32")

    def _process(self, x: Array, history: History) -> Array:
        """Ban tokens of logits [B, V], and call the caller's function for each row."""
        x = self._add(x, self._bans)
        processor = self.params.logits_processor
        if processor is None:
            return x
        # A copy of each row: the function may write to it, and `x` may be the model's own.
        rows = [processor(list(ids), x[i, :] + 0.0) for i, ids in enumerate(history.ids)]
        return self.backend.xp.stack([self._checked(row, x) for row in rows])

    def _checked(self, row: Any, x: Array) -> Array:
        """Return the logits of a caller's function as a row of x [B, V]."""
        if tuple(getattr(row, "shape", ())) != (x.shape[-1],):
            raise ParameterError(
                f"{argument('logits_processor')} returned {shown(row)}, "
                f"expected an array of {x.shape[-1]} logits"
            )
        if isinstance(row, np.ndarray):
            row = self.backend.asarray(row)
        return row if row.dtype == x.dtype else self.backend.xp.astype(row, x.dtype)

    def _count(self, tokens: Array, vocab_size: int) -> None:
        """Add the new tokens to the state of the penalties."""
        if self._seen is None and self._output is None:
            return
        xp = self.backend.xp
        new = xp.astype(self.backend.arange(vocab_size)[None, :] == tokens[:, None], xp.float32)
        if self._seen is not None:
            self._seen = self._seen + new
        if self._output is not None:
            self._output = self._output + new


def _history_steps(
    params: SamplingParams, end_ids: Collection[int]
) -> tuple[list[HistoryStep], list[HistoryStep]]:
    """Return the steps before the penalties of tokens, and those after them."""
    before: list[HistoryStep] = []
    if params.sequence_bias:
        before.append(SequenceBias(params.sequence_bias))
    after: list[HistoryStep] = []
    if params.dry_multiplier:
        after.append(
            Dry(
                params.dry_multiplier,
                params.dry_base,
                params.dry_allowed_length,
                params.dry_range,
                params.dry_sequence_breakers or (),
            )
        )
    if params.no_repeat_ngram_size:
        after.append(NoRepeatNgram(params.no_repeat_ngram_size))
    if params.ban:
        after.append(SequenceBias(dict.fromkeys(params.ban, -math.inf)))
    if params.min_tokens:
        after.append(MinTokens(params.min_tokens, end_ids))
    return before, after
