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
from gptx.hooks import Site, logits_from, with_hooks
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits, non_finite_error, prompt_logits
from gptx.model import Transformer

Array = Any
CHUNK_TOKENS = 64  # of one piece of work: 13 MB of logits with GPT-2's vocabulary
EMBEDDINGS = "h.0.resid_pre"


class Reading:
    """The activations and probabilities of one text; its methods run in one thread.

    Parameters
    ----------
    ids
        S token ids, at most the context.
    top
        Number of most probable tokens at each position; 0 for no log-probabilities.
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
    known
        Log-probability of each token after the first one, and of token 0 at the end of the text;
        the most probable tokens in these places.
    patterns
        Weights of the tokens attended to, NumPy float16 [H, S, S]; None if not requested.
    """

    def __init__(
        self,
        ids: Sequence[int],
        *,
        top: int = 0,
        streams: Sequence[str] = (),
        attention: int | None = None,
        first: int = 0,
        stop: int | None = None,
    ) -> None:
        self.ids = list(ids)
        self.chunks = _chunks(0, first) + _chunks(first, len(ids) if stop is None else stop)
        self.known = KnownLogprobs([], [])
        self.patterns: np.ndarray | None = None
        self._top = top
        self._first = first
        self._streams: dict[str, dict[int, Array]] = {name: {} for name in streams}
        self._attention = None if attention is None else f"h.{attention}.attn.pattern"
        self._model: Transformer | None = None
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
        ids = self.ids[slice(*chunk)]
        with model.backend.scope():
            gpt2, cache = self._begin(model)
            if self._top:
                logits = prompt_logits(gpt2, [ids], cache)[0, :, :]
                known = logprobs_of(gpt2, logits, self._targets(chunk), self._top)
                self.known = self.known.joined(known)
            else:
                logits = next_token_logits(gpt2, [ids], cache)
                if not np.isfinite(model.backend.to_numpy(logits)).all():
                    raise non_finite_error(gpt2)

    def _begin(self, model: Model) -> tuple[Transformer, KVCache]:
        """Return the model with hooks, if something is kept, and the KV cache of the text."""
        if self._model is None or self._cache is None:
            names = [*self._streams, *([self._attention] if self._attention else [])]
            self._model = with_hooks(model.gpt2, dict.fromkeys(names, self._keep))
            self._cache = KVCache(model.config, model.backend, 1, len(self.ids))
        return self._model, self._cache

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

    def _targets(self, chunk: tuple[int, int]) -> list[int]:
        """Return the token after each of a chunk; token 0 at the end of the text."""
        start, stop = chunk
        return [*self.ids[start + 1 : stop + 1], 0][: stop - start]

    def top(self, model: Model, name: str, chunk: tuple[int, int], n: int) -> KnownLogprobs:
        """Return the log-probabilities that the head gives a residual stream of a chunk.

        For each position: that of the token after it, and of the `n` most probable tokens.

        Raises
        ------
        NonFiniteError
            The model computed a NaN or an infinity.
        """
        with model.backend.scope():
            last = stream_of(model.config.n_layer - 1)
            logits = logits_from(model.gpt2, last, self._streams[name][chunk[0]])
            return logprobs_of(model.gpt2, logits[0, :, :], self._targets(chunk), n)


def stream_of(layer: int) -> str:
    """Return the name of the residual stream after a layer."""
    return f"h.{layer}.resid_post"


def _chunks(start: int, stop: int) -> list[tuple[int, int]]:
    """Split positions into chunks of at most `CHUNK_TOKENS`."""
    return [(first, min(first + CHUNK_TOKENS, stop)) for first in range(start, stop, CHUNK_TOKENS)]
