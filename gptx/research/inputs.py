"""Inputs of all functions: texts, tokens, positions, choices; and the axes of activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gptx.errors import NonFiniteError, ParameterError, PromptError, argument, shown
from gptx.generation.checks import is_int
from gptx.generation.prompts import Prompt, check_ids, check_not_empty, single_prompt, split_prompts
from gptx.generation.text_model import Model
from gptx.hooks import find_names

Names = str | Sequence[str]
Choice = TypeVar("Choice", bound=str)


class Tokens(NamedTuple):
    """A text as tokens.

    Attributes
    ----------
    ids
        T token ids.
    texts
        Text of each token; its number, if the model has no tokenizer.
    """

    ids: list[int]
    texts: tuple[str, ...]


def read_text(model: Model, text: Prompt) -> Tokens:
    """Return the tokens of one text, or of a list of token ids.

    Raises
    ------
    PromptError
        It is empty or longer than the context, or has ids outside of the vocabulary.
    """
    prompt = single_prompt(text, "the function")
    if isinstance(prompt, str):
        check_not_empty([prompt])
        prompt = model.encode(prompt)
    ids = check_ids(prompt, model.config.vocab_size)
    if len(ids) > model.config.n_positions:
        raise PromptError(
            f"{len(ids)} tokens were given, the context holds {model.config.n_positions}: "
            "give fewer"
        )
    return Tokens(ids, tuple(token_text(model, id) for id in ids))


def read_texts(model: Model, texts: Prompt | Sequence[Prompt]) -> list[Tokens]:
    """Return the tokens of one text, or of each of several; see `read_text`."""
    prompts, _ = split_prompts(texts)
    check_not_empty(prompts)
    return [read_text(model, prompt) for prompt in prompts]


def token_text(model: Model, id: int) -> str:
    """Return the text of a token; its number, if the model has no tokenizer."""
    return model.tokenizer.decode([id]) if model.info.has_tokenizer else str(id)


def token_id(model: Model, token: str | int, name: str = "token") -> int:
    """Return the id of a token, given as its id or its text.

    Raises
    ------
    ParameterError
        The text is not one token, or the id is outside of the vocabulary.
    """
    if isinstance(token, str):
        ids = model.encode(token)
        if len(ids) != 1:
            raise ParameterError(
                f"{argument(name)} is {shown(token)}, which is {len(ids)} tokens, expected one: "
                "give its id"
            )
        return ids[0]
    if not is_int(token) or not 0 <= token < model.config.vocab_size:
        raise ParameterError(
            f"{argument(name)} is {shown(token)}, expected the text of one token, or an id from 0 "
            f"to {model.config.vocab_size - 1}"
        )
    return int(token)


def check_position(position: int, n_tokens: int) -> int:
    """Return a position counted from the first token; -1 is the last one.

    Raises
    ------
    ParameterError
        The text has no such token.
    """
    if not is_int(position) or not -n_tokens <= position < n_tokens:
        raise ParameterError(
            f"{argument('position')} is {shown(position)}, expected a number from {-n_tokens} to "
            f"{n_tokens - 1}: the text has {n_tokens} tokens"
        )
    return int(position) % n_tokens


def check_choice(name: str, value: Any, choices: Sequence[Choice]) -> Choice:
    """Return the value of an option; raise ParameterError unless it is one of the choices."""
    if value not in choices:
        raise ParameterError(
            f"{argument(name)} is {shown(value)}, expected {' or '.join(map(repr, choices))}"
        )
    return value


def read_names(model: Model, names: Names) -> dict[str, str]:
    """Return the names that match one or several patterns, see `gptx.hooks.find_names`."""
    given: Any = [names] if isinstance(names, str) else names
    if not isinstance(given, Iterable):
        raise ParameterError(
            f"{argument('names')} is {shown(given)}, expected a name or a list of names"
        )
    found = find_names(model.gpt2, given)
    if not found:
        raise ParameterError(f"no {argument('names')} were given: give at least one")
    return found


class Axes(NamedTuple):
    """The axes of an activation, with that of the sequences.

    Attributes
    ----------
    token
        Axis of the tokens.
    head
        Axis of the heads; None without one.
    merged
        True if the last axis has the heads side by side.
    """

    token: int
    head: int | None
    merged: bool


def axes_of(name: str, own: str) -> Axes:
    """Return the axes of a name of `find_names`; `own` is the same name as in `gptx.hooks`."""
    kind = own.rpartition(".attn.")[2]
    if kind in ("scores", "pattern", "keys", "values"):
        return Axes(2, 1, False)
    if kind in ("q", "k", "v"):
        return Axes(2, 1, False) if name == own else Axes(1, 2, False)
    if kind == "z":
        return Axes(1, None, True) if name == own else Axes(1, 2, False)
    return Axes(1, None, False)


def mask_of(
    shape: tuple[int, ...],
    axes: Axes,
    n_head: int,
    tokens: np.ndarray | None = None,
    heads: Sequence[int] | None = None,
) -> np.ndarray:
    """Return the part of an activation that tokens and heads select: booleans for its shape.

    Parameters
    ----------
    shape
        Shape of the activation; the mask has 1 in the place of axes that it does not depend on.
    tokens
        Booleans [B, T]; None for all.
    heads
        Numbers of heads; None for all.

    Raises
    ------
    ParameterError
        Heads are given for an activation without heads, or do not exist.
    """
    mask = np.ones([1] * len(shape), bool)
    if tokens is not None:
        one = [1] * len(shape)
        one[0], one[axes.token] = tokens.shape
        mask = mask & tokens.reshape(one)
    if heads is not None:
        one = [1] * len(shape)
        chosen = np.isin(np.arange(n_head), heads)
        if axes.merged:
            one[-1] = shape[-1]
            mask = mask & np.repeat(chosen, shape[-1] // n_head).reshape(one)
        else:
            assert axes.head is not None
            one[axes.head] = n_head
            mask = mask & chosen.reshape(one)
    return mask


def check_numbers(name: str, values: Any, stop: int) -> list[int]:
    """Return the numbers of layers or heads as a list; each is below `stop`.

    Raises
    ------
    ParameterError
        They are no list of such numbers.
    """
    if not isinstance(values, Iterable) or not all(is_int(x) and 0 <= x < stop for x in values):
        raise ParameterError(
            f"{argument(name)} is {shown(values)}, expected a list of numbers from 0 to {stop - 1}"
        )
    return [int(x) for x in values]


def as_floats(name: str, values: Any) -> np.ndarray:
    """Return an array of finite numbers in float64.

    Raises
    ------
    ParameterError
        The values are no numbers.
    NonFiniteError
        A number is a NaN or an infinity.
    """
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ParameterError(
            f"{argument(name)} is {shown(values)}, expected an array of numbers"
        ) from None
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{argument(name)} has a NaN or an infinity, expected finite numbers")
    return array


def check_heads(names: dict[str, str]) -> None:
    """Check that activations have heads.

    Raises
    ------
    ParameterError
        One has none.
    """
    for name, own in names.items():
        axes = axes_of(name, own)
        if axes.head is None and not axes.merged:
            raise ParameterError(
                f"{name} has no heads: omit {argument('heads')}, or give attn.z, q, k, v or pattern"
            )
