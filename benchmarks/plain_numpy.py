"""The NumPy loop that one writes first, with a KV cache: a peer to measure gptx against.

It shares nothing with gptx but the arrays of the weights.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np


class PlainGPT2:
    """Decodes one token of one sequence at a time, in float32; gelu_new and a tied head only."""

    def __init__(self, weights: SimpleNamespace, n_head: int, n_context: int) -> None:
        self.w = weights
        width = weights.wpe.weight.shape[1]
        shape = (len(weights.h), n_head, n_context, width // n_head)
        self.k = np.zeros(shape, np.float32)
        self.v = np.zeros(shape, np.float32)

    def step(self, token: int, position: int) -> int:
        """The best next token after `token` at `position`."""
        w = self.w
        x = w.wte.weight[[token]] + w.wpe.weight[[position]]
        for layer, block in enumerate(w.h):
            x = x + self._attention(layer, block.attn, norm(x, block.ln_1), position)
            x = x + linear(gelu(linear(norm(x, block.ln_2), block.mlp.c_fc)), block.mlp.c_proj)
        return int(np.argmax(norm(x, w.ln_f) @ w.wte.weight.T))

    def _attention(
        self, layer: int, w: SimpleNamespace, x: np.ndarray, position: int
    ) -> np.ndarray:
        _, n_head, _, head_dim = self.k.shape
        q, k, v = np.split(linear(x, w.c_attn), 3, axis=-1)
        self.k[layer, :, position] = k.reshape(n_head, head_dim)
        self.v[layer, :, position] = v.reshape(n_head, head_dim)
        keys, values = self.k[layer, :, : position + 1], self.v[layer, :, : position + 1]
        scores = q.reshape(n_head, 1, head_dim) @ keys.transpose(0, 2, 1) / head_dim**0.5
        return linear((softmax(scores) @ values).reshape(1, -1), w.c_proj)


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
