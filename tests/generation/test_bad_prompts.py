"""Errors of prompts that are missing, empty, too long, invalid text or invalid token ids."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.backends import get_backend
from gptx.errors import PromptError
from gptx.generation.text_model import Model
from tests.support.cli import assert_generate_fails, raises_error, run, short_id, start
from tests.support.models import make_model
from tests.support.random_models import CASES, random_ids


@pytest.fixture(scope="module")
def shakespeare() -> Model:
    """The embedded model, not compiled."""
    return gptx.load("shakespeare", compile=False)


def test_a_missing_prompt() -> None:
    assert_generate_fails(code=2, message="missing prompt")


@pytest.mark.parametrize("prompt", ["", [], [""], ["O", ""], [[]], [[1], []], np.array([], int)])
def test_an_empty_prompt(shakespeare: Model, prompt: Any) -> None:
    with raises_error(PromptError, "give at least one"):
        shakespeare.generate(prompt)


@pytest.mark.parametrize(("prompt", "stdin"), [("", b""), ("-", b""), ("-", b"\n")])
def test_an_empty_prompt_of_the_command(prompt: str, stdin: bytes) -> None:
    assert_generate_fails(prompt, stdin=stdin, code=65, message="the prompt is empty")


LENGTH = 100_000  # characters; quadratic encoding would take an hour


def long_prompt(kind: str) -> str:
    if kind == "one letter":
        return "a" * LENGTH
    words = ["the", "king", "of", "love's", "banished", "O!", "\n", "\t42", "é", "—"]
    picked = np.random.default_rng(0).integers(0, len(words), LENGTH)
    return " ".join(words[i] for i in picked)[:LENGTH]


@pytest.mark.parametrize("kind", ["one letter", "varied"])
def test_a_long_prompt(shakespeare: Model, kind: str) -> None:
    prompt = long_prompt(kind)
    n = len(shakespeare.encode(prompt))
    assert n > LENGTH / 10
    with raises_error(PromptError, f"{n} tokens", "context holds 256", "overflow="):
        shakespeare.generate(prompt)


def test_a_long_prompt_on_standard_input() -> None:
    message = f"{LENGTH} tokens, the context holds 256"
    assert_generate_fails("-", stdin=b"a" * LENGTH, code=65, message=message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfa", "byte 0xff at position 0"),
        (b"good \xe2\x82", "byte 0xe2 at position 5"),
        (b"\xed\xa0\x80", "byte 0xed at position 0"),  # a surrogate, which UTF-8 does not allow
        (b"caf\xe9\n", "byte 0xe9 at position 3"),
    ],
)
def test_standard_input_that_is_not_utf8(data: bytes, message: str) -> None:
    assert_generate_fails(
        "-", stdin=data, code=65, message=f"standard input has {message}, expected text in UTF-8"
    )


def test_a_lone_surrogate(shakespeare: Model) -> None:
    for call in (shakespeare.generate, shakespeare.encode, shakespeare.score, shakespeare.prefill):
        with raises_error(PromptError, r"lone surrogate '\ud800' at character 1"):
            call("a\ud800b")


@pytest.mark.skipif(sys.platform != "linux", reason="arguments are bytes on Linux only")
def test_an_argument_that_is_not_utf8() -> None:
    args = ("generate", "-m", "shakespeare", b"a\xffb")
    with start(*args, PYTHONUTF8="1") as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (65, b"")
    assert err.count(b"\n") == 1
    assert rb"lone surrogate '\udcff' at character 1" in err


@pytest.fixture(scope="module")
def wide() -> Model:
    """A tiny model with GPT-2's context of 1024 tokens."""
    config = replace(CASES["tiny"], n_positions=1024)
    return make_model(config, get_backend("numpy", compile=False))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """Token ids, one more than the context of `wide`."""
    found: list[int] = random_ids(CASES["tiny"], 1, 1025)[0].tolist()
    return found


def test_more_tokens_than_the_context(wide: Model, ids: list[int]) -> None:
    with raises_error(PromptError, "1025 tokens", "1024"):
        wide.generate(ids, max_tokens=1)
    for call in (wide.logits, wide.prefill):
        with raises_error(PromptError, "1025 tokens", "1024"):
            call(ids)


def test_output_that_exceeds_the_context(wide: Model, ids: list[int]) -> None:
    with raises_error(PromptError, "1 prompt token and 1100 new tokens", "context of 1024"):
        wide.generate(ids[:1], max_tokens=1100)
    with raises_error(PromptError, "1024 prompt tokens and 2 new tokens", "context of 1024"):
        wide.generate(ids[:1024], max_tokens=2)


def test_a_full_context_gives_one_token(wide: Model, ids: list[int]) -> None:
    expected = wide.logits(ids[:1024])[-1].argmax()
    assert wide.generate(ids[:1024], max_tokens=1).tokens == [expected]


@pytest.mark.parametrize("overflow", ["truncate", "slide"])
def test_overflow_keeps_the_newest_tokens(wide: Model, ids: list[int], overflow: Any) -> None:
    result = wide.generate(ids, max_tokens=1, overflow=overflow)
    assert result.prompt_tokens == 1024
    assert result.tokens == wide.generate(ids[1:], max_tokens=1).tokens


@pytest.mark.parametrize("overflow", ["truncate", "slide"])
def test_overflow_of_the_command(shakespeare: Model, overflow: str) -> None:
    prompt = "x" * 257
    assert len(shakespeare.encode(prompt)) == 257
    assert_generate_fails(prompt, "-n", "1", code=65, message="257 tokens, the context holds 256")
    done = run("generate", "-m", "shakespeare", "-n1", "--json", "--overflow", overflow, prompt)
    assert done.code == 0
    assert json.loads(done.out)["prompt_tokens"] == 256


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([-1], "token id is -1, expected 0 to 1023"),
        ([5, 1024], "token id is 1024, expected 0 to 1023"),
        (np.array([5, 1024]), "token id is 1024, expected 0 to 1023"),
        ([[5], [1024]], "token id is 1024, expected 0 to 1023"),
        ([2**31], "token id is 2147483648"),
        ([2**64], "18446744073709551616"),
        ([1, 2.5], "2.5"),
        (np.array([1.5]), "1.5"),
        ([True], "True"),
        ([1, "a"], "'a'"),
        ([1, None], "None"),
        ([[[1]]], "[[1]]"),
        (np.array([[1, 2], [3, 4]]), "one list of whole numbers"),
        (b"abc", "b'abc'"),
        ([1.5], "1.5"),
        ([[1], 2.5], "2.5"),
        ([1, [2]], "[2]"),
        ([[1, [2]]], "[2]"),
        (None, "None"),
        (5, "5"),
        (np.array(5), "5"),
        ([None], "None"),
        ({"a": 1}, "{'a': 1}"),
        ({1, 2}, "{1, 2}"),
    ],
    ids=short_id,
)
def test_an_invalid_prompt(shakespeare: Model, prompt: Any, message: str) -> None:
    with raises_error(PromptError, message):
        shakespeare.generate(prompt, max_tokens=1)
