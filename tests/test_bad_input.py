"""What is not as it should be is refused by name, in one line, with its exit code."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_model
from random_models import CASES, random_ids
from test_cli import run, start

import gptx
from gptx.backends import get_backend
from gptx.errors import (
    BackendError,
    GptxError,
    NonFiniteError,
    ParameterError,
    PromptError,
    TokenizerError,
)
from gptx.files import read_safetensors
from gptx.generation import Model

NAN, INF = math.nan, math.inf


def short(value: object) -> str:
    """The id of a test."""
    return repr(value)[:40].replace("\n", "")


@contextmanager
def refused(kind: type[GptxError], *parts: str) -> Iterator[None]:
    """Expect exactly this class, in one line that has each of `parts`."""
    with pytest.raises(GptxError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for part in parts:
        assert part in message


def command(*args: str, code: int, says: str, stdin: bytes = b"") -> None:
    """Expect `gptx generate` to end with `code`, its last line to say why, and no output."""
    done = run("generate", "-m", "shakespeare", *args, stdin=stdin)
    assert (done.code, done.out) == (code, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("Error: ")
    assert says in last
    if not done.err.startswith("Usage: "):
        assert done.err.count("\n") == 1


@pytest.fixture
def copied(shakespeare: Model, tmp_path: Path) -> Path:
    """The embedded model as a folder that can be damaged."""
    path = tmp_path / "copied"
    shutil.copytree(shakespeare.files.folder, path, ignore=shutil.ignore_patterns("*.py*", "__*"))
    return path


# Prompts


def test_no_prompt() -> None:
    command(code=2, says="there is no prompt")


@pytest.mark.parametrize("prompt", ["", [], [""], ["O", ""], [[]], [[1], []], np.array([], int)])
def test_empty_prompt(shakespeare: Model, prompt: Any) -> None:
    with refused(PromptError, "give at least one"):
        shakespeare.generate(prompt)


@pytest.mark.parametrize(("prompt", "stdin"), [("", b""), ("-", b""), ("-", b"\n")])
def test_empty_prompt_of_the_command(prompt: str, stdin: bytes) -> None:
    command(prompt, stdin=stdin, code=65, says="the prompt is empty")


def a_megabyte(kind: str) -> str:
    if kind == "one letter":
        return "a" * 1_000_000
    words = ["the", "king", "of", "love's", "banished", "O!", "\n", "\t42", "é", "—"]
    picked = np.random.default_rng(0).integers(0, len(words), 400_000)
    return " ".join(words[i] for i in picked)[:1_000_000]


@pytest.mark.parametrize("kind", ["one letter", "varied"])
def test_a_megabyte_is_encoded_and_refused(shakespeare: Model, kind: str) -> None:
    """Byte-pair encoding that is quadratic in the length of a word would take hours."""
    prompt = a_megabyte(kind)
    n = len(shakespeare.encode(prompt))
    assert n > 100_000
    with refused(PromptError, f"{n} tokens", "context holds 256", "overflow="):
        shakespeare.generate(prompt)


def test_a_megabyte_on_standard_input() -> None:
    says = "1000000 tokens, the context holds 256"
    command("-", stdin=b"a" * 1_000_000, code=65, says=says)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff\xfe", "byte 0xff at position 0"),
        (b"good \xe2\x82", "byte 0xe2 at position 5"),
        (b"\xed\xa0\x80", "byte 0xed at position 0"),  # a surrogate, as UTF-8 may not hold
        (b"caf\xe9\n", "byte 0xe9 at position 3"),
    ],
)
def test_standard_input_that_is_not_utf8(data: bytes, says: str) -> None:
    command("-", stdin=data, code=65, says=f"standard input is not UTF-8: {says}")


def test_lone_surrogate(shakespeare: Model) -> None:
    for call in (shakespeare.generate, shakespeare.encode, shakespeare.score, shakespeare.prefill):
        with refused(PromptError, r"lone surrogate '\ud800' at character 1"):
            call("a\ud800b")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere arguments are not mere bytes")
def test_an_argument_that_is_not_utf8() -> None:
    args = ("generate", "-m", "shakespeare", b"a\xffb")
    with start(*args, PYTHONUTF8="1") as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (65, b"")
    assert err.count(b"\n") == 1
    assert rb"lone surrogate '\udcff' at character 1" in err


@pytest.fixture(scope="module")
def wide() -> Model:
    """A tiny model with GPT-2's own context."""
    config = replace(CASES["tiny"], n_positions=1024)
    return make_model(config, get_backend("numpy"))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """One token more than `wide` can read."""
    found: list[int] = random_ids(CASES["tiny"], 1, 1025)[0].tolist()
    return found


