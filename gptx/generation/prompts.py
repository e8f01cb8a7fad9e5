"""Prompts: text or token ids, one or several; checks that need no model.

What other libraries take as a prompt, such as chat messages, is an error that says what to give.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from gptx.errors import PromptError, argument, shown
from gptx.generation.checks import is_int

Prompt = str | Sequence[int]

EXPECTED = "a text or a list of token ids"


def split_prompts(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """Return the prompts as a list, and True if they are a single one.

    Raises
    ------
    PromptError
        A prompt is neither text nor a sequence or an array.
    """
    if _is_single(prompt):
        return [cast("Prompt", _checked(prompt))], True
    _checked(prompt, f"{EXPECTED}, or a list of those")
    return [cast("Prompt", _checked(one)) for one in prompt], False


def single_prompt(prompt: Prompt, call: str) -> Prompt:
    """Return a prompt unchanged if it is one only, for a method that takes one.

    Raises
    ------
    PromptError
        There are several, or the prompt is neither text nor a sequence or an array.
    """
    checked = _checked(prompt)
    if isinstance(checked, Sequence) and checked and not _is_single(checked):
        _checked(checked[0])
        raise PromptError(
            f"the prompt is a list of prompts ({len(checked)}), {call} takes one: "
            "call it for each of them"
        )
    return cast("Prompt", checked)


def check_not_empty(prompts: list[Prompt]) -> None:
    """Raise PromptError if there is no prompt, or one is the empty text."""
    if not prompts:
        raise PromptError("missing prompt: give at least one")
    if any(isinstance(prompt, str) and not prompt for prompt in prompts):
        raise PromptError(
            "the prompt is empty: give at least one character (to start a new text, "
            f"'<|endoftext|>' with {argument('allow_special', True)})"
        )


def check_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Return token ids as a list of ints: at least one, each in the vocabulary.

    Raises
    ------
    PromptError
        There is no id, one is not an integer, or one is outside the vocabulary.
    """
    checked = list_of_ids(ids)
    if not checked:
        raise PromptError("the prompt is empty: give at least one token")
    if unknown := [id for id in checked if not 0 <= id < vocab_size]:
        raise PromptError(f"token id is {unknown[0]}, expected 0 to {vocab_size - 1}")
    return checked


def list_of_ids(ids: Sequence[int]) -> list[int]:
    """Return a sequence or an array of whole numbers as a list of ints.

    Raises
    ------
    PromptError
        It is something else.
    """
    values: Any = ids
    if _is_array(ids):
        values = values.tolist()
    if (
        isinstance(values, str | bytes | bytearray | memoryview)
        or not isinstance(values, Sequence)
        or not all(map(is_int, values))
    ):
        raise PromptError(f"token ids are {shown(ids)}, expected one list of whole numbers")
    return [int(id) for id in values]


def _is_single(prompt: Any) -> bool:
    """Return True for a text, or one list or array of token ids."""
    if isinstance(prompt, str) or _is_array(prompt):
        return True
    # A float or a bool is no id: `check_ids` has the error.
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and isinstance(prompt[0], int | float | np.number | np.bool_)
    )


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, np.generic)


def _checked(prompt: Any, expected: str = EXPECTED) -> Any:
    """Return a prompt of a supported type; an array must have one dimension of integers."""
    kind = type(prompt).__name__
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise PromptError(
            f"the prompt is {repr(prompt)[:40]} ({kind}), expected {expected}: "
            "decode it, as in str(prompt, 'utf-8')"
        )
    if isinstance(prompt, os.PathLike):
        raise PromptError(
            f"the prompt is {prompt!r}, a path, expected {expected}: "
            "give the text of the file, as in path.read_text('utf-8')"
        )
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        raise PromptError(
            f"the prompt is the {kind} of a tokenizer, expected {expected}: give its 'input_ids'"
        )
    if isinstance(prompt, Mapping) and ("role" in prompt or "content" in prompt):
        raise PromptError(
            f"the prompt is a chat message, expected {expected}: GPT-2 has no chat format, "
            "give one text"
        )
    if isinstance(prompt, Sequence):
        return prompt
    given = shown(prompt)
    if _is_array(prompt) and len(prompt.shape) != 1:
        raise PromptError(
            f"the prompt is {given}, an array of shape {tuple(prompt.shape)}, expected one list of "
            "whole numbers: give array.tolist() for several prompts"
        )
    if _is_array(prompt):
        return prompt
    if isinstance(prompt, Iterator):
        raise PromptError(f"the prompt is {given}, expected {expected}: give list(prompts)")
    raise PromptError(f"the prompt is {given}, expected {expected}")
