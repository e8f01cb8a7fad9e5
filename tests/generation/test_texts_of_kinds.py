"""Texts of continuations, for tokenizers of every kind: spaces, pieces, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from gptx.backends import get_backend
from gptx.generation.params import SamplingParams
from gptx.generation.results import Result, Token
from gptx.generation.sequences import Sampling
from gptx.generation.sequences import Sequence as TokenSequence
from gptx.generation.streaming import Continuation
from gptx.generation.text_model import Model
from tests.support.golden_tokenizers import NAMES, load
from tests.support.models import make_model
from tests.support.random_models import CASES

SAMPLING = Sampling(SamplingParams(seed=7))
BACKEND: Any = SimpleNamespace(peak_memory=lambda: 1000)


def continued(
    name: str, prompt: str | list[int], words: str, stop: Sequence[str] = ()
) -> tuple[Result, list[str]]:
    """Return the result and the pieces of a continuation by the tokens of a text."""
    tokenizer = load(name)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    sequence = TokenSequence(ids, SAMPLING, 100)
    output = Continuation(0, prompt, sequence, tokenizer, list(stop), BACKEND)
    tokens = tokenizer.encode(words)
    pieces = []
    for i, id in enumerate(tokens, start=1):
        chunk = output.add(Token(0, id, None, "length" if i == len(tokens) else None))
        pieces.append(chunk.text)
        if chunk.result is not None:
            break
    assert chunk.result is not None
    assert "".join(pieces) == chunk.result.text
    return chunk.result, pieces


@pytest.mark.parametrize(
    ("name", "prompt", "words", "text"),
    [
        ("wordpiece", "we know", "the theory", " the theory"),
        ("wordpiece", "we know ", "the theory", "the theory"),
        ("wordpiece", "we know\n", "the theory", "the theory"),
        ("wordpiece", "we know  ", ", the theory", ", the theory"),
        ("word_list", "we know ", "the theory", "the theory"),
        ("wordlevel", "low", "the then", " the then"),
        ("wordlevel", "low\t", "the then", "the then"),
        ("word_ends", "we know ", "the theory", "the theory"),
        # These tokenizers have a token for a space at the end.
        ("metaspace", "we know", "the theory", " the theory"),
        ("metaspace", "we know ", "the theory", " the theory"),
        ("byte_fallback", "we know ", "the theory", " the theory"),
        ("lower", "we know", " the theory", " the theory"),
        ("lower", "we know ", " the theory", " the theory"),
    ],
)
def test_the_space_after_a_prompt(name: str, prompt: str, words: str, text: str) -> None:
    assert continued(name, prompt, words)[0].text == text


def test_a_prompt_of_ids_has_no_text_of_its_own() -> None:
    ids = load("wordpiece").encode("we know ")
    assert continued("wordpiece", ids, "the theory")[0].text == " the theory"


def test_only_the_first_space_is_left_out() -> None:
    result, pieces = continued("wordpiece", "we ", "the the the")
    assert (result.text, pieces) == ("the the the", ["the", " the", " the"])


@pytest.mark.parametrize("name", ["wordpiece", "wordlevel", "metaspace", "byte_fallback"])
def test_stop_strings_across_words(name: str) -> None:
    result, pieces = continued(name, "low", "the then low there then", ["then lo"])
    assert (result.text, result.finish_reason) == (" the ", "stop")
    assert len(result.tokens) < len(load(name).encode("the then low there then"))
    assert "".join(pieces) == " the "


def test_a_stop_string_that_a_byte_completes_at_the_end() -> None:
    result, pieces = continued("byte_fallback", "low", "the 🙂", ["🙂"])
    assert (result.text, result.finish_reason) == (" the ", "stop")
    assert pieces[0] == " the"


@pytest.mark.parametrize(("seconds", "rate"), [(0.5, 2.0), (0.0, 0.0)])
def test_the_rate_of_a_prefill_without_measured_time(seconds: float, rate: float) -> None:
    sequence = TokenSequence([5], SAMPLING, 100, prefill_seconds=seconds)
    output = Continuation(0, [5], sequence, None, [], BACKEND)
    result = output.add(Token(0, 7, None, "length")).result
    assert result is not None
    assert (result.prompt_tps, result.time_to_first_token) == (rate, seconds)


def model_with(name: str) -> Model:
    tokenizer = load(name)
    model = make_model(replace(CASES["124M"], vocab_size=512), get_backend("numpy", compile=False))
    model.info._tokenizer = tokenizer
    return model


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_text_are_the_text_of_all_tokens(name: str) -> None:
    model, tokenizer = model_with(name), load(name)
    prompt = tokenizer.encode("we know the")
    result = model.generate(prompt, max_tokens=20, seed=3, ignore_eos=True)
    assert result.text is not None
    assert tokenizer.decode(prompt) + result.text == tokenizer.decode(prompt + result.tokens)
    chunks = model.stream(prompt, max_tokens=20, seed=3, ignore_eos=True)
    assert "".join(chunk.text for chunk in chunks) == result.text
