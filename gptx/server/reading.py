"""A text on its way through a model, a chunk of tokens at a time, for `POST /inspect`.

Each method is one bounded piece of work for the engine thread, so that other requests have their
steps in between: a chunk through all layers, or a chunk of one activation through the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptx.generation.logprobs import KnownLogprobs, logprobs_of
from gptx.generation.text_model import Model
from gptx.hooks import Site, logits_from
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits, non_finite_error

Array = Any
CHUNK_TOKENS = 64  # of one piece of work: 13 MB of logits with GPT-2's vocabulary
EMBEDDINGS = "h.0.resid_pre"


class Reading:
    """The activations of one text, read chunk by chunk; its methods run in the engine thread.

    Parameters
    ----------
    ids
        S token ids, at most the context.
    streams
        Names of residual streams [1, S, C] to keep on the device.
    attention
        Layer of the attention pattern to keep; None for none.
    first
        Position from which residual streams are kept.
    stop
        Position before which the text is read; None for its end.

    Attributes
    ----------
    chunks
        Positions of each chunk, first and after the last.
    patterns
        Weights of the tokens attended to, NumPy float16 [H, S, S]; None if not requested.
    """

    def __init__(
        self,
        ids: Sequence[int],
        streams: Sequence[str],
        *,
        attention: int | None = None,
        first: int = 0,
        stop: int | None = None,
    ) -> None:
        self.ids = list(ids)
        self.chunks = _chunks(0, first) + _chunks(first, len(ids) if stop is None else stop)
        self.patterns: np.ndarray | None = None
        self._first = first
        self._streams: dict[str, dict[int, Array]] = {name: {} for name in streams}
        self._attention = None if attention is None else f"h.{attention}.attn.pattern"
        self._cache: KVCache | None = None

    @property
    def kept(self) -> list[tuple[int, int]]:
        """The chunks of which residual streams are kept."""
        return [chunk for chunk in self.chunks if chunk[0] >= self._first]

    def read(self, model: Model, chunk: tuple[int, int]) -> None:
        """Read a chunk of the text; the chunks come in their order.

        Raises
        ------
        NonFiniteError
            The model computed a NaN or an infinity.
        """
        start, stop = chunk
        names = [*self._streams, *([self._attention] if self._attention else [])]
        with model.backend.scope(), model.hooks(dict.fromkeys(names, self._keep)):
            if self._cache is None:
                self._cache = KVCache(model.config, model.backend, 1, len(self.ids))
            logits = next_token_logits(model.gpt2, [self.ids[start:stop]], self._cache)
            if not np.isfinite(model.backend.to_numpy(logits)).all():
                raise non_finite_error(model.gpt2)

    def _keep(self, x: Array, site: Site) -> None:
        start = int(site.positions[0, 0])
        if site.name != self._attention:
            if start >= self._first:
                self._streams[site.name][start] = x
            return
        rows = np.asarray(site.backend.to_numpy(x)[0], np.float16)  # [H, T, S so far]
        if self.patterns is None:
            size = len(self.ids)
            self.patterns = np.zeros((len(rows), size, size), np.float16)
        self.patterns[:, start : start + rows.shape[1], : rows.shape[2]] = rows

    def top(self, model: Model, name: str, chunk: tuple[int, int], n: int) -> KnownLogprobs:
        """Return the log-probabilities that the head gives a residual stream of a chunk.

        For each position: that of the token after it (of token 0 at the end of the text), and of
        the `n` most probable tokens.

        Raises
        ------
        NonFiniteError
            The model computed a NaN or an infinity.
        """
        start, stop = chunk
        targets = [*self.ids[start + 1 : stop + 1], 0][: stop - start]
        with model.backend.scope():
            logits = logits_from(model.gpt2, last_stream(model), self._streams[name][start])
            return logprobs_of(model.gpt2, logits[0, :, :], targets, n)


def stream_of(layer: int) -> str:
    """Return the name of the residual stream after a layer."""
    return f"h.{layer}.resid_post"


def last_stream(model: Model) -> str:
    """Return the name of the residual stream after the last layer."""
    return stream_of(model.config.n_layer - 1)


def _chunks(start: int, stop: int) -> list[tuple[int, int]]:
    """Split positions into chunks of at most `CHUNK_TOKENS`."""
    return [
        (first, min(first + CHUNK_TOKENS, stop)) for first in range(start, stop, CHUNK_TOKENS)
    ]
