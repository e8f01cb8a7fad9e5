"""The definitions of the sampling filters in float64, and gptx's filters on host arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptx.backends import Backend, get_backend
from gptx.generation.sampling import SamplingParams, draw
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
