"""Fused operations: those of the model, their buffers, and passes that they do not cover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptx.backends import Positions
from gptx.backends.fusion import FusedOp, trace_fused
from gptx.backends.graph import UnsupportedOp
from gptx.kv_cache import KVCache
from gptx.model import Transformer, attention, forward, mlp, norm
from gptx.random_weights import random_weights
from gptx.weights import to_backend
from tests.support.models import EXACT, exact_transformer
from tests.support.random_models import CASES, random_ids

CONFIG = CASES["untied"]


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_operations_of_the_model(case: str, last_only: bool) -> None:
    """One "embed"; an "attention" and four "linear" for each layer; the head, which has `last`."""
    model = exact_transformer(case)
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
        activations = [op.activation for op in (qkv, project, up, down)]
        assert activations == [None, None, config.activation_function, None]
        assert [op.residual is None for op in (qkv, project, up, down)] == [True, False] * 2
    table = w.wte if config.tie_word_embeddings else w.lm_head
    assert (head.kind, head.weight, head.bias) == ("linear", table.weight, None)
    assert head.norm == (w.ln_f.weight, w.ln_f.bias, config.layer_norm_epsilon)
    assert [op.is_head for op in (embed, *blocks, head)] == [False] * (1 + len(blocks)) + [True]
    assert [op.last for op in (embed, *blocks, head)] == [False] * (1 + len(blocks)) + [last_only]


def run(
    fused: list[FusedOp], model: Transformer, ids: Any, positions: Positions, cache: KVCache
) -> Any:
    """Compute fused operations with the generic ops, and with no other memory than the buffers."""
    ops = model.backend
    buffers: dict[int, Any] = {}
    for op in fused:
        assert op.target not in (op.source, op.residual)  # a kernel reads while it writes
        x = None if op.source is None else buffers[op.source]
        if op.kind == "embed":
            y = ops.embed(ids, op.weight) + ops.embed(positions.index, op.table)
        elif op.kind == "attention":
            q, k, v = ops.split_heads(x, model.config.n_head)
            k, v = cache.update(op.layer, k, v, positions)
            y = ops.attention(q, k, v, positions, op.scale)
        else:
            x = x[:, -1:, :] if op.last else x
            x = x if op.norm is None else ops.layer_norm(x, *op.norm)
            y = ops.unembed(x, op.weight) if op.is_head else ops.linear(x, op.weight, op.bias)
            y = y if op.activation is None else getattr(ops, op.activation)(y)
            y = y if op.residual is None else y + buffers[op.residual]
        buffers[op.target] = y
    return buffers[fused[-1].target]


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_fused_operations_give_the_logits_of_the_model(case: str, last_only: bool) -> None:
    """A buffer that is overwritten before it is read gives other logits."""
    model = exact_transformer(case)
    fused = trace_fused(forward, model, last_only=last_only)
    ids = random_ids(model.config, 2, 6)
    caches = [KVCache(model.config, EXACT, 2, 6) for _ in range(2)]
    for new in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        length = new.shape[1]
        positions = [cache.extend([length, length]) for cache in caches]
        found = run(fused, model, new, positions[0], caches[0])
        wanted = forward(model, new, positions[1], caches[1], last_only=last_only)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_the_number_of_buffers_does_not_depend_on_the_number_of_layers() -> None:
    """The logits, which the caller keeps, have a separate buffer."""
    counts = set()
    for n_layer in (2, 7):
        config = replace(CASES["tiny"], n_layer=n_layer)
        model = Transformer(config, to_backend(random_weights(config), EXACT), EXACT)
        *others, head = trace_fused(forward, model, last_only=False)
        counts.add(len({op.target for op in others}))
        assert head.target == 1 + max(op.target for op in others)
    assert len(counts) == 1
    assert max(counts) <= 4


# Other forward passes: some layers between the embeddings and the head

Middle = Callable[[Transformer, Any, Any, Any], Any]


def around(middle: Middle) -> Callable[..., Any]:
    """Return a forward pass of embeddings, `middle` and head."""

    def own(model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool) -> Any:
        ops, w = model.backend, model.weights
        x = ops.embed(ids, w.wte.weight) + ops.embed(positions.index, w.wpe.weight)
        x = middle(model, x, positions, cache)
        if last_only:
            x = x[:, -1:, :]
        return ops.unembed(norm(model, w.ln_f, x), w.wte.weight)

    return own


def linear(model: Transformer, x: Any) -> Any:
    """Return a product of the width of x."""
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


def read_before_activation(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    y = linear(model, x)
    return model.backend.relu(y) + linear(model, y)


def activated_twice(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    y = linear(model, x)
    return model.backend.relu(y) + linear(model, model.backend.gelu(y))


def normed_twice(model: Transformer, x: Any, positions: Any, cache: Any) -> Any:
    return linear(model, norm(model, model.weights.ln_f, norm(model, model.weights.ln_f, x)))


COVERED: dict[str, Middle] = {
    "nothing": lambda model, x, positions, cache: x,
    "a block": block,
    "two products": lambda model, x, positions, cache: linear(model, linear(model, x)),
    "sum of two products": lambda model, x, positions, cache: linear(model, x) + linear(model, x),
}

UNSUPPORTED: dict[str, Middle] = {
    "an unknown op": lambda model, x, positions, cache: model.backend.dropout(x),
    "an op that is not fused": lambda model, x, positions, cache: model.backend.softmax(x),
    "an activation without a product": lambda model, x, positions, cache: model.backend.gelu(x),
    "an activation of a sum": lambda model, x, _, cache: model.backend.gelu(x + linear(model, x)),
    "another namespace": lambda model, x, positions, cache: np.tanh(x),
    "the backend's namespace": lambda model, x, positions, cache: model.backend.xp.tanh(x),
    "an operator": lambda model, x, positions, cache: 0.5 * x,
    "a shape": lambda model, x, positions, cache: x + x.shape[1],
    "the cache's lengths": lambda model, x, positions, cache: x + cache.lengths[0],
    "the first token": lambda model, x, positions, cache: x[:, :1, :],
    "a number as index": lambda model, x, positions, cache: x[0],
    "a sum in the other order": lambda model, x, positions, cache: linear(model, x) + x,
    "the last token before the end": lambda model, x, _, cache: linear(model, x[:, -1:, :]),
    "output added twice": added_twice,
    "output added to itself": added_to_itself,
    "output read before its activation": read_before_activation,
    "output activated twice": activated_twice,
    "normed twice": normed_twice,
    "attention over two projections": from_two_projections,
    "attention with keys for values": keys_for_values,
    "attention over two layers": layers_mixed,
    "attention without a cache": without_a_cache,
    "attention with normed queries": normed_queries,
}


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("name", COVERED)
def test_fused_operations_of_another_pass(name: str, last_only: bool) -> None:
    model, own = exact_transformer("untied"), around(COVERED[name])
    fused = trace_fused(own, model, last_only=last_only)
    ids = random_ids(CONFIG, 2, 3)
    caches = [KVCache(CONFIG, EXACT, 2, 3) for _ in range(2)]
    found = run(fused, model, ids, caches[0].extend([3, 3]), caches[0])
    wanted = own(model, ids, caches[1].extend([3, 3]), caches[1], last_only=last_only)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_layers(name: str, last_only: bool) -> None:
    with pytest.raises(UnsupportedOp):
        trace_fused(around(UNSUPPORTED[name]), exact_transformer("untied"), last_only=last_only)


def no_positions(
    model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool
) -> Any:
    table = model.weights.wte.weight
    return model.backend.unembed(linear(model, model.backend.embed(ids, table)), table)


def positions_only(
    model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool
) -> Any:
    w, ops = model.weights, model.backend
    x = ops.embed(positions.index, w.wpe.weight) + ops.embed(positions.index, w.wpe.weight)
    return ops.unembed(x, w.wte.weight)


def no_logits(model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool) -> Any:
    return linear(model, around(COVERED["nothing"])(model, ids, positions, cache, last_only=False))


def logits_and_more(
    model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool
) -> Any:
    return model.backend.relu(forward(model, ids, positions, cache, last_only=last_only))


def logits_of_an_earlier_pass(
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


def nothing(model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool) -> Any:
    return None


@pytest.mark.parametrize(
    ("own", "last_only"),
    [
        (no_positions, False),
        (positions_only, False),
        (no_logits, False),
        (logits_and_more, False),
        (logits_of_an_earlier_pass, False),
        (always_all, True),
        (always_last, False),
        (last_two, True),
        (nothing, False),
    ],
)
def test_unsupported_inputs_and_outputs(own: Callable[..., Any], last_only: bool) -> None:
    with pytest.raises(UnsupportedOp):
        trace_fused(own, exact_transformer("untied"), last_only=last_only)
