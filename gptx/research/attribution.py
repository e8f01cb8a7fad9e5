"""Direct logit attribution: the part of a logit that each head, MLP and embedding writes.

Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021,
https://transformer-circuits.pub/2021/framework
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gptx.generation.prompts import Prompt
from gptx.generation.text_model import Model
from gptx.logits import all_logits, non_finite_error
from gptx.research.activations import record
from gptx.research.inputs import check_position, read_text, token_id

Array = Any


@dataclass(frozen=True, repr=False)
class Attribution:
    """The parts of one logit, or of a difference of two.

    Attributes
    ----------
    ids, tokens
        T token ids, and the text of each.
    token, versus
        Ids of the tokens: the parts are those of logit[token] - logit[versus]; without `versus`,
        which is None then, of logit[token].
    position
        Position of the token after which the logits are, from 0.
    logit
        Logit, or difference, of the model.
    names
        Name of each of n parts: "wte", "wpe", "h.i.attn.head.j", "h.i.attn.c_proj.bias", "h.i.mlp"
        (with its bias) and "ln_f.bias".
    values
        Parts, NumPy float64 [n]; their sum is the logit.
    heads, mlps
        Parts of the heads [L, H] and of the MLPs [L].
    """

    ids: list[int]
    tokens: tuple[str, ...]
    token: int
    versus: int | None
    position: int
    logit: float
    names: tuple[str, ...]
    values: np.ndarray
    heads: np.ndarray
    mlps: np.ndarray

    def __repr__(self) -> str:
        largest = np.argsort(-np.abs(self.values))[:3]
        parts = ", ".join(f"{self.names[i]} {self.values[i]:+.2f}" for i in largest)
        return f"<Attribution of a logit of {self.logit:.2f}: {parts}, …>"

    def _repr_html_(self) -> str:
        """Show the parts of heads and MLPs in a notebook, a row for each layer."""
        from gptx import html

        most = float(np.abs(self.values).max()) or 1.0
        table = np.concatenate([self.heads, self.mlps[:, None]], axis=1)
        rows = [
            (str(layer), [html.Cell(f"{x:+.2f}", float(x) / most) for x in row])
            for layer, row in enumerate(table)
        ]
        columns = [*(f"head {head}" for head in range(self.heads.shape[1])), "MLP"]
        rest = self.logit - float(table.sum())
        caption = (
            f"Parts of the logit {self.logit:.2f}, by layer; embeddings and biases: {rest:+.2f}"
        )
        return html.fragment(caption, html.table(columns, rows))


def attribute(
    model: Model,
    text: Prompt,
    token: str | int | None = None,
    versus: str | int | None = None,
    *,
    position: int = -1,
) -> Attribution:
    """Return the parts of a logit.

    The logits are linear in the residual stream if the scale of the last layer norm is frozen, and
    the residual stream is a sum. So each term of the sum has a part of the logit.

    Parameters
    ----------
    token
        Token of the logit, as its text or id; None for the most probable one.
    versus
        Token whose logit is subtracted.
    position
        Position of the token after which the logits are; -1 is the last one.

    Raises
    ------
    ParameterError
        A token or the position does not exist.
    NonFiniteError
        The model computed a NaN or an infinity.
    """
    tokens = read_text(model, text)
    place = check_position(position, len(tokens.ids))
    other = None if versus is None else token_id(model, versus, "versus")
    chosen = None if token is None else token_id(model, token)
    config, weights, backend = model.config, model.gpt2.weights, model.backend
    last = f"h.{config.n_layer - 1}.resid_post"
    patterns = ["wte", "wpe", "h.*.attn.z", "h.*.mlp.c_proj", last]
    names = [name for pattern in patterns for name in model_names(model, pattern)]
    with backend.scope():
        logits = backend.to_numpy(all_logits(model.gpt2, tokens.ids)[place, :]).astype(np.float64)
        if not np.isfinite(logits).all():
            raise non_finite_error(model.gpt2)
        chosen = int(logits.argmax()) if chosen is None else chosen
        at = {
            name: backend.to_numpy(x)[0, place].astype(np.float64)
            for name, x in record(model, tokens.ids, names).items()
        }
        terms: dict[str, np.ndarray] = {"wte": at["wte"], "wpe": at["wpe"]}
        for layer, block in enumerate(weights.h):
            bias = _floats(model, block.attn.c_proj.bias)
            written = _write_heads(model, block.attn.c_proj, at[f"h.{layer}.attn.z"]) - bias
            terms |= {f"h.{layer}.attn.head.{head}": x for head, x in enumerate(written)}
            terms[f"h.{layer}.attn.c_proj.bias"] = bias
            terms[f"h.{layer}.mlp"] = at[f"h.{layer}.mlp.c_proj"]
        direction = head_rows(model, [chosen] if other is None else [chosen, other])
        scale, shift = (_floats(model, x) for x in (weights.ln_f.weight, weights.ln_f.bias))
    direction = direction[0] if other is None else direction[0] - direction[1]
    deviation = np.sqrt(at[last].var() + config.layer_norm_epsilon)
    values = {
        name: float((x - x.mean()) / deviation @ (scale * direction)) for name, x in terms.items()
    }
    values["ln_f.bias"] = float(shift @ direction)
    layers, heads = range(config.n_layer), range(config.n_head)
    return Attribution(
        tokens.ids,
        tokens.texts,
        chosen,
        other,
        place,
        float(logits[chosen] - (0 if other is None else logits[other])),
        tuple(values),
        np.array(list(values.values())),
        np.array([[values[f"h.{i}.attn.head.{j}"] for j in heads] for i in layers]),
        np.array([values[f"h.{i}.mlp"] for i in layers]),
    )


def model_names(model: Model, pattern: str) -> list[str]:
    """Return the names of a pattern with the number of a layer in the place of `*`."""
    if "*" not in pattern:
        return [pattern]
    return [pattern.replace("*", str(layer)) for layer in range(model.config.n_layer)]


def head_rows(model: Model, ids: list[int]) -> np.ndarray:
    """Return rows of the head, NumPy float64 [n, C]: a logit is one times the last layer norm.

    To be called inside the scope of the backend.
    """
    backend, weights = model.backend, model.gpt2.weights
    head = weights.wte if model.config.tie_word_embeddings else weights.lm_head
    rows = backend.embed(backend.asarray(np.array([ids])), head.weight)
    return backend.to_numpy(rows)[0].astype(np.float64)


def _write_heads(model: Model, c_proj: Any, z: np.ndarray) -> np.ndarray:
    """Return the projection of each head alone, with the bias, [H, C]; z is [C]."""
    n_head = model.config.n_head
    own = np.arange(z.size) // (z.size // n_head) == np.arange(n_head)[:, None]
    backend = model.backend
    rows = backend.asarray(np.where(own, z, 0.0)[None])
    return backend.to_numpy(backend.linear(rows, c_proj.weight, c_proj.bias))[0].astype(np.float64)


def _floats(model: Model, x: Array) -> np.ndarray:
    return model.backend.to_numpy(x).astype(np.float64)
