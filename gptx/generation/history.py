"""Steps of the sampler that depend on the tokens so far.

Each step is a function of the ids of one sequence. It returns numbers to add to the logits of some
tokens; -inf bans a token. The host computes them, because the ids of a step come back to it anyway,
and the sampler adds them on the device. So a new step of this kind is one class here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

Bias = tuple[int, float]  # token id, number to add to its logit
MAX_PENALTY = 1e6  # of DRY; a larger one can make a float32 logit overflow


class HistoryStep(Protocol):
    """A step that depends on the tokens of a sequence."""

    def __call__(self, ids: list[int], n_new: int) -> Iterable[Bias]:
        """Return biases of the next token; those of one id add up.

        Parameters
        ----------
        ids
            Token ids of the prompt and the output.
        n_new
            Number of tokens of the output.
        """


class SequenceBias:
    """A bias for the last token of a sequence of tokens, after the tokens before it.

    Source: transformers' `SequenceBiasLogitsProcessor`; with -inf, its `NoBadWordsLogitsProcessor`.

    Parameters
    ----------
    biases
        Token ids of a sequence -> number to add.
    """

    def __init__(self, biases: Mapping[tuple[int, ...], float]) -> None:
        self._single = [(ids[0], bias) for ids, bias in biases.items() if len(ids) == 1]
        # By the last token before the biased one: a request can have thousands of sequences.
        self._longer: dict[int, list[tuple[list[int], Bias]]] = {}
        for ids, bias in biases.items():
            if len(ids) > 1:
                longer = self._longer.setdefault(ids[-2], [])
                longer.append((list(ids[:-1]), (ids[-1], bias)))

    def __call__(self, ids: list[int], n_new: int) -> Iterable[Bias]:
        possible = self._longer.get(ids[-1], []) if ids else []
        return self._single + [bias for before, bias in possible if ids[-len(before) :] == before]


class NoRepeatNgram:
    """A ban of the tokens that would complete an n-gram that the sequence already has.

    Source: Paulus et al., https://arxiv.org/abs/1705.04304, as in transformers'
    `NoRepeatNGramLogitsProcessor`.

    Parameters
    ----------
    size
        n, at least 1.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, ids: list[int], n_new: int) -> Iterable[Bias]:
        n = self._size - 1
        newest = ids[len(ids) - n :]
        return [(ids[i + n], -math.inf) for i in range(len(ids) - n) if ids[i : i + n] == newest]


class Dry:
    """A penalty for tokens that would continue a repetition, which grows with its length.

    If the newest n tokens also appear earlier, `multiplier` · `base` ^ (n - `allowed_length`) is
    subtracted from the logit of the token that followed them there. The largest n of a token
    counts; n below `allowed_length` has no penalty. A breaker ends a repetition, and has no
    penalty itself.

    Source: "DRY: A modern repetition penalty",
    https://github.com/oobabooga/text-generation-webui/pull/5677; llama.cpp has the same.

    Parameters
    ----------
    newest
        Number of newest tokens to search; 0 searches all.
    breakers
        Token ids.
    """

    def __init__(
        self,
        multiplier: float,
        base: float,
        allowed_length: int,
        newest: int,
        breakers: Collection[int],
    ) -> None:
        self._multiplier, self._log_base = multiplier, math.log(base)
        self._allowed_length = allowed_length
        self._newest = newest
        self._breakers = frozenset(breakers)

    def __call__(self, ids: list[int], n_new: int) -> Iterable[Bias]:
        ids = ids[-self._newest :]
        longest: dict[int, int] = {}
        for end in range(len(ids) - 1):  # of an earlier repetition
            after = ids[end + 1]
            if ids[end] == ids[-1] and after not in self._breakers:
                longest[after] = max(longest.get(after, 0), self._length(ids, end))
        return [(id, -self._penalty(n)) for id, n in longest.items() if n >= self._allowed_length]

    def _length(self, ids: list[int], end: int) -> int:
        """Return the number of tokens that end at `end` and are the newest ones, too."""
        n = 0
        while n <= end and ids[end - n] == ids[-1 - n] and ids[end - n] not in self._breakers:
            n += 1
        return n

    def _penalty(self, n: int) -> float:
        exponent = (n - self._allowed_length) * self._log_base
        limit = math.log(MAX_PENALTY / self._multiplier)  # before the exponential overflows
        return self._multiplier * math.exp(min(exponent, limit))


class MinTokens:
    """A ban of the tokens that end a sequence, before the output has `n` tokens.

    Source: transformers' `MinNewTokensLengthLogitsProcessor`.
    """

    def __init__(self, n: int, end_ids: Collection[int]) -> None:
        self._n = n
        self._bans = [(id, -math.inf) for id in end_ids]

    def __call__(self, ids: list[int], n_new: int) -> Iterable[Bias]:
        return self._bans if n_new < self._n else []


class History:
    """The tokens of B sequences so far, for steps that depend on them.

    Attributes
    ----------
    ids
        Token ids of each sequence: the prompt and the output.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]] | None = None
    ) -> None:
        outputs = outputs or [[] for _ in prompts]
        self.ids = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
        self._n_prompt = [len(prompt) for prompt in prompts]

    def add(self, ids: Sequence[int]) -> None:
        """Add a token to each sequence, ids [B]."""
        for row, id in zip(self.ids, ids, strict=True):
            row.append(id)

    def join(self, other: History) -> None:
        """Add the sequences of another history."""
        self.ids += other.ids
        self._n_prompt += other._n_prompt

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all sequences but `rows`."""
        self.ids = [self.ids[row] for row in rows]
        self._n_prompt = [self._n_prompt[row] for row in rows]

    def bias(self, steps: Sequence[HistoryStep], vocab_size: int) -> np.ndarray | None:
        """Return the sum of the biases of some steps, float32 [B, V]; None if there are none."""
        bias = None
        for row, (ids, n_prompt) in enumerate(zip(self.ids, self._n_prompt, strict=True)):
            for step in steps:
                for id, number in step(ids, len(ids) - n_prompt):
                    if bias is None:
                        bias = np.zeros((len(self.ids), vocab_size), np.float32)
                    bias[row, id] += number
        return bias
