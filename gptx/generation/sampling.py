"""Sampling: token ids from logits, on the device.

The order of the steps, each off by default: `logit_bias`, repetition penalty, presence and
frequency penalties, temperature, `top_k`, `top_p`, `min_p`, draw. With temperature 0, the largest
logit after the first three steps selects the token.

A draw inverts the cumulative distribution at one uniform number per sequence and step. The numbers
come from a counter-based generator: Philox, keyed by seed and stream, counted by step. So a seed
gives the same tokens on every backend, in any batch, after any restart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptx.backends import Backend
from gptx.errors import ParameterError, argument
from gptx.generation.checks import is_int, is_real, shown

Array = Any
MAX_PARAMETER = 1e6  # a larger parameter can make a float32 logit overflow
MIN_TEMPERATURE = 1e-30  # a smaller divisor can make a float32 logit overflow
# Smallest and largest value of each parameter.
RANGES = {
    "temperature": (0, MAX_PARAMETER),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1 / MAX_PARAMETER, MAX_PARAMETER),
    "presence_penalty": (-MAX_PARAMETER, MAX_PARAMETER),
    "frequency_penalty": (-MAX_PARAMETER, MAX_PARAMETER),
}


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling. The defaults are greedy, with every other step off.

    Attributes
    ----------
    temperature
        Divisor of the logits, at least 0; 0 takes the token with the largest logit.
    top_k
        Number of most probable tokens to keep; those as probable as the last one are kept too. 0,
        or a number above the vocabulary, keeps all.
    top_p
        Sum of probabilities, 0 to 1: the fewest most probable tokens that reach it are kept. 1
        keeps all, 0 the most probable one.
    min_p
        Least probability of a token to keep, as a factor of the largest probability, 0 to 1; 0
        keeps all.
    repetition_penalty
        Divisor of the positive logits, and factor of the negative ones, of tokens in the prompt or
        the output; above 0, 1 is off (https://arxiv.org/abs/1909.05858).
    presence_penalty, frequency_penalty
        Numbers to subtract from the logits of tokens in the output: the first once, the second for
        each occurrence; 0 is off.
    logit_bias
        Token id -> number to add to its logit; -inf bans the token.
    seed
        Whole number, 0 to 2^64 - 1; None takes a random one below 2^53.

    Raises
    ------
    ParameterError
        A parameter is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not is_real(value) or not low <= value <= high:
                raise ParameterError(
                    f"{argument(name)} is {shown(value)}, "
                    f"expected a number from {low:g} to {high:g}"
                )
            # A NumPy scalar turns float32 arrays into float64.
            object.__setattr__(self, name, float(value))
        if not is_int(self.top_k) or self.top_k < 0:
            raise ParameterError(
                f"{argument('top_k')} is {shown(self.top_k)}, "
                "expected a whole number of at least 0 (0 keeps all)"
            )
        if self.seed is not None and not (is_int(self.seed) and 0 <= self.seed < 2**64):
            raise ParameterError(
                f"{argument('seed')} is {shown(self.seed)}, "
                "expected a whole number from 0 to 2^64 - 1"
            )
        object.__setattr__(self, "top_k", int(self.top_k))
        object.__setattr__(self, "seed", None if self.seed is None else int(self.seed))
        # Callers may give None for no bias.
        if not isinstance(self.logit_bias, Mapping | None):
            raise ParameterError(
                f"{argument('logit_bias')} is {shown(self.logit_bias)}, "
                "expected a dict of token id: number"
            )
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        for token, bias in self.logit_bias.items():
            if not is_int(token) or not is_real(bias):
                raise ParameterError(
                    f"{argument('logit_bias')} has {shown(token)}: {shown(bias)}, "
                    "expected id: number"
                )
            if not (abs(bias) <= MAX_PARAMETER or bias == -math.inf):
                raise ParameterError(
                    f"{argument('logit_bias')} of token {token} is {bias}, "
                    f"expected -inf, or a number from {-MAX_PARAMETER:g} to {MAX_PARAMETER:g}"
                )

    def check_bias(self, vocab_size: int) -> None:
        """Raise ParameterError unless `logit_bias` fits a vocabulary of V tokens."""
        if bad := [token for token in self.logit_bias if not 0 <= token < vocab_size]:
            raise ParameterError(
                f"{argument('logit_bias')} has token {bad[0]}, expected 0 to {vocab_size - 1}"
            )
        if sum(bias == -math.inf for bias in self.logit_bias.values()) == vocab_size:
            raise ParameterError(f"{argument('logit_bias')} bans every token: leave at least one")

    @property
    def greedy(self) -> bool:
        """True if each step takes the token with the largest logit."""
        return self.temperature == 0


def random_seed() -> int:
    """Return a seed of 53 random bits: readers of JSON that use floats hold it exactly."""
    return int.from_bytes(os.urandom(8), "little") >> 11


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
) -> Any:
    """Return the backend's own sampler, or a `Sampler` if it has none; same parameters."""
    own = backend.sampler(params, prompts, streams, vocab_size)
    return Sampler(params, backend, prompts, streams, vocab_size) if own is None else own