def test_more_tokens_than_the_context(wide: Model, ids: list[int]) -> None:
    with refused(PromptError, "1025 tokens", "1024"):
        wide.generate(ids, max_tokens=1)
    for call in (wide.logits, wide.prefill):
        with refused(PromptError, "1025 tokens", "1024"):
            call(ids)


def test_no_room_for_what_is_asked(wide: Model, ids: list[int]) -> None:
    with refused(PromptError, "1024 tokens and 2 new ones", "context of 1024"):
        wide.generate(ids[:1024], max_tokens=2)


def test_a_full_context_has_one_more_token(wide: Model, ids: list[int]) -> None:
    expected = wide.logits(ids[:1024])[-1].argmax()
    assert wide.generate(ids[:1024], max_tokens=1).tokens == [expected]


@pytest.mark.parametrize("overflow", ["truncate", "slide"])
def test_overflow_reads_the_newest_tokens(wide: Model, ids: list[int], overflow: Any) -> None:
    result = wide.generate(ids, max_tokens=1, overflow=overflow)
    assert result.prompt_tokens == 1024
    assert result.tokens == wide.generate(ids[1:], max_tokens=1).tokens


@pytest.mark.parametrize("overflow", ["truncate", "slide"])
def test_overflow_of_the_command(shakespeare: Model, overflow: str) -> None:
    prompt = "x" * 257
    assert len(shakespeare.encode(prompt)) == 257
    command(prompt, "-n", "1", code=65, says="257 tokens, the context holds 256")
    done = run("generate", "-m", "shakespeare", "-n1", "--json", "--overflow", overflow, prompt)
    assert done.code == 0
    assert json.loads(done.out)["prompt_tokens"] == 256


@pytest.mark.parametrize(
    ("prompt", "says"),
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
    ids=short,
)
def test_what_is_no_prompt(shakespeare: Model, prompt: Any, says: str) -> None:
    with refused(PromptError, says):
        shakespeare.generate(prompt, max_tokens=1)


# Parameters


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": NAN}, "temperature is nan"),
        ({"temperature": INF}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": True}, "temperature is True"),
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
        ({"stop": b"x"}, "stop"),
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
        ({"cache": 5}, "5"),
        ({"tempurature": 1}, "unknown option tempurature"),
        ({"model": "gpt2"}, "unknown option model"),
    ],
    ids=short,
)
def test_parameters_out_of_range(shakespeare: Model, options: Any, says: str) -> None:
    with refused(ParameterError, says):
        shakespeare.generate("O", **({"max_tokens": 1} | options))
    with refused(ParameterError, says):
        list(shakespeare.stream("O", **({"max_tokens": 1} | options)))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--temperature", "-1", "temperature is -1.0"),
        ("--temperature", "nan", "temperature is nan"),
        ("--temperature", "inf", "temperature is inf"),
        ("--temperature", "hot", "'hot' is not a valid float"),
        ("--top-p", "1.5", "top_p is 1.5"),
        ("--top-p", "nan", "top_p is nan"),
        ("--min-p", "-0.5", "min_p is -0.5"),
        ("--top-k", "-1", "top_k is -1"),
        ("--top-k", "1.5", "'1.5' is not a valid integer"),
        ("--repetition-penalty", "0", "repetition_penalty is 0.0"),
        ("--seed", "-1", "seed is -1"),
        ("--seed", str(2**64), "seed is 18446744073709551616"),
        ("--seed", "1.5", "'1.5' is not a valid integer"),
        ("--max-tokens", "0", "max_tokens is 0"),
        ("--max-tokens", "-5", "max_tokens is -5"),
        ("--max-tokens", "many", "'many' is not a valid integer"),
        ("--overflow", "wrap", "'wrap' is not one of 'error', 'truncate', 'slide'"),
        ("--stop", "", "stop has ''"),
        ("--backend", "jax", "backend is 'jax', expected 'numpy', 'cupy', 'mlx'"),
        ("--dtype", "float16", "dtype is 'float16', the numpy backend computes in float32"),
        ("--dtype", "int8", "dtype is 'int8'"),
        ("--threads", "0", "threads is 0"),
        ("--threads", "-1", "threads is -1"),
        ("--threads", "two", "'two' is not a valid integer"),
        ("--revision", "main", "revision is 'main', but 'shakespeare' is not from the Hub"),
        ("--nonsense", "1", "--nonsense"),
    ],
)
def test_options_out_of_range(option: str, value: str, says: str) -> None:
    command(option, value, "O", code=2, says=says)


