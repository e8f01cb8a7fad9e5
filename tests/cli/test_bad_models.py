"""Errors of models with damaged weights, and of models without a valid tokenizer."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gptx
from gptx.errors import NonFiniteError, PromptError, TokenizerError
from gptx.generation.text_model import Model
from gptx.safetensors_file import read_safetensors
from tests.support.cli import raises_error, run

NAN, INF = math.nan, math.inf


@pytest.fixture
def copied(shakespeare: Model, tmp_path: Path) -> Path:
    """The embedded model as a folder that can be damaged."""
    path = tmp_path / "copied"
    shutil.copytree(shakespeare.files.folder, path, ignore=shutil.ignore_patterns("*.py*", "__*"))
    return path


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_not_finite(copied: Path, value: float) -> None:
    path = copied / "model.safetensors"
    tensor = read_safetensors(path)[0]["ln_f.bias"]
    data = bytearray(path.read_bytes())
    at = data.find(tensor.tobytes())
    data[at : at + 2] = np.array(value, "<f2").tobytes()
    path.write_bytes(data)

    model = gptx.load(copied, compile=False)
    with raises_error(NonFiniteError, "NaN or an infinity"):
        next(model.stream("O"))
    with raises_error(NonFiniteError, "NaN or an infinity"):
        model.generate([5, 6], temperature=1.0, top_k=3)
    done = run("generate", "-m", str(copied), "O")
    assert (done.code, done.out) == (70, "")
    assert re.fullmatch("Error: .*NaN or an infinity.*\n", done.err)


def test_text_without_a_tokenizer(folder: Callable[..., Path]) -> None:
    path = folder("124M")
    model = gptx.load(path, compile=False)
    expected = ("no tokenizer", "tokenizer.json", "vocab.json", "merges.txt", str(path))
    for call in (model.generate, model.score, model.encode, model.prefill):
        with raises_error(TokenizerError, *expected):
            call("O")
    with raises_error(TokenizerError, *expected):
        model.decode([1])
    with raises_error(TokenizerError, *expected):
        model.generate([1], stop="O")
    result = model.generate([1, 2], max_tokens=3, ignore_eos=True)
    assert (result.text, len(result.tokens)) == (None, 3)
    done = run("generate", "-m", str(path), "O")
    assert (done.code, done.out) == (65, "")
    assert "has no tokenizer" in done.err


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_a_missing_tokenizer_file(copied: Path, missing: str) -> None:
    (copied / "tokenizer.json").unlink()
    (copied / missing).unlink()
    with raises_error(TokenizerError, f"'{missing}' is missing"):
        gptx.load(copied).encode("O")


def test_vocab_and_merges_are_a_tokenizer(copied: Path, shakespeare: Model) -> None:
    (copied / "tokenizer.json").unlink()
    text = "ROMEO:\nO, banish'd  é<|endoftext|>"
    assert gptx.load(copied).encode(text) == shakespeare.encode(text)


TOKENIZER_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "not JSON": lambda data: b"<html>404</html>",
    "not UTF-8": lambda data: b"\xff" + data[1:],
    "not an object": lambda data: b"[]",
    "empty object": lambda data: b"{}",
}


@pytest.mark.parametrize("damage", TOKENIZER_DAMAGE)
def test_a_damaged_tokenizer(copied: Path, damage: str) -> None:
    path = copied / "tokenizer.json"
    path.write_bytes(TOKENIZER_DAMAGE[damage](path.read_bytes()))
    with raises_error(TokenizerError, str(path), "cannot be read as a tokenizer"):
        gptx.load(copied).generate("O")
    done = run("generate", "-m", str(copied), "O")
    assert (done.code, done.out) == (65, "")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_damaged_vocab_or_merges_file(copied: Path, name: str) -> None:
    (copied / "tokenizer.json").unlink()
    (copied / name).write_bytes(b"\xff{ nonsense")
    with raises_error(TokenizerError, name, "cannot be read as a tokenizer"):
        gptx.load(copied).encode("O")


def test_the_error_names_only_the_file_that_is_damaged(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError) as caught:
        gptx.load(copied).encode("O")
    assert "merges.txt" not in str(caught.value)


def test_a_tokenizer_of_another_model(copied: Path) -> None:
    path = copied / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["vocab"] = {token: id + 1024 for token, id in facts["model"]["vocab"].items()}
    path.write_text(json.dumps(facts))
    with raises_error(PromptError, "expected 0 to 1023"):
        gptx.load(copied).generate("ROMEO:")
