"""Logits of token ids, without sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptx.errors import NonFiniteError
from gptx.kv_cache import KVCache
from gptx.model import Transformer

Array = Any


def all_logits(model: Transformer, ids: list[int]) -> Array:
    """Return logits [T, V] of the token after each of T token ids; T is at most the context."""
    cache = KVCache(model.config, model.backend, 1, len(ids))
    batch = model.backend.asarray(np.asarray([ids]))
    return model.forward(batch, cache.extend([len(ids)]), cache)[0, :, :]


def prompt_logits(model: Transformer, prompts: list[list[int]], cache: KVCache) -> Array:
    """Add B prompts of any lengths to a cache; return logits [B, T, V] of the token after each id.

    T is the length of the longest one; the rows after the end of a prompt repeat its last one.
    """
    positions = cache.extend([len(ids) for ids in prompts])
    return model.forward(model.backend.asarray(pad(prompts)), positions, cache)


def next_token_logits(model: Transformer, prompts: list[list[int]], cache: KVCache) -> Array:
    """Add B prompts of any lengths to a cache; return logits [B, V] of the token after each."""
    positions = cache.extend([len(ids) for ids in prompts])
    ids = model.backend.asarray(pad(prompts))
    return model.forward(ids, positions, cache, last_only=True)[:, -1, :]


def non_finite_error(model: Transformer) -> NonFiniteError:
    """Return the error for logits with a NaN or an infinity."""
    return NonFiniteError(
        "the model computed a NaN or an infinity: its weights are damaged, or their range is too "
        f"large for {model.backend.dtype}: fetch the model again, or use a wider dtype"
    )


def pad(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return token ids of different lengths as [B, T]; each repeats its last token up to T."""
    T = max(map(len, prompts))
    return np.array([[*ids, *[ids[-1]] * (T - len(ids))] for ids in prompts])