def test_bad_parameters_are_said_before_the_model_is_loaded() -> None:
    done = run("generate", "-m", "./no-such-folder", "--top-p", "2", "O")
    assert done.code == 2
    assert "top_p is 2.0" in done.err


@pytest.mark.parametrize("top_k", [1025, 10**6, 10**30])
def test_top_k_above_the_vocabulary_is_clamped(shakespeare: Model, top_k: int) -> None:
    options: Any = {"temperature": 1.0, "seed": 3, "max_tokens": 20}
    whole = shakespeare.generate("O", top_k=1024, **options).tokens
    assert shakespeare.generate("O", top_k=top_k, **options).tokens == whole


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40, 1e-300])
def test_a_temperature_close_to_zero_is_greedy(shakespeare: Model, temperature: float) -> None:
    best = shakespeare.generate("ROMEO:", max_tokens=8).tokens
    result = shakespeare.generate("ROMEO:", max_tokens=8, temperature=temperature, seed=1)
    assert result.tokens == best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_that_bans_every_token(shakespeare: Model, temperature: float) -> None:
    with refused(ParameterError, "logit_bias"):
        bias = dict.fromkeys(range(1024), -INF)
        shakespeare.generate("O", logit_bias=bias, temperature=temperature)


# Backends


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (BackendError, {"backend": "jax"}, "backend is 'jax', expected 'numpy', 'cupy', 'mlx'"),
        (BackendError, {"backend": 5}, "backend is 5"),
        (BackendError, {"backend": math}, "backend is <module 'math'"),
        (BackendError, {"dtype": "float16"}, "dtype is 'float16', the numpy backend computes in"),
        (BackendError, {"dtype": "int8"}, "dtype is 'int8'"),
        (BackendError, {"device": "gpu"}, "device is 'gpu'"),
        (ParameterError, {"threads": 0}, "threads is 0"),
        (ParameterError, {"threads": -1}, "threads is -1"),
        (ParameterError, {"threads": "two"}, "threads is 'two'"),
        (ParameterError, {"threads": 1.5}, "threads is 1.5"),
        (ParameterError, {"threads": True}, "threads is True"),
        (ParameterError, {"threads": 10**30}, f"threads is {10**30}"),
        (ParameterError, {"revision": "main"}, "revision is 'main'"),
        (ParameterError, {"bakend": "numpy"}, "unknown option bakend"),
    ],
    ids=short,
)
def test_what_no_backend_can(kind: type[GptxError], options: Any, says: str) -> None:
    with refused(kind, says):
        gptx.generate("O", model="shakespeare", max_tokens=1, **options)


def test_mlx_has_no_threads() -> None:
    pytest.importorskip("mlx.core")
    with refused(BackendError, "threads is 2, but the mlx backend has no setting for threads"):
        get_backend("mlx", threads=2)
    command("-b", "mlx", "-t", "2", "O", code=2, says="threads is 2")


