"""Filters: tokens that a draw can take; the draw.

Each filter takes logits [B, V] on the device, and returns them with -inf for the tokens to drop.
"""

from __future__ import annotations

import math
from typing import Any

from gptx.backends import Backend

Array = Any


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


def keep_typical_p(backend: Backend, x: Array, p: float) -> Array:
    """Return logits [B, V] with all outside the most typical set of probability `p` at -inf.

    A token is the more typical, the closer its -log(probability) is to the entropy of the
    distribution. Tokens as typical as the last one of the set are kept too.

    Source: Meister et al., "Locally Typical Sampling", https://arxiv.org/abs/2202.00666.
    """
    xp = backend.xp
    if p >= 1:
        return x
    logprobs = backend.log_softmax(x)
    probs = xp.exp(logprobs)
    zero = xp.zeros_like(probs)
    finite = xp.where(probs > 0, logprobs, zero)  # 0 · -inf is a NaN
    entropy = -xp.sum(probs * finite, axis=-1, keepdims=True)
    distance = xp.abs(-logprobs - entropy)
    order = xp.argsort(distance, axis=-1)
    ranked = xp.take_along_axis(distance, order, axis=-1)
    sorted_probs = xp.take_along_axis(probs, order, axis=-1)
    before = xp.cumulative_sum(sorted_probs, axis=-1) - sorted_probs
    largest = xp.max(xp.where(before < p, ranked, ranked[:, :1]), axis=-1, keepdims=True)
    return xp.where(distance <= largest, x, -math.inf)


def draw(backend: Backend, x: Array, u: Array) -> Array:
    """Return a token id [B] for each row of logits [B, V]: its distribution, inverted at u [B]."""
    xp = backend.xp
    cdf = xp.cumulative_sum(backend.softmax(x), axis=-1)
    passed = cdf <= u[:, None] * cdf[:, -1:]  # the last value of `cdf` may round to other than 1
    return xp.sum(xp.astype(passed, backend.int_dtype), axis=-1)