class Sampler:
    """The generic sampler of B sequences, with the state of its penalties.

    It defines what a backend's own sampler computes (`Backend.sampler`).

    Parameters
    ----------
    prompts
        Token ids of each sequence, for the repetition penalty.
    streams
        Stream of random numbers of each sequence.
    vocab_size
        V.
    """

    def __init__(
        self,
        params: SamplingParams,
        backend: Backend,
        prompts: list[list[int]],
        streams: list[int],
        vocab_size: int,
    ) -> None:
        self.params = params
        self.backend = backend
        self.streams = list(streams)
        self.steps = [0] * len(prompts)
        self._bias = self._seen = self._output = None
        if params.logit_bias:
            bias = np.zeros(vocab_size, np.float32)
            bias[list(params.logit_bias)] = list(params.logit_bias.values())
            self._bias = backend.asarray(bias, "float32")
        if params.repetition_penalty != 1:
            seen = np.zeros((len(prompts), vocab_size), np.float32)
            for row, ids in zip(seen, prompts, strict=True):
                row[ids] = 1
            self._seen = backend.asarray(seen, "float32")
        if params.presence_penalty or params.frequency_penalty:
            zeros = np.zeros((len(prompts), vocab_size), np.float32)
            self._output = backend.asarray(zeros, "float32")

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but `rows`."""
        self.streams = [self.streams[row] for row in rows]
        self.steps = [self.steps[row] for row in rows]
        index = self.backend.asarray(np.asarray(rows))
        if self._seen is not None:
            self._seen = self.backend.xp.take(self._seen, index, axis=0)
        if self._output is not None:
            self._output = self.backend.xp.take(self._output, index, axis=0)

    def __call__(self, logits: Array) -> tuple[Array, Any]:
        """Sample a token id from each row of logits [B, V]; -1 where a logit is not finite.

        Returns
        -------
        ids
            Token ids [B] on the device; the next call may write over them.
        host_ids
            Their copy to the host, see `Backend.copy_to_host_async`.
        """
        xp, params = self.backend.xp, self.params
        finite = xp.all(xp.isfinite(logits), axis=-1)
        x = self._penalize(logits)
        if params.greedy:
            tokens = xp.argmax(x, axis=-1)
        else:
            u = [
                uniform(params.seed or 0, stream, step)
                for stream, step in zip(self.streams, self.steps, strict=True)
            ]
            x = x / max(params.temperature, MIN_TEMPERATURE)
            x = keep_top_k(self.backend, x, params.top_k)
            x = keep_top_p(self.backend, x, params.top_p)
            x = keep_min_p(self.backend, x, params.min_p)
            tokens = draw(self.backend, x, self.backend.asarray(np.array(u), "float32"))
        tokens = xp.astype(tokens, self.backend.int_dtype)
        self.steps = [step + 1 for step in self.steps]
        self._count(tokens, logits.shape[-1])
        ids = xp.where(finite, tokens, -xp.ones_like(tokens))
        return ids, self.backend.copy_to_host_async(ids)

    def _penalize(self, x: Array) -> Array:
        xp, params = self.backend.xp, self.params
        if self._bias is not None:
            x = x + self._bias
        if self._seen is not None:
            p = params.repetition_penalty
            x = xp.where(self._seen > 0, xp.where(x > 0, x / p, x * p), x)
        if self._output is not None:
            present = xp.astype(self._output > 0, self._output.dtype)
            x = x - params.presence_penalty * present - params.frequency_penalty * self._output
        return x

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


def keep_top_k(backend: Backend, x: Array, k: int) -> Array:
    """Return logits [B, V] with all but the `k` largest, and those equal to the last, at -inf."""
    xp, V = backend.xp, x.shape[-1]
    if k == 0 or k >= V:
        return x
    least = xp.sort(x, axis=-1)[:, V - k : V - k + 1]
    return xp.where(x >= least, x, -math.inf)


def keep_top_p(backend: Backend, x: Array, p: float) -> Array:
    """Return logits [B, V] with all outside the smallest set of probability `p` at -inf."""
    xp = backend.xp
    if p >= 1:
        return x
    probs = backend.softmax(x)
    ranked = -xp.sort(-probs, axis=-1)  # in descending order
    before = xp.cumulative_sum(ranked, axis=-1) - ranked
    largest = ranked[:, :1]
    least = xp.min(xp.where(before < p, ranked, largest), axis=-1, keepdims=True)
    return xp.where(probs >= least, x, -math.inf)


def keep_min_p(backend: Backend, x: Array, p: float) -> Array:
    """Return logits [B, V] with tokens less than `p` times as probable as the best one at -inf."""
    xp = backend.xp
    if p <= 0:
        return x
    return xp.where(x >= xp.max(x, axis=-1, keepdims=True) + math.log(p), x, -math.inf)


def draw(backend: Backend, x: Array, u: Array) -> Array:
    """Return a token id [B] for each row of logits [B, V]: its distribution, inverted at u [B]."""
    xp = backend.xp
    cdf = xp.cumulative_sum(backend.softmax(x), axis=-1)
    passed = cdf <= u[:, None] * cdf[:, -1:]  # the last value of `cdf` may round to other than 1
    return xp.sum(xp.astype(passed, backend.int_dtype), axis=-1)