class Absent:
    """A finder for `sys.meta_path` that knows a package not to be there."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("backend", "install"),
    [("mlx", "pip install 'mlx"), ("cupy", "pip install 'cupy-cuda13x")],
)
def test_a_backend_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, backend: str, install: str
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == backend]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"gptx.backends.{backend}_backend", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(backend), *sys.meta_path])
    with refused(BackendError, f"backend '{backend}' needs {backend}", "not installed", install):
        gptx.load("shakespeare", backend=backend)
    command("-b", backend, "O", code=2, says=install)


# Models


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_not_finite(copied: Path, value: float) -> None:
    path = copied / "model.safetensors"
    tensor = read_safetensors(path)[0]["ln_f.bias"]
    data = bytearray(path.read_bytes())
    at = data.find(tensor.tobytes())
    data[at : at + 2] = np.array(value, "<f2").tobytes()
    path.write_bytes(data)

    model = gptx.load(copied)
    with refused(NonFiniteError, "NaN or an infinity"):
        next(model.stream("O"))
    with refused(NonFiniteError, "NaN or an infinity"):
        model.generate([5, 6], temperature=1.0, top_k=3)
    done = run("generate", "-m", str(copied), "O")
    assert (done.code, done.out) == (70, "")
    assert re.fullmatch("Error: .*NaN or an infinity.*\n", done.err)


def test_text_without_a_tokenizer(folder: Callable[..., Path]) -> None:
    path = folder("124M")
    model = gptx.load(path)
    says = ("no tokenizer", "tokenizer.json", "vocab.json", "merges.txt", str(path))
    for call in (model.generate, model.score, model.encode, model.prefill):
        with refused(TokenizerError, *says):
            call("O")
    with refused(TokenizerError, *says):
        model.decode([1])
    with refused(TokenizerError, *says):
        model.generate([1], stop="O")
    result = model.generate([1, 2], max_tokens=3, ignore_eos=True)
    assert (result.text, len(result.tokens)) == (None, 3)
    done = run("generate", "-m", str(path), "O")
    assert (done.code, done.out) == (65, "")
    assert "has no tokenizer" in done.err


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer(copied: Path, missing: str) -> None:
    (copied / "tokenizer.json").unlink()
    (copied / missing).unlink()
    with refused(TokenizerError, f"'{missing}' is missing"):
        gptx.load(copied).encode("O")


def test_vocab_and_merges_are_a_tokenizer(copied: Path, shakespeare: Model) -> None:
    (copied / "tokenizer.json").unlink()
    text = "ROMEO:\nO, banish'd  é<|endoftext|>"
    assert gptx.load(copied).encode(text) == shakespeare.encode(text)


TOKENIZER_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "not JSON": lambda data: b"<html>404</html>",
    "not UTF-8": lambda data: b"\xff" + data[1:],
    "no object": lambda data: b"[]",
    "nothing in it": lambda data: b"{}",
}


@pytest.mark.parametrize("damage", TOKENIZER_DAMAGE)
def test_damaged_tokenizer(copied: Path, damage: str) -> None:
    path = copied / "tokenizer.json"
    path.write_bytes(TOKENIZER_DAMAGE[damage](path.read_bytes()))
    with refused(TokenizerError, str(path), "cannot be read as a tokenizer"):
        gptx.load(copied).generate("O")
    done = run("generate", "-m", str(copied), "O")
    assert (done.code, done.out) == (65, "")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_damaged_vocab_or_merges(copied: Path, name: str) -> None:
    (copied / "tokenizer.json").unlink()
    (copied / name).write_bytes(b"\xff{ nonsense")
    with refused(TokenizerError, name, "cannot be read as a tokenizer"):
        gptx.load(copied).encode("O")


def test_an_error_names_the_tokenizer_file_that_was_read(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError) as caught:
        gptx.load(copied).encode("O")
    assert "merges.txt" not in str(caught.value)


def test_a_tokenizer_of_another_model(copied: Path) -> None:
    path = copied / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["vocab"] = {token: id + 1024 for token, id in facts["model"]["vocab"].items()}
    path.write_text(json.dumps(facts))
    with refused(PromptError, "expected 0 to 1023"):
        gptx.load(copied).generate("ROMEO:")
