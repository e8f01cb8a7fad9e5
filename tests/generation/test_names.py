"""Names of options: those of other libraries, misspelled ones, and those of another call."""

from __future__ import annotations

from typing import Any

import pytest

import gptx
from gptx.errors import ParameterError
from gptx.generation.names import ADVICE, NAMES_BY_ADVICE, OPTIONS, SYNONYMS, check_names
from gptx.generation.options import AllOptions, LoadOptions, Options
from gptx.generation.text_model import Model
from tests.support.cli import raises_error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_new_tokens", "unknown option max_new_tokens: did you mean max_tokens?"),
        ("temp", "did you mean temperature?"),
        ("top_tokens", "did you mean top_k?"),
        ("topK", "did you mean top_k?"),
        ("stop_sequences", "did you mean stop?"),
        ("temprature", "did you mean temperature?"),
        ("frequence_penalty", "did you mean frequency_penalty?"),
        ("do_sample", "a temperature above 0 samples"),
        ("num_return_sequences", "did you mean n?"),
        ("eos_token_id", "did you mean stop_token_ids?"),
        ("bad_words_ids", "did you mean ban?"),
        ("stream", "call stream(prompt)"),
        ("max_length", "the prompt not included"),
        ("min_new_tokens", "did you mean min_tokens?"),
        ("tfs_z", "the filters of tokens are top_k, top_p, min_p and typical_p"),
        ("length_penalty", "there is no beam search"),
        ("add_special_tokens", "a prompt gets no token that is not in it"),
        ("backend", "give backend to gptx.load"),
        ("torch_dtype", "give dtype to gptx.load"),
        ("nonsense", "expected temperature, top_k, top_p, min_p,"),
    ],
)
def test_an_unknown_option_of_generate_and_stream(
    shakespeare: Model, name: str, message: str
) -> None:
    options: Any = {name: 1}
    for call in (shakespeare.generate, shakespeare.stream):
        with raises_error(ParameterError, f"unknown option {name}: ", message):
            call("O", **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quantise", "did you mean quantize?"),
        ("load_in_8bit", "did you mean quantize?"),
        ("torch_dtype", "did you mean dtype?"),
        ("backnd", "did you mean backend?"),
        ("temperature", "give temperature to generate"),
        ("max_new_tokens", "give max_tokens to generate"),
        ("trust_remote_code", "runs no code of a model"),
        ("n_gpu_layers", "give backend='cupy' for an NVIDIA GPU"),
        ("block_size", "the context is that of the model"),
    ],
)
def test_an_unknown_option_of_load(name: str, message: str) -> None:
    options: Any = {name: 1}
    with raises_error(ParameterError, f"unknown option {name}: ", message):
        gptx.load("./no-such-folder", **options)


def test_generate_of_the_package_knows_the_options_of_both() -> None:
    for name, option in [("quantise", "quantize"), ("max_new_tokens", "max_tokens")]:
        options: Any = {name: 1}
        with raises_error(ParameterError, f"unknown option {name}: did you mean {option}?"):
            gptx.generate("O", model="./no-such-folder", **options)


def test_known_names_pass() -> None:
    check_names(AllOptions.__annotations__, AllOptions.__annotations__)


def test_the_tables_name_options_only() -> None:
    known = {*Options.__annotations__, *LoadOptions.__annotations__}
    assert set(SYNONYMS) <= known
    assert not {*OPTIONS, *ADVICE} & known
    assert not set(OPTIONS) & set(ADVICE)
    for names, table in [(SYNONYMS, OPTIONS), (NAMES_BY_ADVICE, ADVICE)]:
        assert len(table) == sum(len(others.split()) for others in names.values())
