"""The definitions of the sampling filters in float64, and gptx's filters on host arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptx.backends import Backend, get_backend
from gptx.generation.filters import draw
from gptx.generation.params import SamplingParams
from gptx.generation.sampling import make_sampler as new_sampler

Floats = NDArray[np.floating[Any]]
INF = math.inf
NUMPY = get_backend("numpy")

# The definitions, in float64 NumPy, of one row.


def softmax(x: Floats) -> Floats:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def top_k(x: Floats, k: int) -> Floats:
    if k == 0:
        return x
    least = sorted(x, reverse=True)[min(k, len(x)) - 1]
    return np.where(x < least, -INF, x)


def top_p(x: Floats, p: float) -> Floats:
    if p == 1:
        return x
    probs = softmax(x)
    total = 0.0
    for least in sorted(probs, reverse=True):
        total += least
        if total >= p:
            break
    return np.where(probs < least, -INF, x)


def min_p(x: Floats, p: float) -> Floats:
    probs = softmax(x)
    return np.where(probs < p * probs.max(), -INF, x)


def typical_p(x: Floats, p: float) -> Floats:
    if p == 1:
        return x
    probs = softmax(x)
    surprise = -np.log(probs, where=probs > 0, out=np.full(len(x), -INF))
    entropy = sum(q * s for q, s in zip(probs, surprise, strict=True) if q > 0)
    distance = np.abs(surprise - entropy)
    total = 0.0
    for i in sorted(range(len(x)), key=lambda i: distance[i]):
        total += probs[i]
        if total >= p:
            break
    return np.where(distance > distance[i], -INF, x)


def dry(
    ids: list[int],
    vocab_size: int,
    multiplier: float,
    base: float,
    allowed_length: int,
    range: int,
    sequence_breakers: list[int],
) -> Floats:
    """Return the penalty of DRY for each token, [V].

    Source: https://github.com/oobabooga/text-generation-webui/pull/5677: a token that would
    continue a sequence of n tokens, which ends the text and appears before, has the penalty
    multiplier · base ^ (n - allowed_length), for the largest n of at least allowed_length. No
    sequence has a breaker.
    """
    ids = ids[-range:] if range else ids
    penalty = np.zeros(vocab_size)
    for n in [n for n in np.arange(1, len(ids)) if n >= allowed_length]:  # the largest comes last
        newest = ids[-n:]
        if set(newest) & set(sequence_breakers):
            break
        for end in np.arange(n, len(ids)):
            if ids[end - n : end] == newest and ids[end] not in sequence_breakers:
                penalty[ids[end]] = multiplier * base ** (n - allowed_length)
    return penalty


def run_filter(
    keep: Callable[[Backend, Any, Any], Any], backend: Backend, x: Floats, at: float
) -> Floats:
    """Return the result of a filter of gptx on host logits [B, V]."""
    kept = keep(backend, backend.asarray(x.astype(np.float32), "float32"), at)
    return np.asarray(backend.to_numpy(kept))


def run_draw(backend: Backend, x: Floats, u: Floats) -> NDArray[np.integer[Any]]:
    """Return the result of `draw` on host logits [B, V] and host numbers [B]."""
    logits = backend.asarray(x.astype(np.float32), "float32")
    return np.asarray(backend.to_numpy(draw(backend, logits, backend.asarray(u, "float32"))))


class BackendSampler(NamedTuple):
    """A backend and its sampler."""

    backend: Backend
    sampler: Any


def make_sampler(
    backend: Backend,
    shape: tuple[int, ...],
    *,
    prompts: list[list[int]] | None = None,
    streams: list[int] | None = None,
    **params: Any,
) -> BackendSampler:
    n_rows, vocab_size = shape
    sampler = new_sampler(
        SamplingParams(**params),
        backend,
        [[]] * n_rows if prompts is None else prompts,
        list(range(n_rows)) if streams is None else streams,
        vocab_size,
    )
    return BackendSampler(backend, sampler)


def step(made: BackendSampler, logits: Any) -> list[int]:
    """Sample a token from each row of host logits [B, V], as the engine does."""
    backend, sampler = made
    with backend.scope():
        x = backend.asarray(np.asarray(logits, np.float32), "float32")
        return backend.read_tokens(backend.sample(x, sampler))[0]
