"""Errors of invalid parameters, in Python and on the command line."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.errors import ParameterError
from gptx.generation.params import SamplingParams
from gptx.generation.text_model import Model
from tests.support.cli import assert_generate_fails, raises_error, run, short_id

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def shakespeare() -> Model:
    """The embedded model, not compiled."""
    return gptx.load("shakespeare", compile=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": NAN}, "temperature is nan"),
        ({"temperature": INF}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": np.ones((2, 2))}, "temperature is array([[1., 1.], [1., 1.]]), expected"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": NAN}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"min_p": NAN}, "min_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": True}, "top_k is True"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": -1.5}, "repetition_penalty is -1.5"),
        ({"repetition_penalty": NAN}, "repetition_penalty is nan"),
        ({"repetition_penalty": 1e300}, "repetition_penalty is 1e+300"),
        ({"presence_penalty": INF}, "presence_penalty is inf"),
        ({"presence_penalty": 1e300}, "presence_penalty is 1e+300"),
        ({"frequency_penalty": -1e300}, "frequency_penalty is -1e+300"),
        ({"frequency_penalty": "no"}, "frequency_penalty is 'no'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"seed": True}, "seed is True"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 1.0}, "max_tokens is 1.0"),
        ({"max_tokens": "5"}, "max_tokens is '5'"),
        ({"max_tokens": None, "overflow": "slide"}, "max_tokens is None"),
        ({"overflow": "wrap"}, "overflow is 'wrap', expected one of error, truncate, slide"),
        ({"overflow": None}, "overflow is None"),
        ({"stop": ""}, "stop has ''"),
        ({"stop": ["a", ""]}, "stop has ''"),
        ({"stop": [1]}, "stop has 1"),
        ({"stop": b"x"}, "stop is b'x', expected a string or a list of strings"),
        ({"stop": bytearray(b"x")}, "expected a string or a list of strings"),
        ({"stop": 5}, "5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"batch_size": None}, "batch_size is None"),
        ({"logit_bias": {1024: 1.0}}, "token 1024, expected 0 to 1023"),
        ({"logit_bias": {-1: 1.0}}, "token -1, expected 0 to 1023"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias has 'a': 1.0"),
        ({"logit_bias": {1: None}}, "logit_bias has 1: None"),
        ({"logit_bias": {1: NAN}}, "logit_bias of token 1 is nan"),
        ({"logit_bias": {1: INF}}, "logit_bias of token 1 is inf"),
        ({"logit_bias": {1: 1e300}}, "logit_bias of token 1 is 1e+300"),
        ({"logit_bias": [1]}, "[1]"),
        ({"logit_bias": 5}, "5"),
        ({"cache": 5}, "cache is 5, expected the result of Model.prefill"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no', expected True or False"),
        ({"logprobs": -1}, "logprobs is -1, expected True, False, or the number of most"),
        ({"logprobs": "5"}, "logprobs is '5', expected True, False, or the number of most"),
        ({"allow_special": None}, "allow_special is None, expected True or False"),
        ({"tempurature": 1}, "unknown option tempurature"),
        ({"model": "gpt2"}, "unknown option model"),
    ],
    ids=short_id,
)
def test_parameters_out_of_range(shakespeare: Model, options: Any, message: str) -> None:
    with raises_error(ParameterError, message):
        shakespeare.generate("O", **({"max_tokens": 1} | options))
    with raises_error(ParameterError, message):
        list(shakespeare.stream("O", **({"max_tokens": 1} | options)))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("temperature", 0, 1e6),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("repetition_penalty", 1e-6, 1e6),
        ("presence_penalty", -1e6, 1e6),
        ("frequency_penalty", -1e6, 1e6),
    ],
)
def test_the_limits_of_a_parameter(name: str, low: float, high: float) -> None:
    for value in (low, high):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (math.nextafter(low, -INF), math.nextafter(high, INF)):
        with raises_error(ParameterError, f"{name} is {value}, expected a number from {low:g}"):
            SamplingParams(**{name: value})


def test_the_limits_of_whole_numbers_and_biases() -> None:
    for options in ({"seed": 0}, {"seed": 2**64 - 1}, {"top_k": 0}, {"top_k": 1}):
        assert SamplingParams(**options)
    for bias in (1e6, -1e6, -INF):
        assert SamplingParams(logit_bias={0: bias}).logit_bias == {0: bias}
    for bias in (math.nextafter(1e6, INF), math.nextafter(-1e6, -INF), INF):
        with raises_error(ParameterError, "logit_bias of token 0 is"):
            SamplingParams(logit_bias={0: bias})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generic": "no"}, "generic is 'no', expected True or False"),
        ({"compile": 1}, "compile is 1, expected True or False"),
        ({"offline": None}, "offline is None, expected True or False"),
        ({"ignore_unknown": "yes"}, "ignore_unknown is 'yes', expected True or False"),
        ({"revision": 5}, "revision is 5, expected a string"),
        ({"token": True}, "token is True, expected a string"),
    ],
    ids=short_id,
)
def test_load_options_of_another_type(options: Any, message: str) -> None:
    with raises_error(ParameterError, message):
        gptx.load("./no-such-folder", **options)


def test_options_of_score_and_prefill(shakespeare: Model) -> None:
    options: Any = {"allow_special": 1}
    for call in (shakespeare.score, shakespeare.prefill, shakespeare.encode):
        with raises_error(ParameterError, "allow_special is 1, expected True or False"):
            call("To be", **options)


def test_a_long_value_is_shortened_to_one_line(shakespeare: Model) -> None:
    options: Any = {"cache": np.zeros((50, 50))}
    with pytest.raises(
        ParameterError, match=r"^cache is array\(\[\[0., 0., .{1,45}, expected"
    ) as caught:
        shakespeare.generate("O", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "--temperature is -1.0"),
        ("--temperature", "nan", "temperature is nan"),
        ("--temperature", "inf", "temperature is inf"),
        ("--temperature", "hot", "'hot' is not a valid float"),
        ("--top-p", "1.5", "--top-p is 1.5"),
        ("--top-p", "nan", "--top-p is nan"),
        ("--min-p", "-0.5", "--min-p is -0.5"),
        ("--top-k", "-1", "--top-k is -1"),
        ("--top-k", "1.5", "'1.5' is not a valid integer"),
        ("--repetition-penalty", "0", "--repetition-penalty is 0.0"),
        ("--seed", "-1", "seed is -1"),
        ("--seed", str(2**64), "seed is 18446744073709551616"),
        ("--seed", "1.5", "'1.5' is not a valid integer"),
        ("--max-tokens", "0", "-n/--max-tokens is 0"),
        ("--max-tokens", "-5", "-n/--max-tokens is -5"),
        ("--max-tokens", "many", "'many' is not a valid integer"),
        ("--overflow", "wrap", "'wrap' is not one of 'error', 'truncate', 'slide'"),
        ("--stop", "", "stop has ''"),
        ("--backend", "jax", "'jax' is not one of 'numpy', 'cupy', 'mlx'"),
        ("--dtype", "float16", "dtype is 'float16', the numpy backend computes in float32"),
        ("--dtype", "int8", "'int8' is not one of 'float32'"),
        ("--threads", "0", "threads is 0"),
        ("--threads", "-1", "threads is -1"),
        ("--threads", "two", "'two' is not a valid integer"),
        ("--revision", "main", "revision is 'main', but 'shakespeare' is not from the Hub"),
        ("--nonsense", "1", "--nonsense"),
    ],
)
def test_options_out_of_range(option: str, value: str, message: str) -> None:
    assert_generate_fails(option, value, "O", code=2, message=message)


def test_parameters_are_checked_before_the_model_is_loaded() -> None:
    done = run("generate", "-m", "./no-such-folder", "--top-p", "2", "O")
    assert done.code == 2
    assert "--top-p is 2.0" in done.err


@pytest.mark.parametrize("top_k", [1025, 10**6, 10**30])
def test_top_k_above_the_vocabulary_is_clamped(shakespeare: Model, top_k: int) -> None:
    options: Any = {"temperature": 1.0, "seed": 3, "max_tokens": 20}
    expected = shakespeare.generate("O", top_k=1024, **options).tokens
    assert shakespeare.generate("O", top_k=top_k, **options).tokens == expected


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40, 1e-300])
def test_a_temperature_close_to_zero_is_greedy(shakespeare: Model, temperature: float) -> None:
    best = shakespeare.generate("ROMEO:", max_tokens=8).tokens
    result = shakespeare.generate("ROMEO:", max_tokens=8, temperature=temperature, seed=1)
    assert result.tokens == best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_that_bans_every_token(shakespeare: Model, temperature: float) -> None:
    with raises_error(ParameterError, "logit_bias"):
        bias = dict.fromkeys(range(1024), -INF)
        shakespeare.generate("O", logit_bias=bias, temperature=temperature)
