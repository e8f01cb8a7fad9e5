"""The ONNX graphs of a static site, traced from `gptx/model.py`.

`step.onnx` computes new tokens after a KV cache, and also returns attention patterns and the
residual stream. `lens.onnx` is the end of the model, from the residual stream to the logits. The
runtime computes an output that the page does not fetch too, but does not copy it.

Axes: S new tokens, P tokens before them, padding included; the others are those of `gptx.model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import ndonnx
import numpy as np
import onnx
import spox.opset.ai.onnx.v17 as operators

from gptx.backends.graph import Graph, Node, named_weights, trace_names
from gptx.backends.replay import Replay
from gptx.config import GPT2Config
from gptx.conversions.formats.onnx_trace import OnnxBackend, Shape, finish, node, padded_positions
from gptx.hooks import logits_from
from gptx.model import Transformer, forward
from gptx.weights import as_tree

Array = Any

STEP = """One pass of GPT-2 over the tokens of `input_ids`, traced by gptx.

The caller keeps keys and values: it appends `new.*` to `past.*`. Rows of `past.*` whose mask is 0
are padding. A sequence has no more tokens than `wpe.weight` has rows."""
LENS = "The logits of rows of GPT-2's residual stream, traced by gptx."


class NewRows:
    """A KV cache for `forward` whose caller keeps the keys and values of the past.

    Attributes
    ----------
    past
        Name -> keys or values of a layer, [1, H, P, D].
    new
        Name -> those of the new tokens, [1, H, S, D].
    """

    def __init__(self, config: GPT2Config) -> None:
        shape = (1, config.n_head, "P", config.head_dim)
        self.past = {
            f"past.{layer}.{part}": ndonnx.argument(dtype=ndonnx.float32, shape=shape)
            for layer in range(config.n_layer)
            for part in ("keys", "values")
        }
        self.new: dict[str, Array] = {}

    def update(self, layer: int, k: Array, v: Array, positions: Any) -> tuple[Array, Array]:
        """Return the keys and values of all tokens, two arrays [1, H, P+S, D]."""
        both = []
        for part, new in (("keys", k), ("values", v)):
            self.new[f"new.{layer}.{part}"] = new
            both.append(ndonnx.concat([self.past[f"past.{layer}.{part}"], new], axis=2))
        return both[0], both[1]


class _Recorder(Replay):
    """A replay that keeps the results of some nodes: `kept`, node -> result."""

    kept: dict[Node, Array]

    def add_result(self, node: Node, x: Array) -> None:
        super().add_result(node, x)
        if node in self.kept:
            self.kept[node] = x


def step_graph(config: GPT2Config, dtypes: Mapping[str, str]) -> onnx.ModelProto:
    """Trace one pass over new tokens.

    Parameters
    ----------
    dtypes
        Name of each weight -> type that the file stores, "float32" or "float16"; the runtime
        converts it to float32 when it loads the graph.

    Returns
    -------
    onnx.ModelProto
        The inputs are `input_ids` [1, S], `attention_mask` [1, P+S], `past.i.keys` and
        `past.i.values` [1, H, P, D] of layer i, and the weights. The outputs are `logits`
        [1, S, V], the logarithm of the sum of their exponentials `total` [1, S], `new.i.keys` and
        `new.i.values` [1, H, S, D], `h.i.attn.pattern` [1, H, S, P+S], and the residual stream
        [1, S, C]: `h.0.resid_pre` and `h.i.resid_post`.
    """
    ids = ndonnx.argument(dtype=ndonnx.int64, shape=(1, "S"))
    mask = ndonnx.argument(dtype=ndonnx.int64, shape=(1, "P+S"))
    cache = NewRows(config)
    arguments, weights = _weights(config, dtypes)
    model = Transformer(config, weights, OnnxBackend())
    graph = trace_names(forward, model, last_only=False, expanded=range(config.n_layer))
    kept = _activations(config, graph)
    P = cache.past["past.0.keys"].dynamic_shape[2]
    positions = padded_positions(mask, P, config)
    replay = _Recorder(model.backend, graph, dict(named_weights(weights)), ids, positions, cache)
    replay.kept = dict.fromkeys(kept.values())
    logits = replay.run()

    outputs = {name: replay.kept[node] for name, node in kept.items()}
    proto = ndonnx.build(
        {"input_ids": ids, "attention_mask": mask, **cache.past, **arguments},
        {"logits": logits, "total": _total(logits), **cache.new, **outputs},
    )
    H, D, C = config.n_head, config.head_dim, config.n_embd
    shapes: dict[str, Shape] = {"logits": (1, "S", config.vocab_size), "total": (1, "S")}
    shapes |= dict.fromkeys(cache.new, (1, H, "S", D))
    for name in outputs:
        shapes[name] = (1, H, "S", "P+S") if name.endswith(".pattern") else (1, "S", C)
    finish(proto, shapes, STEP)
    return proto


def lens_graph(config: GPT2Config, dtypes: Mapping[str, str]) -> onnx.ModelProto:
    """Trace the end of the model: `resid_post` [1, S, C] in, `logits` and `total` out.

    Its inputs are `resid_post` and those weights that it reads (`lens_weights`).
    """
    x = ndonnx.argument(dtype=ndonnx.float32, shape=(1, "S", config.n_embd))
    arguments, weights = _weights(config, dtypes)
    model = Transformer(config, weights, OnnxBackend())
    logits = logits_from(model, f"h.{config.n_layer - 1}.resid_post", x)
    read = {name: arguments[name] for name in lens_weights(config)}
    proto = ndonnx.build({"resid_post": x, **read}, {"logits": logits, "total": _total(logits)})
    finish(proto, {"logits": (1, "S", config.vocab_size), "total": (1, "S")}, LENS)
    return proto


def lens_weights(config: GPT2Config) -> list[str]:
    """Return the names of the weights that `lens_graph` reads."""
    head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    return ["ln_f.weight", "ln_f.bias", head]


def _weights(
    config: GPT2Config, dtypes: Mapping[str, str]
) -> tuple[dict[str, Array], SimpleNamespace]:
    """Return the weights as inputs of a graph by name, and as a tree of float32 arrays."""
    arguments = {
        name: ndonnx.argument(dtype=getattr(ndonnx, dtypes[name]), shape=shape)
        for name, shape in config.tensor_shapes().items()
    }
    return arguments, as_tree({name: _as_float32(x) for name, x in arguments.items()})


def _as_float32(x: Array) -> Array:
    return x if x.dtype == ndonnx.float32 else node(operators.cast, x, to=np.float32)


def _total(logits: Array) -> Array:
    """Return the logarithm of the sum of exponentials over the last axis."""
    # A runtime computes LogSoftmax with vector instructions, and ReduceLogSumExp without.
    return logits[..., 0] - node(operators.log_softmax, logits, axis=-1)[..., 0]


def _activations(config: GPT2Config, graph: Graph) -> dict[str, Node]:
    """Return the nodes of attention patterns and of the residual stream, by name."""
    names = ["h.0.resid_pre"]
    for layer in range(config.n_layer):
        names += [f"h.{layer}.attn.pattern", f"h.{layer}.resid_post"]
    return {name: graph.names[name] for name in names}
