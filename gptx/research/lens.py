"""The logit lens: each layer's residual stream, read by the last layer norm and the head.

nostalgebraist, "interpreting GPT: the logit lens", 2020,
https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gptx.errors import ParameterError, argument
from gptx.generation.checks import check_count
from gptx.generation.prompts import Prompt
from gptx.generation.text_model import Model
from gptx.hooks import logits_from
from gptx.logits import all_logits
from gptx.research.activations import record
from gptx.research.inputs import Names, read_names, read_text, token_text

RESIDUAL_STREAM = ("h.0.resid_pre", "h.*.resid_post")


@dataclass(frozen=True, repr=False)
class LogitLens:
    """Logits of each layer: a table of n activations by T tokens.

    Attributes
    ----------
    ids, tokens
        T token ids, and the text of each.
    names
        Name of each of n activations, in order of computation.
    logits
        Logits [n, T, V], float32 (float64 for float64 weights).
    top_ids
        Ids of the k most probable tokens, [n, T, k].
    top_tokens
        Their texts, nested tuples of the same shape.
    top_logprobs
        Their log-probabilities in nats, [n, T, k].
    """

    ids: list[int]
    tokens: tuple[str, ...]
    names: tuple[str, ...]
    logits: np.ndarray
    top_ids: np.ndarray
    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]
    top_logprobs: np.ndarray

    def __repr__(self) -> str:
        last = " ".join(repr(tokens[-1][0]) for tokens in self.top_tokens)
        return f"<LogitLens of {len(self.ids)} tokens, at the last one: {last}>"

    def _repr_html_(self) -> str:
        """Show a table in a notebook: the most probable next token of each layer and position."""
        from gptx import html

        def cell(tokens: tuple[str, ...], logprobs: np.ndarray) -> html.Cell:
            shares = np.exp(logprobs)
            lines = [f"{x!r} {p:.2%}" for x, p in zip(tokens, shares, strict=True)]
            return html.Cell(tokens[0], float(shares[0]), "\n".join(lines))

        rows = [
            (name, [cell(*pair) for pair in zip(tokens, logprobs, strict=True)])
            for name, tokens, logprobs in zip(
                self.names, self.top_tokens, self.top_logprobs, strict=True
            )
        ]
        caption = "Logit lens: the most probable next token after each token, by layer"
        return html.fragment(caption, html.table(self.tokens, rows[::-1]))


def logit_lens(
    model: Model, text: Prompt, names: Names = RESIDUAL_STREAM, *, k: int = 5
) -> LogitLens:
    """Return the logits that the model would have if it ended after each layer.

    Parameters
    ----------
    names
        Names or patterns of activations [B, T, C]; by default the residual stream before the first
        block, and after each block. The row of the last `resid_post` is `model.logits(ids)`, bit
        for bit.
    k
        Number of most probable tokens.

    Raises
    ------
    ParameterError
        A name is unknown, or an activation has another shape.
    """
    tokens = read_text(model, text)
    k = min(check_count("k", k), model.config.vocab_size)
    last = f"h.{model.config.n_layer - 1}.resid_post"
    own_names = read_names(model, names)
    backend, rows = model.backend, []
    with backend.scope():
        for (name, own), x in zip(
            own_names.items(), record(model, tokens.ids, list(own_names)).values(), strict=True
        ):
            if x.shape != (1, len(tokens.ids), model.config.n_embd):
                raise ParameterError(
                    f"{argument('names')} has {name}, an array {list(x.shape)}, expected "
                    f"{[1, len(tokens.ids), model.config.n_embd]}, such as 'h.0.resid_post'"
                )
            if own == last:  # the compiled pass, which may round differently
                row = all_logits(model.gpt2, tokens.ids)
            else:
                row = logits_from(model.gpt2, last, x)[0, :, :]
            rows.append(np.array(backend.to_numpy(row)))
    logits = np.stack(rows)
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    texts = {int(id): token_text(model, int(id)) for id in np.unique(order)}
    return LogitLens(
        tokens.ids,
        tokens.texts,
        tuple(own_names),
        logits,
        order,
        tuple(tuple(tuple(texts[int(id)] for id in cell) for cell in row) for row in order),
        np.take_along_axis(logprobs, order, axis=-1),
    )
