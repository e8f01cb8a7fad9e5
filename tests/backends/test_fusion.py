"""What the tape makes of a forward pass: the instructions, their buffers, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptx.backends import Positions, get_backend
from gptx.backends.fusion import FusedOp, trace_fused
from gptx.backends.graph import UnsupportedOp
from gptx.config import GPT2Config
from gptx.kv_cache import KVCache
from gptx.model import Transformer, attention, forward, mlp, norm
from gptx.random_weights import random_weights
from gptx.weights import to_backend
from tests.support.random_models import CASES, random_ids

EXACT = get_backend("numpy", dtype="float64", generic=True)
CONFIG = CASES["124M"]


def make(config: GPT2Config) -> Transformer:
    return Transformer(config, to_backend(random_weights(config), EXACT), EXACT)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_is_recorded(case: str, last_only: bool) -> None:
    """One EMBED; for each layer ATTENTION among four LINEAR; the head last, and it alone."""
    model = make(CASES[case])
    config, w = model.config, model.weights
    embed, *blocks, head = trace_fused(forward, model, last_only=last_only)
    assert (embed.kind, embed.weight, embed.table) == ("embed", w.wte.weight, w.wpe.weight)
    assert len(blocks) == 5 * config.n_layer
    for layer, block in enumerate(w.h):
        qkv, attend, project, up, down = blocks[5 * layer : 5 * layer + 5]
        assert attend.kind == "attention"
        assert (attend.layer, attend.scale) == (layer, config.attention_scale(layer))
        parts = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        for found, part in zip((qkv, project, up, down), parts, strict=True):
            assert found.kind == "linear"
            assert found.weight is part.weight
            assert found.bias is part.bias
        for found, part in ((qkv, block.ln_1), (up, block.ln_2)):
            assert found.norm == (part.weight, part.bias, config.layer_norm_epsilon)
        assert project.norm is down.norm is None
        activations = [i.activation for i in (qkv, project, up, down)]
        assert activations == [None, None, config.activation_function, None]
        assert [i.residual is None for i in (qkv, project, up, down)] == [True, False] * 2
    table = w.wte if config.tie_word_embeddings else w.lm_head
    assert (head.kind, head.weight, head.bias) == ("linear", table.weight, None)
    assert head.norm == (w.ln_f.weight, w.ln_f.bias, config.layer_norm_epsilon)
    assert [i.is_head for i in (embed, *blocks, head)] == [False] * (1 + len(blocks)) + [True]
    assert [i.last for i in (embed, *blocks, head)] == [False] * (1 + len(blocks)) + [last_only]


def run(
    instructions: list[FusedOp], model: Transformer, ids: Any, positions: Positions, cache: KVCache
) -> Any:
    """Do what the instructions say, with the generic ops, and with no other memory than buffers."""
    ops = model.backend
    buffers: dict[int, Any] = {}
    for i in instructions:
        assert i.target not in (i.source, i.residual)  # a kernel would read what it has written
        x = None if i.source is None else buffers[i.source]
        if i.kind == "embed":
            y = ops.embed(ids, i.weight) + ops.embed(positions.index, i.table)
        elif i.kind == "attention":
            q, k, v = ops.split_heads(x, model.config.n_head)
            k, v = cache.update(i.layer, k, v, positions)
            y = ops.attention(q, k, v, positions, i.scale)
        else:
            x = x[:, -1:, :] if i.last else x
            x = x if i.norm is None else ops.layer_norm(x, *i.norm)
            y = ops.unembed(x, i.weight) if i.is_head else ops.linear(x, i.weight, i.bias)
            y = y if i.activation is None else getattr(ops, i.activation)(y)
            y = y if i.residual is None else y + buffers[i.residual]
        buffers[i.target] = y
    return buffers[instructions[-1].target]


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_instructions_are_the_model(case: str, last_only: bool) -> None:
    """A buffer that was overwritten before it was read would give other logits."""
    model = make(CASES[case])
    instructions = trace_fused(forward, model, last_only=last_only)
    ids = random_ids(model.config, 2, 9)
    caches = [KVCache(model.config, EXACT, 2, 9) for _ in range(2)]
    for new in (ids[:, :7], ids[:, 7:8], ids[:, 8:]):
        length = new.shape[1]
        positions = [cache.extend([length, length]) for cache in caches]
        found = run(instructions, model, new, positions[0], caches[0])
        wanted = forward(model, new, positions[1], caches[1], last_only=last_only)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_buffers_are_used_again() -> None:
    """As many for many layers as for two; the logits, which the caller keeps, have their own."""
    counts = set()
    for n_layer in (2, 7):
        *others, head = trace_fused(
            forward, make(replace(CONFIG, n_layer=n_layer)), last_only=False
        )
        counts.add(len({i.target for i in others}))
        assert head.target == 1 + max(i.target for i in others)
    assert len(counts) == 1
    assert max(counts) <= 4


# Forward passes of someone's own: some layers between the embeddings and the head.

Middle = Callable[[Transformer, Any, Any, Any], Any]


def around(middle: Middle) -> Callable[..., Any]:
    def own(model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool) -> Any:
        ops, w = model.backend, model.weights
        x = ops.embed(ids, w.wte.weight) + ops.embed(positions.index, w.wpe.weight)
        x = middle(model, x, positions, cache)
        if last_only:
            x = x[:, -1:, :]
        return ops.unembed(norm(model, w.ln_f, x), w.wte.weight)

    return own


def linear(model: Transformer, x: Any) -> Any:
    """A product that keeps the width."""
    part = model.weights.h[0].attn.c_proj
    return model.backend.linear(x, part.weight, part.bias)


def heads(model: Transformer, x: Any) -> tuple[Any, Any, Any]:
    part = model.weights.h[0].attn.c_attn
    qkv = model.backend.linear(x, part.weight, part.bias)
    q, k, v = model.backend.split_heads(qkv, model.config.n_head)
    return q, k, v


def block(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    w = model.weights.h[0]
    x = x + attention(model, w.attn, norm(model, w.ln_1, x), positions, cache, 0)
    return x + mlp(model, w.mlp, norm(model, w.ln_2, x))


def from_two_projections(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    q, _, _ = heads(model, x)
    _, k, v = heads(model, x)
    k, v = cache.update(0, k, v, positions)
    return model.backend.attention(q, k, v, positions, 1.0)


def keys_for_values(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    q, k, v = heads(model, x)
    v, k = cache.update(0, v, k, positions)
    return model.backend.attention(q, v, k, positions, 1.0)


def layers_mixed(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    q, k, v = heads(model, x)
    keys, _ = cache.update(0, k, v, positions)
    _, values = cache.update(1, k, v, positions)
    return model.backend.attention(q, keys, values, positions, 1.0)


def without_a_cache(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    return model.backend.attention(*heads(model, x), positions, 1.0)


def normed_queries(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    q, k, v = heads(model, x)
    k, v = cache.update(0, k, v, positions)
    return model.backend.attention(norm(model, model.weights.ln_f, q), k, v, positions, 1.0)


def added_twice(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    y = linear(model, x)
    return x + y + y


def added_to_itself(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    y = linear(model, x)
    return y + y


def read_before_it_is_activated(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    y = linear(model, x)
    return model.backend.relu(y) + linear(model, y)


def activated_twice(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    y = linear(model, x)
    return model.backend.relu(y) + linear(model, model.backend.gelu(y))


def twice_normed(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    return linear(model, norm(model, model.weights.ln_f, norm(model, model.weights.ln_f, x)))


RECORDED: dict[str, Middle] = {
    "nothing": lambda model, x, positions, cache: x,
    "a block": block,
    "two products": lambda model, x, positions, cache: linear(model, linear(model, x)),
    "sum of two products": lambda model, x, positions, cache: linear(model, x) + linear(model, x),
}

REFUSED: dict[str, Middle] = {
    "an unknown op": lambda model, x, positions, cache: model.backend.dropout(x),
    "an op that has no instruction": lambda model, x, positions, cache: model.backend.softmax(x),
    "an activation alone": lambda model, x, positions, cache: model.backend.gelu(x),
    "an activation of a sum": lambda model, x, _, cache: model.backend.gelu(x + linear(model, x)),
    "another namespace": lambda model, x, positions, cache: np.tanh(x),
    "the backend's namespace": lambda model, x, positions, cache: model.backend.xp.tanh(x),
    "an operator": lambda model, x, positions, cache: 0.5 * x,
    "a shape": lambda model, x, positions, cache: x + x.shape[1],
    "the cache's lengths": lambda model, x, positions, cache: x + cache.lengths[0],
    "the first token": lambda model, x, positions, cache: x[:, :1, :],
    "a number as index": lambda model, x, positions, cache: x[0],
    "a sum in the other order": lambda model, x, positions, cache: linear(model, x) + x,
    "last tokens too early": lambda model, x, positions, cache: linear(model, x[:, -1:, :]),
    "output added twice": added_twice,
    "output added to itself": added_to_itself,
    "output read before its activation": read_before_it_is_activated,
    "output activated twice": activated_twice,
    "normed twice": twice_normed,
    "attention over two projections": from_two_projections,
    "attention with keys for values": keys_for_values,
    "attention over two layers": layers_mixed,
    "attention without a cache": without_a_cache,
    "attention with normed queries": normed_queries,
}


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("name", RECORDED)
def test_a_forward_pass_of_ones_own(name: str, last_only: bool) -> None:
    model, own = make(CONFIG), around(RECORDED[name])
    instructions = trace_fused(own, model, last_only=last_only)
    ids = random_ids(CONFIG, 2, 3)
    caches = [KVCache(CONFIG, EXACT, 2, 3) for _ in range(2)]
    found = run(instructions, model, ids, caches[0].extend([3, 3]), caches[0])
    wanted = own(model, ids, caches[1].extend([3, 3]), caches[1], last_only=last_only)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, last_only: bool) -> None:
    with pytest.raises(UnsupportedOp):
        trace_fused(around(REFUSED[name]), make(CONFIG), last_only=last_only)


def no_positions(
    model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool
) -> Any:
    table = model.weights.wte.weight
    return model.backend.unembed(linear(model, model.backend.embed(ids, table)), table)


def positions_alone(
    model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool
) -> Any:
    w, ops = model.weights, model.backend
    x = ops.embed(positions.index, w.wpe.weight) + ops.embed(positions.index, w.wpe.weight)
    return ops.unembed(x, w.wte.weight)


def no_logits(model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool) -> Any:
    return linear(model, around(RECORDED["nothing"])(model, ids, positions, cache, last_only=False))


def logits_and_more(
    model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool
) -> Any:
    return model.backend.relu(forward(model, ids, positions, cache, last_only=last_only))


def the_logits_before(
    model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool
) -> Any:
    logits = forward(model, ids, positions, cache, last_only=last_only)
    forward(model, ids, positions, cache, last_only=last_only)
    return logits


def always_all(model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool) -> Any:
    return forward(model, ids, positions, cache, last_only=False)


def always_last(
    model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool
) -> Any:
    return forward(model, ids, positions, cache, last_only=True)


def last_two(model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool) -> Any:
    w, ops = model.weights, model.backend
    x = ops.embed(ids, w.wte.weight) + ops.embed(positions.index, w.wpe.weight)
    return ops.unembed(x[:, -2:, :] if last_only else x, w.wte.weight)


@pytest.mark.parametrize(
    ("own", "last_only"),
    [
        (no_positions, False),
        (positions_alone, False),
        (no_logits, False),
        (logits_and_more, False),
        (the_logits_before, False),
        (always_all, True),  # rows of logits that nobody asked for
        (always_last, False),
        (last_two, True),
        (lambda model, ids, positions, cache, last_only: None, False),
    ],
)
def test_what_has_other_ends_is_refused(own: Callable[..., Any], last_only: bool) -> None:
    with pytest.raises(UnsupportedOp):
        trace_fused(own, make(CONFIG), last_only=last_only)
