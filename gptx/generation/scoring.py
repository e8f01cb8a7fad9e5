"""The model as an object of study: the logits of every position, how probable a text is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gptx.errors import NonFiniteError
from gptx.generation.results import Score
from gptx.kv_cache import KVCache
from gptx.model import Transformer

Array = Any


def all_logits(model: Transformer, ids: list[int]) -> Array:
    """Logits [T, V] of the token after each of T token ids, which have to fit the context."""
    cache = KVCache(model.config, model.backend, 1, len(ids))
    batch = model.backend.asarray(np.asarray([ids]))
    return model.forward(batch, cache.extend([len(ids)]), cache)[0, :, :]


def score(model: Transformer, ids: list[int], stride: int) -> Score:
    """The log-probability of each of at least two token ids, see `Model.score`.

    Raises
    ------
    NonFiniteError
        The model computed a NaN or an infinity.
    """
    logprobs: list[float] = []
    for first in range(0, len(ids), stride):
        window = ids[first : first + model.config.n_positions + 1]
        done = len(logprobs) - first  # predictions of this window that the one before has made
        logprobs += _score_window(model, window, done)
        if len(logprobs) == len(ids) - 1:
            break
    if not all(map(math.isfinite, logprobs)):
        raise NonFiniteError("the model computed a NaN or an infinity: its weights are damaged")
    return Score(ids, [None, *logprobs])


def _score_window(model: Transformer, window: list[int], done: int) -> list[float]:
    """Log-probabilities of `window[done + 1:]`, each given all before it in the window."""
    xp, backend = model.backend.xp, model.backend
    logits = all_logits(model, window[:-1])[done:, :]
    targets = backend.asarray(np.asarray(window[done + 1 :]))[:, None]
    picked = xp.take_along_axis(backend.log_softmax(logits), targets, axis=-1)
    return [float(x) for x in backend.to_numpy(picked)[:, 0]]
