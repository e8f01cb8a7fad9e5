"""Log-probabilities of a text."""

from __future__ import annotations

import math

import numpy as np

from gptx.generation.results import Score
from gptx.logits import all_logits, non_finite_error
from gptx.model import Transformer


def score(model: Transformer, ids: list[int], stride: int) -> Score:
    """Return the log-probability of each of at least two token ids, see `Model.score`.

    Raises
    ------
    NonFiniteError
        The model computed a NaN or an infinity.
    """
    logprobs: list[float] = []
    for first in range(0, len(ids), stride):
        window = ids[first : first + model.config.n_positions + 1]
        n_done = len(logprobs) - first  # tokens of this window that earlier windows scored
        logprobs += _score_window(model, window, n_done)
        if len(logprobs) == len(ids) - 1:
            break
    if not all(map(math.isfinite, logprobs)):
        raise non_finite_error(model)
    return Score(ids, [None, *logprobs])


def _score_window(model: Transformer, window: list[int], n_done: int) -> list[float]:
    """Return the log-probabilities of `window[n_done + 1:]`, each given all before it."""
    xp, backend = model.backend.xp, model.backend
    logits = all_logits(model, window[:-1])[n_done:, :]
    targets = backend.asarray(np.asarray(window[n_done + 1 :]))[:, None]
    picked = xp.take_along_axis(backend.log_softmax(logits), targets, axis=-1)
    return [float(x) for x in backend.to_numpy(picked)[:, 0]]
