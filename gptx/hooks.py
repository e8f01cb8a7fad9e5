"""Hooks: functions that read or replace what the forward pass computes, by name.

A hooked model runs the graph of `gptx/model.py` op by op (`gptx.backends.replay`) and calls the
hooks of a node with its result. A model without hooks is another object, which the backend
compiles: it pays nothing.

Names follow the weights. With B sequences, T new tokens, S cache positions, H heads, D head width,
C = H·D, M width of the MLP and V vocabulary, and i the number of a layer from 0:

    wte, wpe                        [B, T, C]     token and position embeddings
    h.i.resid_pre                   [B, T, C]     residual stream before the block
    h.i.ln_1, h.i.ln_2, ln_f        [B, T, C]     results of the layer norms
    h.i.attn.c_attn                 [B, T, 3C]    queries, keys and values of all heads
    h.i.attn.q, .k, .v              [B, H, T, D]  those of each head, of the new tokens
    h.i.attn.keys, .values          [B, H, S, D]  those of all tokens, from the KV cache
    h.i.attn.scores                 [B, H, T, S]  scaled products, -inf where a token may not attend
    h.i.attn.pattern                [B, H, T, S]  attention pattern: their softmax over S
    h.i.attn.z                      [B, T, C]     pattern times values, heads side by side
    h.i.attn.c_proj                 [B, T, C]     result of the attention
    h.i.resid_mid                   [B, T, C]     residual stream between attention and MLP
    h.i.mlp.c_fc, h.i.mlp.act       [B, T, M]     before and after the activation function
    h.i.mlp.c_proj                  [B, T, C]     result of the MLP
    h.i.resid_post                  [B, T, C]     residual stream after the block
    lm_head                         [B, T, V]     logits

TransformerLens's names are known, such as `blocks.3.hook_resid_post`. They give TransformerLens's
layouts: q, k, v and z are [B, T, H, D]. It is https://github.com/TransformerLensOrg/TransformerLens
in its form without processed weights.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from gptx.backends import Backend, Positions
from gptx.backends.graph import Graph, Node, named_weights, trace_names
from gptx.backends.replay import Replay
from gptx.config import GPT2Config
from gptx.errors import NonFiniteError, ParameterError, shown
from gptx.model import Transformer, forward

Array = Any
Hook = Callable[..., Any]

MIN_LIKENESS = 0.6  # of difflib's ratio, 0 to 1

# TransformerLens's name -> the name here; {} is the number of the layer.
LENS_NAMES = {
    "hook_embed": "wte",
    "hook_pos_embed": "wpe",
    "blocks.{}.hook_resid_pre": "h.{}.resid_pre",
    "blocks.{}.ln1.hook_normalized": "h.{}.ln_1",
    "blocks.{}.attn.hook_q": "h.{}.attn.q",
    "blocks.{}.attn.hook_k": "h.{}.attn.k",
    "blocks.{}.attn.hook_v": "h.{}.attn.v",
    "blocks.{}.attn.hook_attn_scores": "h.{}.attn.scores",
    "blocks.{}.attn.hook_pattern": "h.{}.attn.pattern",
    "blocks.{}.attn.hook_z": "h.{}.attn.z",
    "blocks.{}.hook_attn_out": "h.{}.attn.c_proj",
    "blocks.{}.hook_resid_mid": "h.{}.resid_mid",
    "blocks.{}.ln2.hook_normalized": "h.{}.ln_2",
    "blocks.{}.mlp.hook_pre": "h.{}.mlp.c_fc",
    "blocks.{}.mlp.hook_post": "h.{}.mlp.act",
    "blocks.{}.hook_mlp_out": "h.{}.mlp.c_proj",
    "blocks.{}.hook_resid_post": "h.{}.resid_post",
    "ln_final.hook_normalized": "ln_f",
}
_LAYER = re.compile(r"(?:h|blocks)\.(\d+)\.")
_NEEDS_EXPANSION = (".attn.scores", ".attn.pattern")


@dataclass(frozen=True)
class Site:
    """The place of one call of a hook.

    Attributes
    ----------
    name
        Name of the result: the one that the hook was given for, without wildcards.
    layer
        Number of the layer, from 0; None outside of the blocks.
    positions
        Positions of the tokens in their sequences, NumPy integers [B, T]. A sequence with fewer
        than T new tokens repeats its last one.
    backend
        Backend of the array, with its namespace `xp`.
    """

    name: str
    layer: int | None
    positions: np.ndarray
    backend: Backend


class _BoundHook(NamedTuple):
    """A function for one name; `own` is the name here of a name of TransformerLens."""

    name: str
    own: str
    function: Hook
    n_arguments: int


@dataclass(frozen=True)
class HookedTransformer(Transformer):
    """A model whose forward pass calls hooks; `with_hooks` makes one.

    Attributes
    ----------
    hooks
        Functions and their names, in the order of their calls.
    """

    has_hooks: ClassVar[bool] = True

    hooks: tuple[_BoundHook, ...]

    @cached_property
    def forward(self) -> Callable[..., Array]:
        """The graph of `gptx.model.forward`, op by op, with hooks."""
        return HookedForward(Transformer(self.config, self.weights, self.backend), self.hooks)


def with_hooks(model: Transformer, functions: Mapping[str, Hook]) -> Transformer:
    """Return a model that calls functions with its activations.

    Parameters
    ----------
    model
        A model, with hooks or without; its own hooks are called first.
    functions
        Name or pattern -> function. `*` in a pattern stands for any characters. A function takes
        the array, or the array and its `Site`. It returns None to read, or an array of the same
        shape and dtype, on the same device, to replace. It never changes the array in place.

    Raises
    ------
    ParameterError
        A name is unknown, or a value is no such function.
    """
    if not isinstance(functions, Mapping):
        raise ParameterError(
            f"hooks are {shown(functions)}, expected a dict of names and functions"
        )
    known = _known_names(model)
    bound = [
        _BoundHook(name, own, function, _count_arguments(pattern, function))
        for pattern, function in functions.items()
        for name, own in _match(pattern, known, model.config).items()
    ]
    if not bound:
        return model
    before = model.hooks if isinstance(model, HookedTransformer) else ()
    return HookedTransformer(model.config, model.weights, model.backend, (*before, *bound))


def all_names(model: Transformer) -> list[str]:
    """Return the names of all results of the forward pass, in order of computation."""
    layers = range(model.config.n_layer)
    return list(trace_names(forward, model, last_only=False, expanded=layers).names)


def find_names(model: Transformer, patterns: Iterable[str]) -> dict[str, str]:
    """Return the names that match patterns -> the same names as they are here.

    A pattern matches names here, or, if there are none, those of TransformerLens.

    Raises
    ------
    ParameterError
        A pattern matches no name.
    """
    known = _known_names(model)
    return {
        name: own
        for pattern in patterns
        for name, own in _match(pattern, known, model.config).items()
    }


def _known_names(model: Transformer) -> tuple[dict[str, str], dict[str, str]]:
    """Return the names here, and those of TransformerLens -> the names here."""
    lens = {
        name.format(i): own.format(i)
        for i in range(model.config.n_layer)
        for name, own in LENS_NAMES.items()
    }
    return {name: name for name in all_names(model)}, lens


def _match(
    pattern: Any, known: tuple[dict[str, str], dict[str, str]], config: GPT2Config
) -> dict[str, str]:
    if not isinstance(pattern, str):
        raise ParameterError(f"the name of an activation is {shown(pattern)}, expected a text")
    for names in known:
        if matches := {name: own for name, own in names.items() if fnmatchcase(name, pattern)}:
            return matches
    raise ParameterError(_unknown_name(pattern, [*known[0], *known[1]], config))


def _unknown_name(pattern: str, known: list[str], config: GPT2Config) -> str:
    message = f"the model computes nothing of the name {shown(pattern)}"
    layer = _LAYER.match(pattern)
    if layer and int(layer[1]) >= config.n_layer:
        return f"{message}: its layers are 0 to {config.n_layer - 1}"
    if close := difflib.get_close_matches(pattern, known, 1, MIN_LIKENESS):
        return f"{message}: did you mean {close[0]!r}?"
    return f"{message}: expected a name such as 'h.0.resid_post', see Model.hook_names"


def layers_to_expand(names: Iterable[str]) -> set[int]:
    """Return the layers whose attention has to be three nodes, for names as they are here."""
    return {int(name.split(".")[1]) for name in names if name.endswith(_NEEDS_EXPANSION)}


def logits_from(model: Transformer, name: str, x: Array) -> Array:
    """Return the logits [B, T, V] of the forward pass from one result on.

    Parameters
    ----------
    name
        Name of a result of which all later ones are functions: the last `resid_post`, or `ln_f`.
    x
        Array in the place of that result.
    """
    graph = trace_names(forward, model, last_only=False)
    weights, none = dict(named_weights(model.weights)), Positions(None, 0, True, lambda x: x)
    replay = Replay(model.backend, graph, weights, None, none)  # no later node reads ids
    replay.results[graph.names[name]] = x
    return replay.result(graph.output)


class HookedForward:
    """The forward pass with hooks, called as `gptx.model.forward` without the model."""

    def __init__(self, model: Transformer, hooks: tuple[_BoundHook, ...]) -> None:
        self.config, self.ops = model.config, model.backend
        self.weights = dict(named_weights(model.weights))
        expanded = layers_to_expand(hook.own for hook in hooks)
        self._passes = {
            last_only: _Pass(
                trace_names(forward, model, last_only=last_only, expanded=expanded), hooks
            )
            for last_only in (False, True)
        }

    def __call__(
        self, ids: Array, positions: Positions, cache: Any, *, last_only: bool = False
    ) -> Array:
        """Return logits [B, T, V], or [B, 1, V] if `last_only`."""
        traced = self._passes[last_only]
        return _HookedReplay(self.ops, traced, self.weights, ids, positions, cache).run()


class _Pass:
    """A graph, and the hooks of its nodes.

    Attributes
    ----------
    hooks
        Node -> its hooks.
    of_last
        Nodes of the last token of each sequence only.
    """

    def __init__(self, graph: Graph, hooks: tuple[_BoundHook, ...]) -> None:
        self.graph = graph
        self.hooks: dict[Node, list[_BoundHook]] = {}
        for hook in hooks:
            self.hooks.setdefault(graph.names[hook.own], []).append(hook)
        self.of_last: set[Node] = set()
        for node in graph.nodes:
            if node.op == "last" or self.of_last.intersection(node.inputs):
                self.of_last.add(node)


class _HookedReplay(Replay):
    def __init__(
        self,
        ops: Backend,
        traced: _Pass,
        weights: dict[str, Array],
        ids: Array,
        positions: Positions,
        cache: Any,
    ) -> None:
        super().__init__(ops, traced.graph, weights, ids, positions, cache)
        self.traced = traced

    def add_result(self, node: Node, x: Array) -> None:
        for hook in self.traced.hooks.get(node, ()):
            x = self._call(hook, node, x)
        super().add_result(node, x)

    def _call(self, hook: _BoundHook, node: Node, x: Array) -> Array:
        n_head = self.cache.config.n_head
        to_view, from_view = layouts(self.ops.xp, hook.name, hook.own, n_head)
        view = to_view(x)
        layer = _LAYER.match(hook.name)
        host = self.positions.host[:, -1:] if node in self.traced.of_last else self.positions.host
        site = Site(hook.name, int(layer[1]) if layer else None, host, self.ops)
        y = hook.function(*(view, site)[: hook.n_arguments])
        if y is None:
            return x
        self._check(hook, view, y)
        return from_view(y)

    def _check(self, hook: _BoundHook, x: Array, y: Array) -> None:
        """Check the array that a hook returned in the place of x."""
        if not isinstance(y, type(x)) or x.shape != y.shape or x.dtype != y.dtype:
            raise ParameterError(
                f"the hook of {hook.name} returned {_described(y)}, expected {_described(x)}, or "
                "None to read only"
            )
        if not self._is_usable(hook, y) and self._is_usable(hook, x):
            raise NonFiniteError(
                f"the hook of {hook.name} returned a NaN or an infinity: return finite numbers"
                + (", or -inf for some of the positions" if hook.own.endswith(".scores") else "")
            )

    def _is_usable(self, hook: _BoundHook, x: Array) -> bool:
        """Test for finite numbers; scores may be -inf, but not all scores of a token."""
        xp = self.ops.xp
        x = xp.astype(x, self.ops.accumulation_dtype)
        if not hook.own.endswith(".scores"):
            return bool(xp.all(xp.isfinite(x)))
        return not bool(xp.any(xp.isnan(x))) and bool(xp.all(xp.isfinite(xp.max(x, axis=-1))))


def layouts(
    xp: Any, name: str, own: str, n_head: int
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Return functions from the layout of a result to that of its name, and back.

    Parameters
    ----------
    xp
        Array-API namespace of the array.
    name, own
        Name of `find_names`, and the same name as it is here.
    """
    if name != own and own.endswith((".q", ".k", ".v")):

        def swap(x: Array) -> Array:  # [B, H, T, D] <-> [B, T, H, D]
            return xp.permute_dims(x, (0, 2, 1, 3))

        return swap, swap
    if name != own and own.endswith(".z"):
        return (
            lambda x: xp.reshape(x, (*x.shape[:2], n_head, x.shape[2] // n_head)),
            lambda x: xp.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3])),
        )
    return (lambda x: x), (lambda x: x)


def _count_arguments(name: str, function: Any) -> int:
    """Return 1 for a function of an array, 2 for one of an array and its `Site`."""
    wrong = ParameterError(
        f"the hook of {name} is {shown(function)}, expected a function of an array, or of an "
        "array and its Site"
    )
    if not callable(function):
        raise wrong
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions of compiled modules
        return 1
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if any(p.kind is p.KEYWORD_ONLY for p in required):
        raise wrong
    n = len([p for p in required if p.kind is not p.VAR_POSITIONAL])
    takes_some = any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters)
    if n > 2 or not takes_some:
        raise wrong
    return max(n, 1)


def _described(x: Any) -> str:
    """Return dtype and shape of an array, and its type if it is that of another library."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        return shown(x)
    kind = type(x)
    dtype = str(x.dtype).rpartition(".")[2]
    return f"{kind.__module__.partition('.')[0]}'s {kind.__name__} {dtype} {list(x.shape)}"
