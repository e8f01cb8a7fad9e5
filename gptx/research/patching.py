"""Activation patching: a run on one text with activations of a run on another.

Wang et al., "Interpretability in the Wild", 2022, https://arxiv.org/abs/2211.00593; Meng et al.,
"Locating and Editing Factual Associations in GPT", 2022, https://arxiv.org/abs/2202.05262
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptx.errors import ParameterError, PromptError, argument, shown
from gptx.generation.prompts import Prompt
from gptx.generation.text_model import Model
from gptx.hooks import Site
from gptx.logits import all_logits
from gptx.research.activations import record
from gptx.research.inputs import (
    Names,
    axes_of,
    check_choice,
    check_heads,
    check_position,
    mask_of,
    read_names,
    read_text,
    token_id,
)

Array = Any
Metric = Callable[[np.ndarray], float]

TABLES = ("position", "head")


@dataclass(frozen=True, repr=False)
class Patching:
    """A metric of each patched run: a table of n activations by T tokens, or by H heads.

    Attributes
    ----------
    clean_ids, clean_tokens, corrupted_ids, corrupted_tokens
        T token ids of both texts, and the text of each.
    names
        Name of each of n activations: the rows.
    by
        "position" or "head": the columns.
    values
        Metric of each patched run, NumPy float64 [n, T] or [n, H].
    clean, corrupted
        Metric of both runs without a patch.
    """

    clean_ids: list[int]
    clean_tokens: tuple[str, ...]
    corrupted_ids: list[int]
    corrupted_tokens: tuple[str, ...]
    names: tuple[str, ...]
    by: str
    values: np.ndarray
    clean: float
    corrupted: float

    @property
    def recovered(self) -> np.ndarray:
        """Share of the difference between both runs that a patch recovers: 0 none, 1 all of it."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self.values - self.corrupted) / (self.clean - self.corrupted)

    def __repr__(self) -> str:
        row, column = np.unravel_index(
            np.abs(self.values - self.corrupted).argmax(), self.values.shape
        )
        return (
            f"<Patching of {self.values.shape[0]} activations by {self.values.shape[1]} "
            f"{self.by}s: {self.corrupted:.3f} corrupted, {self.clean:.3f} clean, most change "
            f"{self.values[row, column]:.3f} at {self.names[row]}, {self.by} {column}>"
        )

    def _repr_html_(self) -> str:
        """Show a table in a notebook; the color is the recovered share of the difference."""
        from gptx import html

        heads = tuple(f"head {head}" for head in range(self.values.shape[1]))
        columns = self.clean_tokens if self.by == "position" else heads
        rows = [
            (name, [html.Cell(f"{x:.2f}", float(share)) for x, share in zip(*pair, strict=True)])
            for name, *pair in zip(self.names, self.values, self.recovered, strict=True)
        ]
        caption = (
            f"Metric of each patched run: {self.corrupted:.3f} corrupted, {self.clean:.3f} clean"
        )
        return html.fragment(caption, html.table(columns, rows))


def logit_difference(
    model: Model, token: str | int, versus: str | int, position: int = -1
) -> Metric:
    """Return the metric logit[token] - logit[versus] after the token at `position`.

    Raises
    ------
    ParameterError
        A token does not exist.
    """
    a, b = token_id(model, token), token_id(model, versus, "versus")

    def difference(logits: np.ndarray) -> float:
        row = logits[check_position(position, len(logits))]
        return float(row[a]) - float(row[b])

    return difference


def patch(
    model: Model,
    clean: Prompt,
    corrupted: Prompt,
    names: Names,
    metric: Metric,
    *,
    by: str = "position",
) -> Patching:
    """Run the corrupted text with single activations of the clean text.

    Parameters
    ----------
    clean, corrupted
        Two texts of the same number of tokens.
    names
        Names or patterns of activations: the rows of the table.
    metric
        Function of logits, NumPy [T, V], to a number; see `logit_difference`.
    by
        "position": patch one token at a time, all heads; "head": one head at a time, all tokens.

    Raises
    ------
    PromptError
        The texts have different numbers of tokens.
    ParameterError
        A name is unknown, has no heads, or `metric` is no function.
    """
    check_choice("by", by, TABLES)
    if not callable(metric):
        raise ParameterError(
            f"{argument('metric')} is {shown(metric)}, expected a function of logits, such as "
            "research.logit_difference(model, token, versus)"
        )
    texts = read_text(model, clean), read_text(model, corrupted)
    n_tokens = len(texts[0].ids)
    if n_tokens != len(texts[1].ids):
        raise PromptError(
            f"the clean text has {n_tokens} tokens, the corrupted one {len(texts[1].ids)}: give "
            "texts of the same number of tokens"
        )
    backend, n_head, own = model.backend, model.config.n_head, read_names(model, names)
    if by == "head":
        check_heads(own)
    n_columns = n_tokens if by == "position" else n_head
    values = np.empty((len(own), n_columns))
    with backend.scope():
        source = record(model, texts[0].ids, list(own))
        cell = "", np.zeros(0)  # name of the activation to patch, and its mask

        def replace(x: Array, site: Site) -> Array | None:
            if site.name != cell[0]:
                return None
            return backend.xp.where(backend.asarray(cell[1]) != 0, source[site.name], x)

        def measure(ids: list[int]) -> float:
            return float(metric(backend.to_numpy(all_logits(model.gpt2, ids))))

        # All runs have the same hooks, so that they run the same ops and differ by the patch only.
        with model.hooks(dict.fromkeys(own, replace)):
            found = [measure(text.ids) for text in texts]
            for row, (name, own_name) in enumerate(own.items()):
                axes = axes_of(name, own_name)
                for column in range(n_columns):
                    tokens = np.arange(n_tokens)[None] == column if by == "position" else None
                    heads = None if by == "position" else [column]
                    cell = name, mask_of(source[name].shape, axes, n_head, tokens, heads)
                    values[row, column] = measure(texts[1].ids)
    return Patching(
        texts[0].ids, texts[0].texts, texts[1].ids, texts[1].texts, tuple(own), by, values, *found
    )  # fmt: skip
