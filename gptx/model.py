"""GPT-2, the forward pass and nothing else: no loading, no sampling, no training.

Shapes: B sequences, T new tokens, S positions in the cache, L layers, H heads, D head width,
C = H·D the width (`n_embd`), V vocabulary. `ops` is the backend: the library that computes.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from gptx.backends import Backend, Positions
from gptx.config import GPT2Config
from gptx.kv_cache import KVCache

Array = Any


@dataclass(frozen=True)
class Transformer:
    """A config, the weights as a tree (`weights.h[0].attn.c_attn.weight`), and a backend."""

    config: GPT2Config
    weights: SimpleNamespace
    backend: Backend

    @cached_property
    def forward(self) -> Callable[..., Array]:
        """The forward pass below, of this model, as fast as the backend can make it."""
        return self.backend.compile(forward, self)


def forward(
    model: Transformer, ids: Array, positions: Positions, cache: KVCache, *, last_only: bool = False
) -> Array:
    """Logits of the token after each of `ids`, given what the cache holds.

    Parameters
    ----------
    ids
        Integers [B, T]: the new tokens; where T is 1, a decode step.
    positions
        Where they stand: `cache.extend(...)`.
    cache
        Keys and values of the tokens before, to which those of `ids` are added.
    last_only
        Compute the logits of the last token of each sequence only.

    Returns
    -------
    Array
        Logits [B, T, V], or [B, 1, V], in float32.
    """
    config, w, ops = model.config, model.weights, model.backend

    x = ops.embed(ids, w.wte.weight) + ops.embed(positions.index, w.wpe.weight)  # [B, T, C]
    for layer, block in enumerate(w.h):
        x = x + attention(model, block.attn, norm(model, block.ln_1, x), positions, cache, layer)
        x = x + mlp(model, block.mlp, norm(model, block.ln_2, x))
    if last_only:
        x = x[:, -1:, :]  # [B, 1, C]
    head = w.wte if config.tie_word_embeddings else w.lm_head
    return ops.unembed(norm(model, w.ln_f, x), head.weight)  # [B, T, V]


def norm(model: Transformer, w: SimpleNamespace, x: Array) -> Array:
    """Layer norm: zero mean, unit variance, then a learned scale and shift."""
    return model.backend.layer_norm(x, w.weight, w.bias, model.config.layer_norm_epsilon)


def attention(
    model: Transformer,
    w: SimpleNamespace,
    x: Array,
    positions: Positions,
    cache: KVCache,
    layer: int,
) -> Array:
    """Causal self-attention over the cache and the new tokens, [B, T, C] -> [B, T, C]."""
    config, ops = model.config, model.backend

    qkv = ops.linear(x, w.c_attn.weight, w.c_attn.bias)  # [B, T, 3C]
    q, k, v = ops.split_heads(qkv, config.n_head)  # 3 x [B, H, T, D]
    k, v = cache.update(layer, k, v, positions)  # 2 x [B, H, S, D]
    y = ops.attention(q, k, v, positions, config.attention_scale(layer))  # [B, T, C]
    return ops.linear(y, w.c_proj.weight, w.c_proj.bias)  # [B, T, C]


def mlp(model: Transformer, w: SimpleNamespace, x: Array) -> Array:
    """Two linear layers with an activation between them, [B, T, C] -> [B, T, C]."""
    ops = model.backend
    activation = getattr(ops, model.config.activation_function)  # gelu_new, gelu or relu

    y = activation(ops.linear(x, w.c_fc.weight, w.c_fc.bias))  # [B, T, 4C]
    return ops.linear(y, w.c_proj.weight, w.c_proj.bias)  # [B, T, C]
