"""A plain GPT-2 in NumPy, with cached keys and values or without."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import threadpoolctl

import gptx
from benchmarks.compare.peers.base import Engine, Prompts, Tick


class NumpyEngine(Engine):
    """One sequence at a time."""

    version = np.__version__

    def __init__(self, folder: Path, threads: int, work: Path, cache: bool = True) -> None:
        model = gptx.load(folder, generic=True)  # plain arrays
        config = model.config
        self.model = PlainGPT2(model.gpt2.weights, config.n_head, config.n_positions)
        self.cache = cache
        self.known: list[int] = []
        self.n_bytes = 4 * config.n_parameters
        threadpoolctl.threadpool_limits(threads, user_api="blas")

    def generate(self, prompts: Prompts, n_tokens: int, tick: Tick, known: bool = False) -> None:
        (ids,) = prompts
        if known and ids != self.known:
            self.model.logits(ids)
        self.known = ids if known else []  # the next prompt overwrites it
        start = len(ids) - 1 if known else 0
        for _ in range(n_tokens):
            token = int(np.argmax(self.model.logits(ids[start:], start)))
            tick([token])
            ids = [*ids, token]
            start = len(ids) - 1 if self.cache else 0

    def logits(self, ids: list[int]) -> list[float]:
        self.known = []
        return [float(x) for x in self.model.logits(ids)]


class PlainGPT2:
    """GPT-2 for one sequence in float32, with gelu_new and a tied head, on gptx's weight arrays."""

    def __init__(self, weights: SimpleNamespace, n_head: int, n_context: int) -> None:
        self.w = weights
        width = weights.wpe.weight.shape[1]
        shape = (len(weights.h), n_head, n_context, width // n_head)
        self.k = np.zeros(shape, np.float32)
        self.v = np.zeros(shape, np.float32)

    def logits(self, tokens: list[int], start: int = 0) -> np.ndarray:
        """Return the logits [V] after the last of `tokens`, which begin at position `start`.

        Keys and values of earlier positions are cached; with `start` 0 the cache is not used.
        """
        w, stop = self.w, start + len(tokens)
        x = w.wte.weight[tokens] + w.wpe.weight[start:stop]
        for layer, block in enumerate(w.h):
            x = x + self._attention(layer, block.attn, norm(x, block.ln_1), start)
            x = x + linear(gelu(linear(norm(x, block.ln_2), block.mlp.c_fc)), block.mlp.c_proj)
        return (norm(x[-1:], w.ln_f) @ w.wte.weight.T)[0]

    def _attention(self, layer: int, w: SimpleNamespace, x: np.ndarray, start: int) -> np.ndarray:
        _, n_head, _, head_dim = self.k.shape
        stop = start + len(x)
        q, k, v = (
            part.reshape(-1, n_head, head_dim).swapaxes(0, 1)
            for part in np.split(linear(x, w.c_attn), 3, axis=-1)
        )
        self.k[layer, :, start:stop] = k
        self.v[layer, :, start:stop] = v
        keys, values = self.k[layer, :, :stop], self.v[layer, :, :stop]
        scores = q @ keys.transpose(0, 2, 1) / head_dim**0.5
        if len(x) > 1:
            scores += np.triu(np.full(scores.shape[1:], -1e10, np.float32), start + 1)
        heads = softmax(scores) @ values
        return linear(heads.swapaxes(0, 1).reshape(len(x), -1), w.c_proj)


def linear(x: np.ndarray, w: SimpleNamespace) -> np.ndarray:
    """A linear layer."""
    return x @ w.weight + w.bias


def norm(x: np.ndarray, w: SimpleNamespace) -> np.ndarray:
    """Layer norm."""
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return w.weight * (x - mean) / np.sqrt(variance + 1e-5) + w.bias


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh form."""
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
