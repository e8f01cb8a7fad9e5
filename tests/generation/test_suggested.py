"""The generation_config.json of a model: its options on request, and its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gptx
from gptx.errors import ConfigError, NotFoundError, ParameterError
from gptx.generation.suggested import TOP_K
from tests.support.cli import raises_error

PROMPT = [1, 2, 3]


@pytest.fixture
def load(folder: Callable[..., Path]) -> Callable[..., gptx.Model]:
    """A function that loads a small model with a generation_config.json of the given values."""
    path = folder("124M")

    def load(**values: Any) -> gptx.Model:
        (path / "generation_config.json").write_text(json.dumps(values))
        return gptx.load(path, compile=False)

    return load


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5, "typical_p": 0.5}, {}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": TOP_K}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
            {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
        ),
        (
            {"do_sample": True, "typical_p": 0.5},
            {"temperature": 1.0, "top_k": 50, "typical_p": 0.5},
        ),
        ({"repetition_penalty": 1.9}, {"repetition_penalty": 1.9}),
        ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
        ({"max_new_tokens": 7, "max_length": 3}, {"max_tokens": 7}),
        ({"bad_words_ids": [[1], [2, 3]], "suppress_tokens": [4]}, {"ban": [[1], [2, 3], [4]]}),
        ({"sequence_bias": [[[1, 2], 3.5], [[4], -2]]}, {"sequence_bias": {(1, 2): 3.5, (4,): -2}}),
        ({"min_new_tokens": 5, "num_beams": 1, "epsilon_cutoff": 0.0}, {"min_tokens": 5}),
        ({"num_return_sequences": 1, "top_k": None, "transformers_version": "5.24.0"}, {}),
    ],
)
def test_options_of_the_file(
    load: Callable[..., gptx.Model], values: dict[str, Any], options: Any
) -> None:
    model = load(**values)
    limits: Any = {} if "max_tokens" in options else {"max_tokens": 10}
    found = model.generate(PROMPT, generation_config=True, seed=3, **limits)
    assert found.tokens == model.generate(PROMPT, seed=3, **limits, **options).tokens
    if "max_tokens" in options:
        assert len(found.tokens) == 7


def test_an_option_of_the_call_has_precedence(load: Callable[..., gptx.Model]) -> None:
    model = load(do_sample=True, temperature=0.7, top_k=9)
    options: Any = {"seed": 3, "max_tokens": 10}
    found = model.generate(PROMPT, generation_config=True, temperature=1.9, **options)
    assert found.tokens == model.generate(PROMPT, temperature=1.9, top_k=9, **options).tokens


def test_the_file_is_used_on_request_only(load: Callable[..., gptx.Model]) -> None:
    model = load(do_sample=True, temperature=5.0)
    greedy = model.generate(PROMPT, max_tokens=10).tokens
    options: Any = {"seed": 3, "max_tokens": 10}
    assert model.generate(PROMPT, generation_config=False, **options).tokens == greedy
    assert model.generate(PROMPT, generation_config=True, **options).tokens != greedy


def test_a_number_of_continuations(load: Callable[..., gptx.Model]) -> None:
    model = load(do_sample=True, num_return_sequences=3)
    results: Any = model.generate(PROMPT, generation_config=True, max_tokens=4)
    assert len(results) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 4}, "has num_beams 4, which gptx does not support"),
        ({"penalty_alpha": 0.6}, "has penalty_alpha 0.6, which gptx does not support"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1, expected a number"),
        ({"no_repeat_ngram_size": "x"}, "no_repeat_ngram_size is 'x', expected a whole number"),
        ({"sequence_bias": {"a": 1}}, "has sequence_bias {'a': 1}, expected a list of"),
    ],
)
def test_a_file_with_an_invalid_value(
    load: Callable[..., gptx.Model], values: dict[str, Any], message: str
) -> None:
    model = load(**values)
    with raises_error(ConfigError, "generation_config.json", message):
        model.generate(PROMPT, generation_config=True)
    assert len(model.generate(PROMPT, max_tokens=2).tokens) == 2


def test_an_option_that_contradicts_the_file(load: Callable[..., gptx.Model]) -> None:
    model = load(min_new_tokens=20)
    with raises_error(ParameterError, "min_tokens is 20, max_tokens is 5"):
        model.generate(PROMPT, generation_config=True, max_tokens=5)


def test_a_file_that_is_no_object(load: Callable[..., gptx.Model]) -> None:
    model = load()
    path = model.files.config.with_name("generation_config.json")
    for content in ("[1]", "{", "\xff"):
        path.write_text(content, encoding="latin-1")
        with raises_error(ConfigError, str(path)):
            model.generate(PROMPT, generation_config=True)


def test_a_model_without_the_file(shakespeare: gptx.Model) -> None:
    with raises_error(
        NotFoundError,
        "generation_config.json is missing beside the config of shakespeare: leave out "
        "generation_config",
    ):
        shakespeare.generate("O", generation_config=True)


def test_the_option_is_a_bool(shakespeare: gptx.Model) -> None:
    options: Any = {"generation_config": "x"}
    with raises_error(ParameterError, "generation_config is 'x', expected True or False"):
        shakespeare.generate("O", **options)
