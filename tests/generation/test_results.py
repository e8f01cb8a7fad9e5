"""Results in a notebook: `repr`, `str` and format of results, models and caches; closed models."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest

import gptx
from gptx.backends import get_backend
from gptx.errors import ParameterError
from gptx.generation.results import MAX_REPR_CHARACTERS, Chunk, Result, Score
from gptx.kv_cache import KVCache
from gptx.quantization import Quantization
from tests.support.cli import raises_error
from tests.support.models import make_model
from tests.support.random_models import CASES

RESULT = Result(
    prompt="ROMEO:", text="\nO, me!", tokens=[3, 4, 5], logprobs=None, finish_reason="length",
    seed=7, prompt_tokens=2, prompt_tps=100.0, generation_tps=1234.56, time_to_first_token=0.0125,
    peak_memory=10**9,
)  # fmt: skip
QUIET = get_backend("numpy", compile=False)


def test_a_result_shows_its_text_and_its_numbers() -> None:
    assert repr(RESULT) == (
        "<gptx.Result '\\nO, me!': 3 tokens at 1,234.6 t/s, length, after 2 prompt tokens in "
        "0.013 s, seed 7>"
    )
    assert "[3, 4, 5]" in repr(replace(RESULT, text=None))


def test_a_long_text_is_shortened_in_the_middle() -> None:
    text = "a" * 200 + "b" * 200
    shown = repr(replace(RESULT, text=text)).partition(": ")[0].removeprefix("<gptx.Result ")
    assert len(shown) <= MAX_REPR_CHARACTERS
    assert shown.startswith("'aaa")
    assert shown.endswith("bbb'")
    assert " … " in shown
    fits = "a" * (MAX_REPR_CHARACTERS - 2)
    assert repr(fits) in repr(replace(RESULT, text=fits))


def test_a_result_is_its_text_in_a_string() -> None:
    assert str(RESULT) == f"{RESULT}" == RESULT.text
    assert f"{RESULT:>10}" == "   \nO, me!"
    chunk = Chunk("O", 3, None)
    assert f"{chunk}|{chunk:>3}" == "O|  O"
    assert str(replace(RESULT, text=None)) == ""


def test_a_score_shows_its_loss() -> None:
    score = Score([1, 2, 3], [None, -1.0, -2.0])
    assert repr(score) == "<gptx.Score of 2 tokens: loss 1.5000 nats per token, perplexity 4.482>"


def test_a_model_shows_its_size_and_its_backend() -> None:
    config = CASES["124M"]
    model = make_model(config, QUIET)
    assert model.n_bytes == 4 * config.n_parameters
    assert repr(model) == (
        f"<gptx.Model random: {config.n_parameters / 1e6:.1f}M parameters in "
        f"{model.n_bytes / 1e6:.1f} MB, context 64, numpy float32>"
    )
    small = make_model(config, get_backend("numpy"), quantization=Quantization(32, 4))
    assert "parameters as int4 in groups of 32 in " in repr(small)


@pytest.mark.parametrize(
    ("n_sequences", "sequences"),
    [(1, "1 sequence: 3"), (2, "2 sequences: 3, 3"), (9, "9 sequences: 3, 3, 3, 3, 3, 3, 3, 3, …")],
)
def test_a_cache_shows_its_lengths_and_its_size(n_sequences: int, sequences: str) -> None:
    config = CASES["tiny"]  # one layer of width 8
    for dtype, n_bytes in [("float16", 2), ("float32", 4)]:
        backend = get_backend("numpy", compile=False, cache_dtype=dtype)
        cache = KVCache(config, backend, n_sequences, 10)
        cache.extend([3] * n_sequences)
        assert cache.n_bytes == n_sequences * 2 * 10 * 8 * n_bytes
        assert repr(cache) == (
            f"<gptx.KVCache of {sequences} of 10 tokens, numpy {dtype}, "
            f"{cache.n_bytes / 1e6:.2f} MB>"
        )


def test_a_closed_model_does_not_compute() -> None:
    with gptx.load("shakespeare", backend=QUIET) as model:
        assert model.generate("O", max_tokens=1).tokens
    calls: list[Any] = [
        lambda: model.generate("O"), lambda: model.stream("O"), lambda: model.score("O, me"),
        lambda: model.prefill("O"), lambda: model.logits([1]), lambda: model.n_bytes,
        lambda: model.__enter__(),
    ]  # fmt: skip
    for call in calls:
        with raises_error(ParameterError, "the model shakespeare is closed: load it again"):
            call()
    assert repr(model) == "<gptx.Model shakespeare, closed>"
    assert model.decode(model.encode("To be")) == "To be"
    assert model.config.n_layer == 6
    model.close()  # a second time


def test_a_with_statement_releases_the_weights() -> None:
    gc.disable()  # the collector of cycles must not be needed
    try:
        with make_model(CASES["tiny"], QUIET) as model:
            weights = weakref.ref(model.gpt2)
            model.generate([1, 2], max_tokens=2)
            assert weights() is not None
        assert weights() is None
    finally:
        gc.enable()


def test_the_weights_are_no_part_of_the_repr_of_a_transformer() -> None:
    assert len(repr(make_model(CASES["tiny"], QUIET).gpt2)) < 1000


def test_an_error_in_a_with_statement_is_raised() -> None:
    with pytest.raises(KeyError), make_model(CASES["tiny"], QUIET) as model:
        raise KeyError
    with raises_error(ParameterError, "closed"):
        model.logits([1])
