"""GPT-2: the forward pass only, without loading, sampling or training.

Shapes: B sequences, T new tokens, S cache positions, H heads, D head width, C = H·D = n_embd,
M width of the MLP (4C by default), V vocabulary. `ops` is the backend: an array library with the
ops of the model.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar

from gptx.backends import Backend, Positions
from gptx.config import GPT2Config
from gptx.kv_cache import KVCache

Array = Any


@dataclass(frozen=True)
class Transformer:
    """A GPT-2 on a backend.

    Attributes
    ----------
    config
        Sizes and settings of the model.
    weights
        Tree of arrays of the backend, for example `weights.h[0].attn.c_attn.weight` [C, 3C].
    backend
        The array library.
    """

    has_hooks: ClassVar[bool] = False  # True for a model of `gptx.hooks`

    config: GPT2Config
    weights: SimpleNamespace = field(repr=False)
    backend: Backend

    @cached_property
    def forward(self) -> Callable[..., Array]:
        """`forward` below, with this model as its first argument, compiled by the backend."""
        return self.backend.compile(forward, self)


def forward(
    model: Transformer, ids: Array, positions: Positions, cache: KVCache, *, last_only: bool = False
) -> Array:
    """Return the logits of the token after each of `ids`.

    Parameters
    ----------
    ids
        Token ids [B, T] of the new tokens; T is 1 in a decode step.
    positions
        Positions of the new tokens, as `cache.extend` returns them.
    cache
        Keys and values of the earlier tokens; the pass adds those of the new tokens.
    last_only
        Compute only the logits after the last token of each sequence.

    Returns
    -------
    Array
        Logits [B, T, V], or [B, 1, V] with `last_only`, in float32; in float64 for float64 weights.
    """
    config, w, ops = model.config, model.weights, model.backend

    x = ops.embed(ids, w.wte.weight) + ops.embed(positions.index, w.wpe.weight)  # [B, T, C]
    for layer, block in enumerate(w.h):
        x = x + attention(model, block.attn, norm(model, block.ln_1, x), positions, cache, layer)
        x = x + mlp(model, block.mlp, norm(model, block.ln_2, x))
    if last_only:
        x = x[:, -1:, :]  # [B, 1, C]
    head = w.wte if config.tie_word_embeddings else w.lm_head
    return ops.unembed(norm(model, w.ln_f, x), head.weight)  # [B, T, V]; T = 1 with last_only


def norm(model: Transformer, w: SimpleNamespace, x: Array) -> Array:
    """Return the layer norm of x [B, T, C]: zero mean, unit variance, learned scale and shift."""
    return model.backend.layer_norm(x, w.weight, w.bias, model.config.layer_norm_epsilon)


def attention(
    model: Transformer,
    w: SimpleNamespace,
    x: Array,
    positions: Positions,
    cache: KVCache,
    layer: int,
) -> Array:
    """Return causal self-attention of x [B, T, C] over the cache and the new tokens."""
    config, ops = model.config, model.backend

    qkv = ops.linear(x, w.c_attn.weight, w.c_attn.bias)  # [B, T, 3C]
    q, k, v = ops.split_heads(qkv, config.n_head)  # 3 x [B, H, T, D]
    k, v = cache.update(layer, k, v, positions)  # 2 x [B, H, S, D]
    y = ops.attention(q, k, v, positions, config.attention_scale(layer))  # [B, T, C]
    return ops.linear(y, w.c_proj.weight, w.c_proj.bias)  # [B, T, C]


def mlp(model: Transformer, w: SimpleNamespace, x: Array) -> Array:
    """Return two linear layers of x [B, T, C], with an activation between them."""
    ops = model.backend
    activation = getattr(ops, model.config.activation_function)  # gelu_new, gelu or relu

    y = activation(ops.linear(x, w.c_fc.weight, w.c_fc.bias))  # [B, T, M]
    return ops.linear(y, w.c_proj.weight, w.c_proj.bias)  # [B, T, C]
