"""Log-probabilities of tokens that are known: those of a prompt, and of a text to score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gptx.backends.base import NextTokens
from gptx.logits import non_finite_error
from gptx.model import Transformer

Array = Any
Top = dict[int, float]  # token id -> log-probability in nats, in descending order


class KnownLogprobs(NamedTuple):
    """Log-probabilities of T tokens, in nats.

    Attributes
    ----------
    logprobs
        Log-probability of each token.
    top_logprobs
        The N most probable tokens in the place of each; None if N is 0.
    """

    logprobs: list[float]
    top_logprobs: list[Top] | None

    def joined(self, other: KnownLogprobs) -> KnownLogprobs:
        """Return these log-probabilities, and those of the tokens after them."""
        top = None
        if self.top_logprobs is not None and other.top_logprobs is not None:
            top = self.top_logprobs + other.top_logprobs
        return KnownLogprobs(self.logprobs + other.logprobs, top)


def logprobs_of(
    model: Transformer, logits: Array, ids: Sequence[int], top_logprobs: int = 0
) -> KnownLogprobs:
    """Return the log-probabilities of T token ids after logits [T, V], and of N more for each.

    It waits for the device.

    Raises
    ------
    NonFiniteError
        The model computed a NaN or an infinity.
    """
    if not ids:
        return KnownLogprobs([], [] if top_logprobs else None)
    backend = model.backend
    tokens = backend.asarray(np.asarray(ids))
    known = NextTokens(tokens, backend.copy_to_host_async(tokens))
    read = backend.read_tokens(backend.with_logprobs(known, logits, top_logprobs))
    assert read.logprobs is not None
    if not all(map(math.isfinite, read.logprobs)):
        raise non_finite_error(model)
    return KnownLogprobs(read.logprobs, read.top_logprobs)
