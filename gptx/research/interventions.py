"""Interventions for a `with` block: ablation and steering, for prompts and for decoding.

Wang et al., 2022, https://arxiv.org/abs/2211.00593 (mean ablation); Chan et al., "Causal
Scrubbing", 2022 (resampling); Turner et al., "Activation Addition", 2023,
https://arxiv.org/abs/2308.10248 (steering vectors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from gptx.errors import ParameterError, argument, shown
from gptx.generation.checks import check_count, is_real
from gptx.generation.prompts import Prompt
from gptx.generation.text_model import Model
from gptx.hooks import Site
from gptx.research.activations import POOLINGS, activations, pooled
from gptx.research.inputs import (
    Axes,
    Names,
    as_floats,
    axes_of,
    check_choice,
    check_heads,
    check_numbers,
    mask_of,
    read_names,
    read_texts,
)

Array = Any

ABLATIONS = ("zero", "mean", "resample")


def ablate(
    model: Model,
    names: Names,
    how: str = "zero",
    *,
    texts: Prompt | Sequence[Prompt] | None = None,
    heads: Sequence[int] | None = None,
    seed: int = 0,
) -> AbstractContextManager[Model]:
    """Return a context manager; within it, activations have values that say nothing of the text.

        with research.ablate(model, "h.3.attn.z", "mean", texts=others, heads=[1, 4]):
            model.logits(ids)

    Parameters
    ----------
    names
        Names or patterns of activations.
    how
        "zero"; "mean" of all tokens of `texts`; "resample": each position has the value of a token
        of `texts`, drawn at random, the same token for all names.
    texts
        Texts for "mean" and "resample".
    heads
        Numbers of heads; None ablates the whole activation.
    seed
        Key of the random numbers: Philox, counted by position.

    Raises
    ------
    ParameterError
        Options contradict each other, or an activation cannot be ablated in this way.
    """
    check_choice("how", how, ABLATIONS)
    if (texts is None) != (how == "zero"):
        given = "without" if texts is None else "with"
        raise ParameterError(
            f"{argument('how')} is {how!r} {given} {argument('texts')}, expected texts for "
            "'mean' and 'resample' only"
        )
    seed = check_count("seed", seed, 0)
    own = read_names(model, names)
    chosen = None if heads is None else check_numbers("heads", heads, model.config.n_head)
    if chosen is not None:
        check_heads(own)
    for name, own_name in own.items():
        _check_kind(name, own_name.rpartition(".")[2], how)
    pools = {} if texts is None else _pools(model, texts, own)
    axes = {name: axes_of(name, own_name) for name, own_name in own.items()}

    def replace(x: Array, site: Site) -> Array:
        backend, xp, its_axes = site.backend, site.backend.xp, axes[site.name]
        values = xp.zeros_like(x)
        if how == "mean":
            values = values + backend.asarray(pools[site.name].mean(its_axes.token, keepdims=True))
        elif how == "resample":
            host = _resample(pools[site.name], its_axes, site.positions, seed)
            values = values + backend.asarray(host)
        if chosen is None:
            return values
        mask = mask_of(x.shape, its_axes, model.config.n_head, heads=chosen)
        return xp.where(backend.asarray(mask) != 0, values, x)

    return model.hooks(dict.fromkeys(own, replace))


def _check_kind(name: str, kind: str, how: str) -> None:
    if kind in ("scores", "keys", "values"):
        other = {"scores": "pattern", "keys": "k", "values": "v"}[kind]
        raise ParameterError(f"{name} cannot be ablated: ablate attn.{other} in its place")
    if kind == "pattern" and how != "zero":
        raise ParameterError(
            f"{name} has a column for each position, {argument('how')} is {how!r}, expected 'zero'"
        )


def _pools(
    model: Model, texts: Prompt | Sequence[Prompt], own: dict[str, str]
) -> dict[str, np.ndarray]:
    """Return the activations of all tokens of texts, side by side: name -> array of 1 sequence."""
    found = [activations(model, tokens.ids, list(own)) for tokens in read_texts(model, texts)]
    return {
        name: np.concatenate([one[name][None] for one in found], axis_of.token).astype(np.float64)
        for name, axis_of in ((name, axes_of(name, own_name)) for name, own_name in own.items())
    }


def _resample(pool: np.ndarray, axes: Axes, positions: np.ndarray, seed: int) -> np.ndarray:
    """Return an activation whose token at each of `positions` [B, T] is a random one of `pool`."""
    n = pool.shape[axes.token]
    drawn = [
        [int(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, p]).random_raw()) % n for p in row]
        for row in positions.tolist()
    ]
    return np.concatenate([np.take(pool, row, axis=axes.token) for row in drawn])


def steering_vector(
    model: Model,
    positive: Prompt | Sequence[Prompt],
    negative: Prompt | Sequence[Prompt],
    name: str,
    *,
    pooling: str = "last",
) -> np.ndarray:
    """Return the mean activation of positive texts, minus that of negative texts, [C].

    Parameters
    ----------
    positive, negative
        A text, or a list of texts.
    name
        Name of an activation [B, T, C], such as "h.3.resid_post".
    pooling
        "last" token of each text, or "mean" of all its tokens.
    """
    check_choice("pooling", pooling, POOLINGS)
    means = [
        np.mean([pooled(model, t.ids, name, pooling) for t in read_texts(model, texts)], axis=0)
        for texts in (positive, negative)
    ]
    return means[0] - means[1]


def steer(
    model: Model, vectors: Mapping[str, np.ndarray], *, scale: float = 1.0, start: int = 0
) -> AbstractContextManager[Model]:
    """Return a context manager; within it, vectors are added to activations.

        with research.steer(model, {"h.3.resid_post": vector}, scale=4.0):
            model.generate("I think")

    Parameters
    ----------
    vectors
        Name or pattern -> vector, of the width of the activation.
    scale
        Factor of all vectors.
    start
        First position to steer.

    Raises
    ------
    ParameterError
        An option is no such number; in a forward pass: a vector has another shape.
    NonFiniteError
        A vector has a NaN or an infinity.
    """
    start = check_count("start", start, 0)
    if not is_real(scale) or not np.isfinite(scale):
        raise ParameterError(f"{argument('scale')} is {shown(scale)}, expected a finite number")
    if not isinstance(vectors, Mapping):
        raise ParameterError(
            f"{argument('vectors')} is {shown(vectors)}, expected a dict of names and vectors"
        )
    scaled = {
        name: float(scale) * as_floats("vectors", vector)
        for pattern, vector in vectors.items()
        for name in read_names(model, pattern)
    }

    def add(x: Array, site: Site) -> Array:
        vector, xp = scaled[site.name], site.backend.xp
        if vector.shape != (x.shape[-1],):
            raise ParameterError(
                f"the vector of {site.name} has the shape {list(vector.shape)}, expected "
                f"{[x.shape[-1]]}"
            )
        if x.ndim != 3:
            raise ParameterError(
                f"{site.name} is an array {list(x.shape)}, expected one of a row for each token"
            )
        steered = x + site.backend.asarray(vector)
        mask = site.backend.asarray(site.positions[:, :, None] >= start)
        return xp.where(mask != 0, steered, x)

    return model.hooks(dict.fromkeys(scaled, add))
