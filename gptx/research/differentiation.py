"""Gradients of a logit by activations, and integrated gradients.

Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", 2017,
https://arxiv.org/abs/1703.01365
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptx.backends.backward import ActivationGradients
from gptx.errors import ParameterError, argument, shown
from gptx.generation.checks import check_count, is_real
from gptx.generation.prompts import Prompt
from gptx.generation.text_model import Model
from gptx.hooks import HookedTransformer, layers_to_expand, layouts
from gptx.logits import all_logits, non_finite_error
from gptx.model import forward
from gptx.research.activations import Arrays, record
from gptx.research.attribution import head_rows
from gptx.research.inputs import (
    Names,
    Tokens,
    as_floats,
    axes_of,
    check_position,
    read_names,
    read_text,
    token_id,
)

Array = Any

POINTS = 8  # of the Gauss-Legendre rule on a part of the path, in one batch
TOLERANCE = 1e-3
MAX_POINTS = 1024


@dataclass(frozen=True, repr=False)
class Gradients(Arrays):
    """Gradients of one logit, or of a difference of two, by activations: `found["h.3.mlp.act"]`.

    Attributes
    ----------
    ids, tokens
        T token ids, and the text of each.
    token, versus
        Ids of the tokens of logit[token] - logit[versus]; `versus` is None without one.
    position
        Position of the token after which the logits are, from 0.
    logit
        Logit, or difference.
    arrays
        Name -> gradient, of the shape in `gptx.hooks` without the axis of the sequences.
    """

    ids: list[int]
    tokens: tuple[str, ...]
    token: int
    versus: int | None
    position: int
    logit: float
    arrays: dict[str, np.ndarray]

    def __repr__(self) -> str:
        return f"<Gradients of a logit of {self.logit:.2f} by {', '.join(self.arrays)}>"


@dataclass(frozen=True, repr=False)
class IntegratedGradients:
    """The part of each number of an activation in the change of a logit from a baseline.

    Attributes
    ----------
    ids, tokens
        T token ids, and the text of each.
    token, versus
        Ids of the tokens of logit[token] - logit[versus]; `versus` is None without one.
    position
        Position of the token after which the logits are, from 0.
    name
        Name of the activation.
    values
        Parts, NumPy float64, of the shape of the activation; their sum is `logit - baseline`.
    by_token
        Sums of the parts of each token, [T]; in a pattern, of each attending token.
    logit, baseline
        Logit, or difference, of the text and of the baseline.
    n_points
        Number of points on the path whose gradients were computed.
    """

    ids: list[int]
    tokens: tuple[str, ...]
    token: int
    versus: int | None
    position: int
    name: str
    values: np.ndarray
    by_token: np.ndarray
    logit: float
    baseline: float
    n_points: int

    @property
    def gap(self) -> float:
        """Error of completeness: sum of the parts, minus the change of the logit."""
        return float(self.values.sum() - (self.logit - self.baseline))

    def __repr__(self) -> str:
        return (
            f"<IntegratedGradients of {self.name}: a logit of {self.logit:.2f}, of the baseline "
            f"{self.baseline:.2f}, gap {self.gap:.1e} after {self.n_points} points>"
        )

    def _repr_html_(self) -> str:
        """Show the tokens in a notebook, each on the color of its part."""
        from gptx import html

        most = float(np.abs(self.by_token).max()) or 1.0
        cells = [
            html.Cell(token, float(x) / most, f"{x:+.3f}")
            for token, x in zip(self.tokens, self.by_token, strict=True)
        ]
        caption = (
            f"Parts of the change of a logit from {self.baseline:.2f} to {self.logit:.2f}: blue "
            "raises it, orange lowers it"
        )
        return html.fragment(caption, html.text(cells))


class _Target:
    """One logit after one token, or a difference of two, as a function of activations."""

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        names: dict[str, str],
        token: str | int | None,
        versus: str | int | None,
        position: int,
    ) -> None:
        self.model, self.ids, self.names = model, tokens.ids, names
        gpt2, backend = model.gpt2, model.backend
        if isinstance(gpt2, HookedTransformer):
            raise ParameterError(
                "gradients do not pass through hooks: leave the `with` block of the hooks"
            )
        if model.config.quantization is not None:
            raise ParameterError(
                f"the model is {model.config.quantization}, gradients need float weights: load it "
                f"without {argument('quantize')}"
            )
        if output := [name for name, own in names.items() if own == "lm_head"]:
            raise ParameterError(f"{output[0]} has the logits themselves: give another name")
        self.position = check_position(position, len(tokens.ids))
        self.versus = None if versus is None else token_id(model, versus, "versus")
        logits = backend.to_numpy(all_logits(gpt2, tokens.ids)[self.position, :])
        if not np.isfinite(logits).all():
            raise non_finite_error(gpt2)
        self.token = int(logits.argmax()) if token is None else token_id(model, token)
        rows = head_rows(model, [self.token] if versus is None else [self.token, self.versus or 0])
        direction = np.zeros((1, len(tokens.ids), model.config.n_embd))
        direction[0, self.position] = rows[0] if versus is None else rows[0] - rows[1]
        self._direction = direction
        owns = set(names.values())
        self._gradients = ActivationGradients(
            forward, gpt2, owns, expanded=layers_to_expand(owns)
        )  # fmt: skip

    def __call__(
        self, n: int = 1, values: dict[str, Array] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return logits [n] and gradients [n, ...] of n copies of the text, float64 on the host.

        `values` has arrays in the place of activations, by names as in `gptx.hooks`.
        """
        backend = self.model.backend
        ids = backend.asarray(np.tile(self.ids, (n, 1)))
        direction = backend.asarray(np.tile(self._direction, (n, 1, 1)))
        logits, found = self._gradients(ids, direction, values)
        views = {}
        for name, own in self.names.items():
            to_view, _ = layouts(backend.xp, name, own, self.model.config.n_head)
            views[name] = backend.to_numpy(to_view(found[own]))
        return backend.to_numpy(logits).astype(np.float64), views


