"""The graph of a forward pass: its nodes and operands, and passes that it does not support."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptx.backends import Positions
from gptx.backends.graph import Graph, Node, UnsupportedOp, Weight, trace, trace_names
from gptx.kv_cache import KVCache
from gptx.model import Transformer, forward
from tests.support.models import EXACT, exact_transformer
from tests.support.random_models import CASES, random_ids


@pytest.mark.parametrize("last_only", [False, True])
def test_nodes_of_a_layer_in_order(last_only: bool) -> None:
    model = exact_transformer("tiny")
    w, block = model.weights, model.weights.h[0]
    graph = trace(forward, model, last_only=last_only)
    expected = [
        ("ids", ()),
        ("index", ()),
        ("embed", ("ids", w.wte.weight)),
        ("embed", ("index", w.wpe.weight)),
        ("add", ("embed", "embed")),
        ("layer_norm", ("add", block.ln_1.weight, block.ln_1.bias, 1e-5)),
        ("linear", ("layer_norm", block.attn.c_attn.weight, block.attn.c_attn.bias)),
        ("query", ("linear", model.config.n_head)),
        ("key", ("linear", model.config.n_head)),
        ("value", ("linear", model.config.n_head)),
        ("keys", ("key", 0)),
        ("values", ("value", 0)),
        ("attention", ("query", "keys", "values", Positions, model.config.attention_scale(0))),
        ("linear", ("attention", block.attn.c_proj.weight, block.attn.c_proj.bias)),
        ("add", ("add", "linear")),
        ("layer_norm", ("add", block.ln_2.weight, block.ln_2.bias, 1e-5)),
        ("linear", ("layer_norm", block.mlp.c_fc.weight, block.mlp.c_fc.bias)),
        ("gelu_new", ("linear",)),
        ("linear", ("gelu_new", block.mlp.c_proj.weight, block.mlp.c_proj.bias)),
        ("add", ("add", "linear")),
        *[("last", ("add",))] * last_only,
        ("layer_norm", ("last" if last_only else "add", w.ln_f.weight, w.ln_f.bias, 1e-5)),
        ("unembed", ("layer_norm", w.wte.weight)),
    ]
    assert [node.op for node in graph.nodes] == [op for op, _ in expected]
    for node, (_, operands) in zip(graph.nodes, expected, strict=True):
        for found, wanted in zip(node.operands, operands, strict=True):
            if isinstance(found, Node):
                assert found.op == wanted
            elif isinstance(found, Positions):
                assert wanted is Positions
            else:
                assert found is wanted or found == wanted
        assert node.inputs == [x for x in node.operands if isinstance(x, Node)]
        assert node.graph == graph  # a weak reference
    assert graph.output is graph.nodes[-1]


def replay(graph: Graph, ids: Any, positions: Positions, cache: KVCache) -> Any:
    """Compute the nodes in order with the generic ops; return the logits."""
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        x = [positions if isinstance(a, Positions) else a for a in node.operands]
        x = [values[a] if isinstance(a, Node) else a for a in x]
        match node.op:
            case "ids":
                value = ids
            case "index":
                value = positions.index
            case "add":
                value = x[0] + x[1]
            case "last":
                value = x[0][:, -1:, :]
            case "query" | "key" | "value" as name:
                n_head = cache.config.n_head
                parts = dict(
                    zip(("query", "key", "value"), EXACT.split_heads(x[0], n_head), strict=True)
                )
                value = parts[name]
            case "keys" | "values" as name:
                buffers = cache.keys if name == "keys" else cache.values
                buffers[x[1]] = EXACT.update_kv(buffers[x[1]], x[0], positions)
                value = buffers[x[1]][:, :, : positions.stop, :]
            case op:
                value = getattr(EXACT, op)(*x)
        values[node] = value
    return values[graph.output]


@pytest.mark.parametrize("case", CASES)
def test_a_replay_gives_the_logits_of_the_model(case: str) -> None:
    model = exact_transformer(case)
    ids = random_ids(model.config, 2, 5)
    for last_only in (False, True):
        graph = trace(forward, model, last_only=last_only)
        caches = [KVCache(model.config, EXACT, 2, 5) for _ in range(2)]
        found = replay(graph, ids, caches[0].extend([5, 5]), caches[0])
        wanted = forward(model, ids, caches[1].extend([5, 5]), caches[1], last_only=last_only)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def unknown_op(model: Transformer, ids: Any) -> Any:
    return model.backend.dropout(ids)


def library_function(model: Transformer, ids: Any) -> Any:
    return model.backend.xp.tanh(ids)


def other_operator(model: Transformer, ids: Any) -> Any:
    return 0.5 * ids


def attribute(model: Transformer, ids: Any) -> Any:
    return ids + ids.shape[1]


def first_token(model: Transformer, ids: Any) -> Any:
    return ids[:, :1, :]


def number_as_index(model: Transformer, ids: Any) -> Any:
    return ids[0]


@pytest.mark.parametrize(
    "own",
    [unknown_op, library_function, other_operator, attribute, first_token, number_as_index],
)
def test_an_unsupported_pass_raises(own: Any) -> None:
    def own_forward(
        model: Transformer, ids: Any, positions: Any, cache: Any, *, last_only: bool
    ) -> Any:
        return own(model, ids)

    with pytest.raises(UnsupportedOp):
        trace(own_forward, exact_transformer("tiny"), last_only=False)


@pytest.mark.parametrize("last_only", [False, True])
def test_names_follow_the_weights(last_only: bool) -> None:
    model = exact_transformer("untied")
    graph = trace_names(forward, model, last_only=last_only, expanded=[1])
    ops = {name: node.op for name, node in graph.names.items()}
    assert {name: op for name, op in ops.items() if "." not in name} == {
        "wte": "embed", "wpe": "embed", "ln_f": "layer_norm", "lm_head": "unembed",
    }  # fmt: skip
    block = {
        "resid_pre": "add", "ln_1": "layer_norm", "attn.c_attn": "linear", "attn.q": "query",
        "attn.k": "key", "attn.v": "value", "attn.keys": "keys", "attn.values": "values",
        "attn.z": "attention", "attn.c_proj": "linear", "resid_mid": "add", "ln_2": "layer_norm",
        "mlp.c_fc": "linear", "mlp.act": "gelu_new", "mlp.c_proj": "linear", "resid_post": "add",
    }  # fmt: skip
    expanded = block | {"attn.scores": "scores", "attn.pattern": "pattern", "attn.z": "z"}
    for layer, expected in enumerate((block, expanded, block)):
        prefix = f"h.{layer}."
        found = {name.removeprefix(prefix): op for name, op in ops.items() if prefix in name}
        assert found == expected
    assert graph.names["h.1.resid_post"] is graph.names["h.2.resid_pre"]
    nodes = list(dict.fromkeys(graph.names.values()))
    assert nodes == [node for node in graph.nodes if node in nodes]  # in order of computation


def test_weights_stand_in_the_place_of_arrays() -> None:
    graph = trace_names(forward, exact_transformer("tiny"), last_only=False)
    found = [x.name for node in graph.nodes for x in node.operands if isinstance(x, Weight)]
    layers = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    names = [f"h.0.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    head = ["ln_f.weight", "ln_f.bias", "wte.weight"]
    assert found == ["wte.weight", "wpe.weight", *names, *head]


def test_a_trace_leaves_the_model_unchanged() -> None:
    model = exact_transformer("tiny")
    trace(forward, model, last_only=False)
    assert model.backend is EXACT
