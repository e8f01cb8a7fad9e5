"""Class `Model` and the functions of the package: text in, text out."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import gptx
import gptx.cli.generate  # its defaults are no part of a request
from gptx.backends import get_backend
from gptx.errors import (
    DeviceOutOfMemory,
    Interrupted,
    NonFiniteError,
    ParameterError,
    PromptError,
    TokenizerError,
)
from gptx.generation.engine import TokenGenerator
from gptx.generation.options import check_options
from gptx.generation.text_model import Model
from gptx.random_weights import random_weights
from tests.support.cli import run
from tests.support.models import make_model
from tests.support.random_models import CASES
from tests.support.shared_files import shared

WARM: Any = {"temperature": 0.9, "top_p": 0.95, "seed": 4}


def test_generate_in_one_call() -> None:
    result = gptx.generate("ROMEO:", model="shakespeare", backend="numpy", max_tokens=12)
    assert result.tokens == gptx.load("shakespeare").generate("ROMEO:", max_tokens=12).tokens
    assert str(result) == result.text
    assert result.finish_reason == "length"


def test_stream_in_one_call() -> None:
    chunks = list(gptx.stream("ROMEO:", model="shakespeare", max_tokens=12))
    assert len(chunks) == 12
    result = chunks[-1].result
    assert result is not None
    assert "".join(map(str, chunks)) == result.text
    assert [chunk.token for chunk in chunks] == result.tokens
    assert [chunk.finish_reason for chunk in chunks] == [None] * 11 + ["length"]


def test_a_list_of_prompts_gives_a_list_of_results_in_order(shakespeare: Model) -> None:
    prompts = [f"{name}:" for name in ("ROMEO", "JULIET", "KING", "FIRST CITIZEN", "O")]
    results = shakespeare.generate(prompts, max_tokens=6, batch_size=2, **WARM)
    assert [r.prompt for r in results] == prompts
    for prompt, result in zip(prompts, results, strict=True):
        single = shakespeare.generate(prompt, max_tokens=6, **WARM)
        assert (single.text, single.tokens) == (result.text, result.tokens)


def test_copies_in_different_batches_differ(shakespeare: Model) -> None:
    results = shakespeare.generate(["O"] * 5, max_tokens=8, batch_size=2, **WARM)
    assert len({r.text for r in results}) == 5


def test_a_result_has_the_random_seed_of_a_run_without_one(shakespeare: Model) -> None:
    one, two = (shakespeare.generate("O", temperature=1.5, max_tokens=20) for _ in range(2))
    assert one.tokens != two.tokens
    again = shakespeare.generate("O", temperature=1.5, max_tokens=20, seed=one.seed)
    assert again.tokens == one.tokens


def test_a_result_is_json(shakespeare: Model) -> None:
    result = shakespeare.generate("O", max_tokens=2, seed=np.int64(3), temperature=1, logprobs=True)
    assert json.loads(json.dumps(asdict(result)))["seed"] == 3


def test_numbers_of_a_result(shakespeare: Model) -> None:
    result = shakespeare.generate("ROMEO:", max_tokens=10, logprobs=True)
    assert result.prompt_tokens == len(shakespeare.encode("ROMEO:"))
    assert result.prompt_tps > 0
    assert result.generation_tps > 0
    assert result.time_to_first_token > 0
    assert result.peak_memory > 1e7
    assert result.logprobs is not None
    assert len(result.logprobs) == 10
    assert all(x <= 0 for x in result.logprobs)
    assert shakespeare.generate("ROMEO:", max_tokens=2).logprobs is None


@pytest.mark.parametrize("stop", ["\n", "banish", "I'll be a ban", ["zzz", " of my"]])
def test_stop_strings_end_the_text(shakespeare: Model, stop: Any) -> None:
    whole = shakespeare.generate("ROMEO:", max_tokens=60).text
    assert whole is not None
    end = min(whole.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in whole)
    result = shakespeare.generate("ROMEO:", max_tokens=60, stop=stop)
    assert result.text == whole[:end]
    assert result.finish_reason == "stop"
    streamed = "".join(map(str, shakespeare.stream("ROMEO:", max_tokens=60, stop=stop)))
    assert streamed == result.text


def test_a_stop_string_ends_only_its_sequence(shakespeare: Model) -> None:
    one, two = shakespeare.generate(["ROMEO:", "O"], max_tokens=30, stop="my body")
    assert one.finish_reason == "stop"
    assert two.finish_reason == "length"
    assert len(two.tokens) == 30


def test_end_of_text_with_and_without_ignore_eos(shakespeare: Model) -> None:
    eos = shakespeare.config.eos_token_id
    bias: Any = {eos: 100.0}
    result = shakespeare.generate("ROMEO:", logit_bias=bias)
    assert (result.tokens, result.text, result.finish_reason) == ([], "", "stop")
    result = shakespeare.generate("ROMEO:", logit_bias=bias, ignore_eos=True, max_tokens=2)
    assert result.tokens == [eos, eos]
    assert result.text == "<|endoftext|>" * 2


def test_end_of_text_in_a_prompt_is_text_unless_allowed(shakespeare: Model) -> None:
    eos = shakespeare.config.eos_token_id
    assert eos not in shakespeare.encode("<|endoftext|>")
    ids = shakespeare.generate("<|endoftext|>", max_tokens=1, allow_special=True)
    assert ids.prompt_tokens == 1


def test_token_ids_as_prompts(shakespeare: Model) -> None:
    ids = shakespeare.encode("ROMEO:")
    text = shakespeare.generate("ROMEO:", max_tokens=5).text
    assert shakespeare.generate(ids, max_tokens=5).text == text
    assert shakespeare.generate(np.array(ids), max_tokens=5).text == text
    assert [r.text for r in shakespeare.generate([ids, ids], max_tokens=5)] == [text, text]


def test_without_a_tokenizer(folder: Callable[..., Path]) -> None:
    model = gptx.load(folder("124M"))
    result = model.generate([1, 2, 3], max_tokens=4, ignore_eos=True)
    assert len(result.tokens) == 4
    assert result.text is None
    for call in (
        lambda: model.generate("text"),
        lambda: model.generate([1], stop="x"),
        lambda: model.score("text"),
        lambda: model.decode([1]),
    ):
        with pytest.raises(TokenizerError, match=r"no tokenizer.*tokenizer\.json"):
            call()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_weights_of_any_type_are_read(
    folder: Callable[..., Path], dtype: str, backend: str
) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    exact = make_model(CASES["124M"], get_backend("numpy")).logits([1, 2, 3])
    path = folder("124M", dtype=dtype, prefix="transformer.", shards=3)
    got = gptx.load(path, backend=backend).logits([1, 2, 3])
    atol = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.5}[dtype]
    np.testing.assert_allclose(got, exact, rtol=0, atol=atol)
    if dtype != "float32":
        assert np.abs(got - exact).max() > 1e-4


def test_logits(shakespeare: Model) -> None:
    logits = shakespeare.logits([5, 6, 7])
    assert type(logits) is np.ndarray
    assert (logits.shape, logits.dtype) == ((3, 1024), np.float32)
    with pytest.raises(PromptError, match="257 tokens were given, the context holds 256"):
        shakespeare.logits([1] * 257)
    with pytest.raises(PromptError, match="1024, expected 0 to 1023"):
        shakespeare.logits([1024])


def test_scores_are_the_log_softmax_of_the_logits(shakespeare: Model) -> None:
    score = shakespeare.score("To be, or not to be")
    logits = shakespeare.logits(score.tokens).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked = [expected[i, t] for i, t in enumerate(score.tokens[1:])]
    assert score.logprobs[0] is None
    np.testing.assert_allclose(score.logprobs[1:], picked, atol=1e-4)
    assert score.perplexity == pytest.approx(math.exp(-np.mean(picked)), rel=1e-4)
    assert score.n_scored == len(score.tokens) - 1


@pytest.mark.parametrize("stride", [None, 1, 50, 64])
def test_score_in_windows(stride: int | None) -> None:
    model = make_model(CASES["124M"], get_backend("numpy"))
    ids = np.random.default_rng(0).integers(0, 211, 90).tolist()
    score = model.score(ids, stride=stride)
    assert [x is None for x in score.logprobs] == [True] + [False] * 89
    step = stride or 64
    windows: dict[int, Any] = {}
    for i in range(1, 90):  # the first window whose inputs end at the token before, or after it
        first = next(f for f in range(0, 90, step) if i <= f + 64)
        if first not in windows:
            windows[first] = model.logits(ids[first : first + 64]).astype(np.float64)
        logits = windows[first][i - first - 1]
        expected = logits[ids[i]] - np.log(np.exp(logits).sum())
        assert score.logprobs[i] == pytest.approx(expected, abs=1e-4)


@pytest.mark.soak
def test_loss_of_held_out_text(shakespeare: Model) -> None:
    """The held-out tenth, against the loss that transformers computes."""
    text = shared("data/tinyshakespeare.txt").read_text()
    golden = json.loads((Path(__file__).parents[1] / "golden/shakespeare_greedy.json").read_text())
    held_out = text[int(len(text) * 0.9) :]
    assert len(held_out) == golden["heldout"]["characters"]
    score = shakespeare.score(held_out)
    assert score.n_scored == golden["heldout"]["predictions"]
    assert score.loss == pytest.approx(golden["heldout"]["loss"], abs=2e-6)


@pytest.mark.parametrize("stride", [0, 65, -1, 1.5])
def test_an_invalid_stride(stride: Any) -> None:
    with pytest.raises(ParameterError, match="stride is"):
        make_model(CASES["124M"], get_backend("numpy")).score([1, 2], stride=stride)


def interrupted_after(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TokenGenerator.__iter__

    def steps(self: TokenGenerator) -> Any:
        for i, step in enumerate(real(self)):
            if i == n:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(TokenGenerator, "__iter__", steps)


def test_ctrl_c_keeps_the_generated_tokens(
    shakespeare: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shakespeare.generate(["ROMEO:", "O"], max_tokens=10)
    interrupted_after(4, monkeypatch)
    with pytest.raises(Interrupted) as caught:
        shakespeare.generate(["ROMEO:", "O"], max_tokens=10)
    assert [r.tokens for r in caught.value.results] == [r.tokens[:4] for r in whole]
    assert {r.finish_reason for r in caught.value.results} == {"interrupted"}
    for part, result in zip(caught.value.results, whole, strict=True):
        assert part.text
        assert str(result).startswith(part.text)
    assert isinstance(caught.value, KeyboardInterrupt)


def test_ctrl_c_keeps_the_finished_results(
    shakespeare: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_after(2, monkeypatch)
    with pytest.raises(Interrupted) as caught:
        shakespeare.generate(["ROMEO:", "O", "KING"], max_tokens=9, batch_size=1, stop=["\n"])
    results = caught.value.results
    assert [r.finish_reason for r in results] == ["stop", "interrupted", "interrupted"]
    assert [len(r.tokens) for r in results] == [1, 2, 0]


def test_an_invalid_prompt_is_an_error_before_the_first_pass(shakespeare: Model) -> None:
    with (
        mock.patch.object(TokenGenerator, "__iter__", side_effect=AssertionError("computed")),
        pytest.raises(PromptError, match="300 tokens"),
    ):
        shakespeare.generate([[1], [2] * 300], batch_size=1)


def test_stream_checks_its_arguments_at_the_call(shakespeare: Model) -> None:
    with pytest.raises(PromptError, match="empty"):
        shakespeare.stream("")
    with pytest.raises(ParameterError, match="token 99999"):
        shakespeare.stream("O", logit_bias={99999: 1.0})


CHECKS = ["check_options", "_check_limits", "_stop_strings", "__post_init__", "check_bias"]


@pytest.mark.parametrize(
    "request_tokens",
    [
        lambda model, prompts: model.generate(prompts, max_tokens=1),
        lambda model, prompts: gptx.generate(prompts, model=model, max_tokens=1),
        lambda model, prompts: list(model.stream(prompts[0], max_tokens=1)),
        lambda model, prompts: list(gptx.stream(prompts[0], model=model, max_tokens=1)),
        lambda model, prompts: run("generate", "-m", "shakespeare", "-n1", prompts[0]),
    ],
    ids=["generate", "gptx.generate", "stream", "gptx.stream", "command"],
)
def test_a_request_is_checked_once(
    shakespeare: Model, request_tokens: Callable[[Model, list[str]], Any]
) -> None:
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and Path(code.co_filename).parent.name == "generation":
            calls[code.co_name] += 1

    prompts = ["ROMEO:", "O", "KING:"]
    sys.setprofile(count)
    try:
        done = request_tokens(shakespeare, prompts)
    finally:
        sys.setprofile(None)
    n_prompts = len(done) if isinstance(done, list) and len(done) > 1 else 1
    assert calls["check_ids"] == n_prompts
    assert [calls[name] for name in CHECKS] == [1] * len(CHECKS)


def test_options_of_load_with_a_loaded_model_are_an_error(shakespeare: Model) -> None:
    assert gptx.generate("O", model=shakespeare, max_tokens=2).text is not None
    with pytest.raises(ParameterError, match=r"backend.*gptx\.load"):
        gptx.generate("O", model=shakespeare, backend="numpy")


def test_generic_ops_give_the_same_text(shakespeare: Model) -> None:
    generic = gptx.load("shakespeare", generic=True)
    options: Any = {"max_tokens": 30, **WARM}
    assert generic.generate("O", **options).tokens == shakespeare.generate("O", **options).tokens


def test_any_namespace_is_a_backend(shakespeare: Model) -> None:
    strict = pytest.importorskip("array_api_strict")
    options: Any = {"max_tokens": 8, "repetition_penalty": 1.2, "min_p": 0.01, "logprobs": True}
    found = gptx.generate("O", model="shakespeare", backend=strict, **options, **WARM)
    assert found.tokens == shakespeare.generate("O", **options, **WARM).tokens


def test_the_number_of_threads_does_not_change_the_tokens(shakespeare: Model) -> None:
    one = gptx.load("shakespeare", threads=1)
    assert one.generate("O", max_tokens=8).tokens == shakespeare.generate("O", max_tokens=8).tokens


def test_options_are_checked_before_the_search_for_a_model() -> None:
    with pytest.raises(ParameterError, match="temperature is -1"):
        gptx.generate("O", model="./nowhere", temperature=-1)


def test_the_default_of_max_tokens() -> None:
    assert check_options({}).max_tokens == 100


@pytest.mark.parametrize("scalar", [np.float64, np.float32, Fraction])
def test_numbers_of_any_type(shakespeare: Model, scalar: Any) -> None:
    options: Any = {"temperature": scalar(1), "repetition_penalty": scalar(2), "seed": np.uint8(3)}
    plain = shakespeare.generate("O", max_tokens=9, temperature=1.0, repetition_penalty=2.0, seed=3)
    assert shakespeare.generate("O", max_tokens=np.int64(9), **options).tokens == plain.tokens


def test_the_score_of_damaged_weights_is_an_error() -> None:
    weights = random_weights(CASES["tiny"])
    weights["ln_f.bias"][0] = np.nan
    model = make_model(CASES["tiny"], get_backend("numpy"), weights)
    with pytest.raises(NonFiniteError):
        model.score([1, 2, 3])
    assert np.isnan(model.logits([1, 2])).all()


def test_a_perplexity_that_overflows_is_infinite() -> None:
    weights = random_weights(CASES["tiny"])
    weights["ln_f.weight"] *= 1e4
    score = make_model(CASES["tiny"], get_backend("numpy"), weights).score([1, 2, 3])
    assert (score.loss > 700, score.perplexity) == (True, math.inf)


def test_a_relative_folder_is_found_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = gptx.load("shakespeare").files.folder
    shutil.copytree(embedded, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model = gptx.load("model")
    monkeypatch.chdir("/")
    assert model.generate("O", max_tokens=1).text


def test_out_of_memory_while_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    full = mock.Mock(side_effect=MemoryError("no"))
    monkeypatch.setattr("gptx.backends.cpu.backend.NumpyBackend.asarray", full)
    with pytest.raises(DeviceOutOfMemory, match="out of memory"):
        gptx.load("shakespeare")


@pytest.mark.parametrize("ids", [5, "abc", [1.5], [None]])
def test_ids_that_cannot_be_decoded(shakespeare: Model, ids: Any) -> None:
    with pytest.raises(PromptError, match="whole numbers"):
        shakespeare.decode(ids)


@pytest.mark.parametrize("text", [5, b"", None])
def test_text_that_cannot_be_encoded(shakespeare: Model, text: Any) -> None:
    with pytest.raises(PromptError, match="expected a string"):
        shakespeare.encode(text)


def test_models_in_threads_restore_the_blas_setting() -> None:
    def blas() -> list[int]:
        return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]

    models = [gptx.load("shakespeare", threads=n) for n in (1, 2, 1)]
    expected = models[0].generate("O", max_tokens=20).tokens
    before = blas()
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda m: m.generate("O", max_tokens=20).tokens, models * 3))
    assert blas() == before
    assert runs == [expected] * 9


@pytest.mark.hub
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            "Alan Turing theorized that computers would one day become very powerful, "
            "but even he could not imagine",
            "703 484 561 307 1498 284 466 523 13 198 198 1 40 892 326 262 749 1593 1517 318",
        ),
        ("San Francisco is", "257 1748 286 517 621 352 1510 661"),
        ("Cars are", "407 3142 284 307 973 287 262 7647 1256 286 257 7072 13"),
        (
            "Ondřej Čertík was born in",
            "1248 5332 287 262 7404 286 25370 254 368 83 6557 81 11",
        ),
    ],
)
def test_gpt2_of_the_hub(prompt: str, expected: str) -> None:
    ids = [int(i) for i in expected.split()]
    assert gptx.generate(prompt, model="gpt2", max_tokens=len(ids)).tokens == ids
