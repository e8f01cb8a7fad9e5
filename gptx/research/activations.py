"""Activations of one text, attention maps, hidden states, embeddings of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptx.errors import ParameterError, argument, shown
from gptx.generation.prompts import Prompt
from gptx.generation.text_model import Model
from gptx.hooks import Site
from gptx.logits import all_logits
from gptx.research.inputs import (
    Names,
    check_choice,
    check_numbers,
    read_names,
    read_text,
    read_texts,
)

Array = Any

MAP_PIXELS = 96  # width of an attention pattern in HTML
POOLINGS = ("mean", "last")


class Arrays(Mapping[str, np.ndarray]):
    """A mapping of names to the arrays in the attribute `arrays`."""

    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


@dataclass(frozen=True, repr=False)
class Activations(Arrays):
    """Activations of one text, by name: `found["h.3.mlp.act"]`.

    Attributes
    ----------
    ids, tokens
        T token ids, and the text of each.
    arrays
        Name -> NumPy array, of the shape in `gptx.hooks` without the axis of the sequences.
    """

    ids: list[int]
    tokens: tuple[str, ...]
    arrays: dict[str, np.ndarray]

    def __repr__(self) -> str:
        n_bytes = sum(x.nbytes for x in self.arrays.values())
        return (
            f"<Activations of {len(self.ids)} tokens: {len(self)} arrays, {n_bytes / 1e6:,.2f} MB>"
        )


@dataclass(frozen=True, repr=False)
class AttentionMaps:
    """Attention patterns of one text.

    Attributes
    ----------
    ids, tokens
        T token ids, and the text of each.
    layers
        Number of each of n layers.
    patterns
        Weights of the tokens attended to, [n, H, T, T]: rows are the attending tokens and sum to 1.
    """

    ids: list[int]
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    patterns: np.ndarray

    def __repr__(self) -> str:
        n, H, T, _ = self.patterns.shape
        return f"<AttentionMaps of {T} tokens: {n} layers of {H} heads>"

    def _repr_html_(self) -> str:
        """Show the pattern of each head in a notebook, a row of heads for each layer."""
        from gptx import html

        rows = []
        for layer, heads in zip(self.layers, self.patterns, strict=True):
            names = [f"layer {layer}, head {head}" for head in range(len(heads))]
            images = [html.image(x, name, MAP_PIXELS) for x, name in zip(heads, names, strict=True)]
            rows.append(f'<div style="white-space: nowrap">{layer} {"".join(images)}</div>')
        caption = (
            "Attention patterns: a row of heads for each layer. In a pattern, rows are the "
            "attending tokens, from the first at the top:"
        )
        return html.fragment(caption, html.text(map(html.Cell, self.tokens)), *rows)


def record(model: Model, ids: list[int], names: Sequence[str]) -> dict[str, Array]:
    """Return the activations of token ids by name, on the device, with an axis of 1 sequence.

    To be called inside the scope of the backend.
    """
    found: dict[str, Array] = {}

    def read(x: Array, site: Site) -> None:
        found[site.name] = x

    with model.hooks(dict.fromkeys(names, read)):
        all_logits(model.gpt2, ids)
    return {name: found[name] for name in names}


def activations(model: Model, text: Prompt, names: Names) -> Activations:
    """Return activations of a text.

    Parameters
    ----------
    text
        A text or a list of T token ids. For special tokens, give
        `model.encode(text, allow_special=True)`.
    names
        A name or a pattern, or several: those of `gptx.hooks`, or TransformerLens's.

    Raises
    ------
    ParameterError
        A name is unknown.
    PromptError
        The text is empty or longer than the context.
    """
    tokens = read_text(model, text)
    with model.backend.scope():
        found = record(model, tokens.ids, list(read_names(model, names)))
        arrays = {name: np.array(model.backend.to_numpy(x)[0]) for name, x in found.items()}
    return Activations(tokens.ids, tokens.texts, arrays)


def attention_maps(
    model: Model, text: Prompt, layers: Sequence[int] | None = None
) -> AttentionMaps:
    """Return the attention patterns of a text, as transformers' `output_attentions` has them.

    Parameters
    ----------
    layers
        Numbers of layers, from 0; None for all.

    Raises
    ------
    ParameterError
        A layer does not exist.
    PromptError
        The text is empty or longer than the context.
    """
    n_layer = model.config.n_layer
    chosen = check_numbers("layers", range(n_layer) if layers is None else layers, n_layer)
    found = activations(model, text, [f"h.{layer}.attn.pattern" for layer in chosen])
    patterns = np.stack([found[f"h.{layer}.attn.pattern"] for layer in chosen])
    return AttentionMaps(found.ids, found.tokens, tuple(chosen), patterns)


def hidden_states(model: Model, text: Prompt) -> np.ndarray:
    """Return the residual stream, [L + 1, T, C], as transformers' `output_hidden_states` has it.

    It is the sum of the embeddings, then the result of each block; in the place of the last one is
    the result of the last layer norm.
    """
    n_layer = model.config.n_layer
    names = [*(f"h.{layer}.resid_pre" for layer in range(n_layer)), "ln_f"]
    found = activations(model, text, names)
    return np.stack([found[name] for name in names])


def embeddings(
    model: Model,
    texts: Prompt | Sequence[Prompt],
    *,
    pooling: str = "mean",
    name: str = "ln_f",
) -> np.ndarray:
    """Return a vector for each text, [n, C].

    Parameters
    ----------
    texts
        A text or a list of token ids; or a list of those.
    pooling
        "mean" of all tokens, or "last": that of the last token, which has read all others.
    name
        Name of an activation [B, T, C].

    Raises
    ------
    ParameterError
        An option is unknown, or the activation has more axes.
    """
    check_choice("pooling", pooling, POOLINGS)
    return np.stack(
        [pooled(model, tokens.ids, name, pooling) for tokens in read_texts(model, texts)]
    )


def pooled(model: Model, ids: list[int], name: str, pooling: str) -> np.ndarray:
    """Return the mean or the last row of an activation [T, C] of token ids.

    Raises
    ------
    ParameterError
        The activation has other axes.
    """
    found = activations(model, ids, name)
    (x,) = found.values() if len(found) == 1 else (None,)
    if x is None or x.ndim != 2:
        kind = f"{len(found)} activations" if x is None else f"an array {list(x.shape)}"
        raise ParameterError(
            f"{argument('name')} is {shown(name)}, {kind}, expected one activation of a row for "
            "each token, such as 'ln_f' or 'h.0.resid_post'"
        )
    return np.asarray(x[-1] if pooling == "last" else x.mean(axis=0, dtype=np.float64)).astype(
        x.dtype, copy=False
    )