def gradients(
    model: Model,
    text: Prompt,
    names: Names,
    token: str | int | None = None,
    versus: str | int | None = None,
    *,
    position: int = -1,
) -> Gradients:
    """Return the gradients of a logit by activations.

    Parameters
    ----------
    names
        Names or patterns of activations, but not "lm_head".
    token
        Token of the logit, as its text or id; None for the most probable one.
    versus
        Token whose logit is subtracted.
    position
        Position of the token after which the logit is; -1 is the last one.

    Raises
    ------
    ParameterError
        A name, a token or the position does not exist; the model is quantized, or has hooks.
    NonFiniteError
        The model computed a NaN or an infinity.
    """
    tokens, own = read_text(model, text), read_names(model, names)
    with model.backend.scope():
        target = _Target(model, tokens, own, token, versus, position)
        logits, found = target()
    arrays = {name: np.array(x[0]) for name, x in found.items()}
    return Gradients(
        tokens.ids, tokens.texts, target.token, target.versus, target.position, float(logits[0]),
        arrays,
    )  # fmt: skip


def integrated_gradients(
    model: Model,
    text: Prompt,
    token: str | int | None = None,
    versus: str | int | None = None,
    *,
    position: int = -1,
    name: str = "wte",
    baseline: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
    max_points: int = MAX_POINTS,
) -> IntegratedGradients:
    """Return the integral of the gradient on the straight path from a baseline to an activation.

    The path is split where the integral of a part differs from the change of the logit on it, since
    layer norms change fast near zero. So the parts are complete: they sum to the change.

    Parameters
    ----------
    token, versus, position
        See `gradients`.
    name
        Name of one activation: "wte", the token embeddings, by default.
    baseline
        Array of the shape of the activation; None for zeros.
    tolerance
        Largest error of completeness, in the unit of logits.
    max_points
        Most points on the path.

    Raises
    ------
    ParameterError
        An argument is invalid, or the error exceeds the tolerance after `max_points`.
    NonFiniteError
        The baseline has a NaN or an infinity, or the model computed one.
    """
    tokens, own = read_text(model, text), read_names(model, name)
    if len(own) > 1:
        raise ParameterError(
            f"{argument('name')} is {shown(name)}, which is {len(own)} activations, expected one"
        )
    if not is_real(tolerance) or not tolerance > 0:
        raise ParameterError(f"{argument('tolerance')} is {shown(tolerance)}, expected over 0")
    max_points = check_count("max_points", max_points, POINTS)
    ((name, own_name),) = own.items()
    backend = model.backend
    with backend.scope():
        target = _Target(model, tokens, own, token, versus, position)
        _, from_view = layouts(backend.xp, name, own_name, model.config.n_head)
        found = record(model, tokens.ids, [name])[name]
        end = backend.to_numpy(found).astype(np.float64)
        start = np.zeros_like(end) if baseline is None else as_floats("baseline", baseline)[None]
        if start.shape != end.shape:
            raise ParameterError(
                f"{argument('baseline')} has the shape {list(start.shape[1:])}, expected that of "
                f"{name}, {list(end.shape[1:])}"
            )
        nodes, weights = np.polynomial.legendre.leggauss(POINTS)

        def integrate(first: float, last: float) -> _Part:
            at = np.array([first, *((last - first) * (nodes + 1) / 2 + first), last])
            path = start + at.reshape(-1, *[1] * (end.ndim - 1)) * (end - start)
            value = from_view(backend.asarray(path))
            logits, slopes = target(len(at), {own_name: value})
            mean = np.tensordot(weights, slopes[name][1:-1].astype(np.float64), 1) / 2
            values = (last - first) * mean * (end - start)[0]
            return _Part(first, last, values, logits[0], logits[-1])

        parts = [integrate(0.0, 1.0)]
        while (error := sum(part.error for part in parts)) > tolerance:
            n_points = POINTS * len(parts)
            if n_points >= max_points:
                raise ParameterError(
                    f"the integrated gradients differ from the change of the logit by {error:.2g} "
                    f"after {n_points} points, expected {tolerance}: raise {argument('max_points')}"
                    f" or {argument('tolerance')}, or use a wider dtype"
                )
            worst = heapq.heappop(parts)
            middle = (worst.first + worst.last) / 2
            heapq.heappush(parts, integrate(worst.first, middle))
            heapq.heappush(parts, integrate(middle, worst.last))
    parts.sort(key=lambda part: part.first)
    values = np.sum([part.values for part in parts], axis=0)
    token_axis = axes_of(name, own_name).token - 1
    by_token = np.moveaxis(values, token_axis, 0).reshape(len(tokens.ids), -1).sum(axis=1)
    return IntegratedGradients(
        tokens.ids, tokens.texts, target.token, target.versus, target.position, name, values,
        by_token, float(parts[-1].end), float(parts[0].start), POINTS * len(parts),
    )  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """A part of the path, from `first` to `last`: the integral, and the logits at its ends."""

    first: float
    last: float
    values: np.ndarray
    start: float
    end: float

    @property
    def error(self) -> float:
        """Difference of the integral to the change of the logit."""
        return abs(float(self.values.sum()) - (self.end - self.start))

    def __lt__(self, other: _Part) -> bool:
        return self.error > other.error  # the largest error first
