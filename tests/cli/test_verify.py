"""`gptx verify`: the verdicts, their exit codes, and the JSON."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from gptx.backends import get_backend
from tests.support.cli import run
from tests.support.conversions import source_of


@pytest.fixture(autouse=True)
def no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the logits op by op: a compilation takes long, and is reported on standard error."""
    monkeypatch.setattr("gptx.conversions.verify.get_backend", partial(get_backend, compile=False))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a folder."""
    folder = tmp_path_factory.mktemp("converted") / "shakespeare"
    run("convert", "shakespeare", str(folder))
    return folder


def test_identical_models(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    run("convert", "shakespeare", out, "--dtype", "float32")
    done = run("verify", "shakespeare", out)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "the same: all 76 tensors, bit for bit"
    assert "tokenizer" not in done.out


def test_a_rounded_model_is_the_same(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    run("convert", "shakespeare", out, "--dtype", "bfloat16")
    done = run("verify", "shakespeare", out)
    assert done.code == 0
    assert done.out.splitlines()[-1].startswith("the same, except for rounding")


@pytest.mark.parametrize(
    ("missing", "named"), [(["b"], ["B"]), (["a"], ["A"]), (["a", "b"], ["A", "B"])]
)
def test_a_model_without_a_tokenizer(
    missing: list[str], named: list[str], converted: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        shutil.copytree(converted, tmp_path / name)
        if name in missing:
            for file in ("tokenizer.json", "vocab.json", "merges.txt"):
                (tmp_path / name / file).unlink()
    done = run("verify", str(tmp_path / "a"), str(tmp_path / "b"))
    assert done.code == 0
    line = f"tokenizer: not compared, none that gptx reads in {' and '.join(named)}"
    assert done.out.splitlines()[0] == line
    assert done.out.splitlines()[-1] == "the same: all 76 tensors, bit for bit"
    data = json.loads(run("verify", str(tmp_path / "a"), str(tmp_path / "b"), "--json").out)
    assert (data["tokenizer"], data["without_tokenizer"], data["same"]) == (None, named, True)


def test_a_quantized_model_is_different(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    run("convert", "shakespeare", out, "--quantize", "int8")
    done = run("verify", "shakespeare", out)
    assert done.code == 1
    assert "more than rounding" in done.out
    assert "... and 15 more" in done.out
    assert done.out.splitlines()[-1] == "different"


def test_json(tmp_path: Path) -> None:
    done = run("verify", "shakespeare", str(source_of("124M", tmp_path)), "--json")
    data = json.loads(done.out)
    assert done.code == 1
    assert data["same"] is False
    assert data["config"]["n_embd"] == [192, 96]
    assert data["logits"] is None


def test_tokenizers_that_give_other_ids(converted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(converted, other)
    definition = json.loads((other / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(definition))
    done = run("verify", "shakespeare", str(other))
    assert done.code == 1
    assert 'tokenizer: normalizer: [] in A, [{"type": "Lowercase"}] in B' in done.out
    data = json.loads(run("verify", "shakespeare", str(other), "--json").out)
    assert data["tokenizer"] is False
    assert data["tokenizer_differences"] == {"normalizer": ["[]", '[{"type": "Lowercase"}]']}
