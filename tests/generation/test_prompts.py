"""Kinds of prompts: what generate, stream, score, prefill, encode and decode take and refuse."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.errors import PromptError
from gptx.generation.prompts import check_ids, list_of_ids, single_prompt, split_prompts
from gptx.generation.text_model import Model
from tests.support.cli import raises_error, short_id


@pytest.mark.parametrize(
    ("prompt", "prompts", "single"),
    [
        ("O", ["O"], True),
        ([1, 2], [[1, 2]], True),
        ((1, 2), [(1, 2)], True),
        (range(3), [range(3)], True),
        ([np.int64(1)], [[np.int64(1)]], True),
        (["O"], ["O"], False),
        (("O", [1]), ["O", [1]], False),
        ([[1], [2, 3]], [[1], [2, 3]], False),
        ([], [], False),
    ],
    ids=short_id,
)
def test_one_prompt_or_several(prompt: Any, prompts: list[Any], single: bool) -> None:
    assert split_prompts(prompt) == (prompts, single)
    if single:
        assert single_prompt(prompt, "stream") is prompt


def test_arrays_are_token_ids(shakespeare: Model) -> None:
    mx = pytest.importorskip("mlx.core")
    expected = shakespeare.generate([60, 61], max_tokens=2).tokens
    for array in (np.array([60, 61]), np.array([60, 61], np.uint8), mx.array([60, 61])):
        assert shakespeare.generate(array, max_tokens=2).tokens == expected
        assert [r.tokens for r in shakespeare.generate([array], max_tokens=2)] == [expected]
        assert list(shakespeare.stream(array, max_tokens=2))[-1].token == expected[-1]
        assert shakespeare.decode(array) == shakespeare.decode([60, 61])
        assert shakespeare.score(array).tokens == [60, 61]
    assert shakespeare.decode([]) == ""


KINDS: list[tuple[Any, list[str]]] = [
    (b"abc", ["b'abc' (bytes)", "decode it"]),
    (bytearray(b"abc"), ["(bytearray)", "decode it"]),
    (memoryview(b"abc"), ["(memoryview)", "decode it"]),
    (Path("prompt.txt"), ["prompt.txt", "a path", "read_text"]),
    ({"role": "user", "content": "Hi"}, ["chat message", "no chat format"]),
    ({"content": "Hi"}, ["chat message"]),
    ({"input_ids": [1]}, ["the dict of a tokenizer", "'input_ids'"]),
    (UserDict(input_ids=[1]), ["the UserDict of a tokenizer", "'input_ids'"]),
    ({"a": 1}, ["{'a': 1}"]),
    (iter(["O"]), ["list(prompts)"]),
    (None, ["None"]),
    (5, ["the prompt is 5"]),
    (np.zeros((2, 3), int), ["shape (2, 3)", "tolist()"]),
    (np.array(5), ["shape ()"]),
]


@pytest.mark.parametrize(("prompt", "parts"), KINDS, ids=short_id)
def test_a_kind_of_prompt_that_is_refused(
    shakespeare: Model, prompt: Any, parts: list[str]
) -> None:
    for call in (shakespeare.generate, shakespeare.stream, shakespeare.score, shakespeare.prefill):
        with raises_error(PromptError, "expected", *parts):
            call(prompt)


@pytest.mark.parametrize(("prompt", "parts"), KINDS[:-3], ids=short_id)
def test_a_kind_that_is_refused_in_a_list(
    shakespeare: Model, prompt: Any, parts: list[str]
) -> None:
    for call in (shakespeare.generate, shakespeare.stream, shakespeare.score, shakespeare.prefill):
        with raises_error(PromptError, "expected", *parts):
            call([prompt])


@pytest.mark.parametrize("prompts", [["O"], ["O", "P"], [[1], [2]], ([1],)], ids=short_id)
def test_a_call_for_one_prompt_takes_no_list_of_prompts(shakespeare: Model, prompts: Any) -> None:
    for name in ("stream", "prefill", "score_choices"):
        more = (["a"],) if name == "score_choices" else ()
        with raises_error(PromptError, f"({len(prompts)}), {name} takes one: call it for each"):
            getattr(shakespeare, name)(prompts, *more)


def test_chat_messages(shakespeare: Model) -> None:
    chat: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for call in (shakespeare.generate, shakespeare.stream, shakespeare.score):
        with raises_error(PromptError, "chat message", "give one text"):
            call(chat)


@pytest.mark.parametrize(
    "ids",
    [[True, 2], [1, False], [1, np.True_], [1, 2.0], [1, "2"], np.array([True]), np.array([1.0]),
     b"ab", bytearray(b"ab"), "12", {1, 2}, np.array([[1]]), 5],
    ids=short_id,
)  # fmt: skip
def test_what_is_no_list_of_ids(ids: Any) -> None:
    for call in (list_of_ids, lambda ids: check_ids(ids, 1024)):
        with raises_error(PromptError, "expected one list of whole numbers"):
            call(ids)


def test_the_limits_of_ids() -> None:
    assert check_ids([0, 9], 10) == [0, 9]
    for id in (-1, 10):
        with raises_error(PromptError, f"token id is {id}, expected 0 to 9"):
            check_ids([0, id, 11], 10)
    with raises_error(PromptError, "the prompt is empty"):
        check_ids([], 10)
    assert [type(id) for id in check_ids([np.int64(3)], 10)] == [int]
    assert list_of_ids([2**70, -5]) == [2**70, -5]


@pytest.mark.parametrize("text", [5, None, ["O"], b"O"])
def test_encode_takes_text_only(shakespeare: Model, text: Any) -> None:
    with raises_error(PromptError, "expected a string"):
        shakespeare.encode(text)
