"""Log-probabilities of texts, and of continuations of one context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gptx.generation.logprobs import KnownLogprobs, logprobs_of
from gptx.generation.results import Score
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits, prompt_logits
from gptx.model import Transformer

MAX_BATCH_LOGITS = 2**27  # 0.5 GB in float32


class Window(NamedTuple):
    """A part of a text that the model reads in one pass.

    Attributes
    ----------
    text
        Index of the text.
    ids
        Token ids, of which the last one is no input.
    n_done
        Number of tokens after the first one that windows before have scored.
    """

    text: int
    ids: list[int]
    n_done: int


def score_texts(
    model: Transformer,
    texts: Sequence[list[int]],
    stride: int,
    top_logprobs: int,
    batch_size: int,
) -> list[Score]:
    """Return the log-probabilities of texts of at least two token ids each, see `Model.score`.

    Raises
    ------
    NonFiniteError
        The model computed a NaN or an infinity.
    """
    windows = [
        window
        for text, ids in enumerate(texts)
        for window in windows_of(text, ids, stride, model.config.n_positions)
    ]
    # Windows of like lengths need little padding; those of one text stay in order.
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    found: dict[int, KnownLogprobs] = {}
    for batch in _batches(model, order, [len(window.ids) - 1 for window in windows], batch_size):
        inputs = [windows[i].ids[:-1] for i in batch]
        cache = KVCache(model.config, model.backend, len(batch), max(map(len, inputs)))
        logits = prompt_logits(model, inputs, cache)
        for row, i in enumerate(batch):
            window = windows[i]
            found[i] = logprobs_of(
                model,
                logits[row, window.n_done : len(window.ids) - 1, :],
                window.ids[window.n_done + 1 :],
                top_logprobs,
            )
    scores = []
    for text, ids in enumerate(texts):
        known = KnownLogprobs([], [] if top_logprobs else None)
        for i, window in enumerate(windows):
            if window.text == text:
                known = known.joined(found[i])
        top = known.top_logprobs
        scores.append(Score(ids, [None, *known.logprobs], None if top is None else [None, *top]))
    return scores


def windows_of(text: int, ids: list[int], stride: int, n_positions: int) -> list[Window]:
    """Split a text into windows, `stride` tokens apart; each token is scored in one of them."""
    windows, n_scored = [], 0
    for first in range(0, len(ids), stride):
        window = ids[first : first + n_positions + 1]
        windows.append(Window(text, window, n_scored - first))
        n_scored = first + len(window) - 1
        if n_scored == len(ids) - 1:
            break
    return windows


def score_choices(
    model: Transformer,
    context: list[int],
    choices: Sequence[list[int]],
    top_logprobs: int,
    batch_size: int,
) -> list[Score]:
    """Return the log-probabilities of token ids after a context, which is computed once.

    Raises
    ------
    NonFiniteError
        The model computed a NaN or an infinity.
    """
    S = len(context)
    cache = KVCache(model.config, model.backend, 1, S)
    first = next_token_logits(model, [context], cache)
    found = [logprobs_of(model, first, ids[:1], top_logprobs) for ids in choices]
    lengths = [len(ids) - 1 for ids in choices]
    longer = [i for i, n in enumerate(lengths) if n > 0]
    for batch in _batches(model, longer, lengths, batch_size):
        inputs = [choices[i][:-1] for i in batch]
        capacity = S + max(map(len, inputs))
        rows = KVCache(model.config, model.backend, len(batch), capacity)
        rows.copy(S, range(len(batch)), cache)
        logits = prompt_logits(model, inputs, rows)
        for row, i in enumerate(batch):
            known = logprobs_of(model, logits[row, : lengths[i], :], choices[i][1:], top_logprobs)
            found[i] = found[i].joined(known)
    return [
        Score(
            ids,
            list(known.logprobs),
            None if known.top_logprobs is None else list(known.top_logprobs),
        )
        for ids, known in zip(choices, found, strict=True)
    ]


def _batches(
    model: Transformer, order: Sequence[int], lengths: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Split indices into batches, whose logits [B, T, V] have at most `MAX_BATCH_LOGITS` numbers.

    One sequence alone may have more.
    """
    batches: list[list[int]] = []
    longest = 0
    for i in order:
        longest = max(longest, lengths[i])
        if batches and len(batches[-1]) < batch_size:
            n = (len(batches[-1]) + 1) * longest * model.config.vocab_size
            if n <= MAX_BATCH_LOGITS:
                batches[-1].append(i)
                continue
        batches.append([i])
        longest = lengths[i]
    return batches
