"""The check with llm.c's test program; the tests that run it need a clone, named by LLM_C."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gptx
from benchmarks.check_llm_c import compute_state, parse, run_llm_c, tokens_of_text
from benchmarks.llm_c import build
from gptx.backends import get_backend
from gptx.bench.sources import find_source
from gptx.errors import GptxError, NotFoundError
from gptx.generation.text_model import Model
from tests.support.models import drawn_weights, make_model
from tests.support.random_models import CASES, random_ids
from tests.support.shared_files import shared

OUTPUT = """\
-3.1, -3.1
OK (LOGITS), max_diff = 1.5e-05
LOSS OK: 5.270009 5.270009
dwte
OK -0.002320 -0.002320
TENSOR OK, maxdiff = 1.2e-06
dwpe
NOT OK 0.1 0.2
TENSOR NOT OK, maxdiff = 1.0e-01
step 0: loss 5.270009 (took 1.0 ms) OK = 1
overall okay: 0
"""


def clone() -> Path:
    if "LLM_C" not in os.environ:
        pytest.skip("LLM_C is not set to the folder of a clone of karpathy/llm.c")
    return Path(os.environ["LLM_C"])


def test_verdicts_of_the_program() -> None:
    found = parse(OUTPUT)
    assert (found.logits, found.loss, found.overall) == (True, True, False)
    assert found.gradients == {"dwte": True, "dwpe": False}
    assert found.differences == {"logits": 1.5e-05, "dwte": 1.2e-06, "dwpe": 0.1}
    assert not found.accepted
    good = OUTPUT.replace("NOT OK", "OK").replace("okay: 0", "okay: 1")
    tensors = "".join(f"d{i}\nTENSOR OK, maxdiff = 0.0\n" for i in range(14))
    assert parse(good).overall
    assert not parse(good).accepted  # 2 gradients, not 16
    assert parse(good + tensors).accepted
    assert not parse((good + tensors).replace("OK (LOGITS)", "NOT OK (LOGITS)")).accepted
    assert not parse((good + tensors).replace("LOSS OK", "LOSS MISMATCH")).accepted
    assert not parse("").accepted


def test_the_state_is_that_of_the_model() -> None:
    config = CASES["tiny"]
    tokens = random_ids(config, 2, 5)
    backend = get_backend("numpy")
    state = compute_state(config, drawn_weights(config), tokens, backend)
    model = make_model(config, backend)
    for row in range(2):
        np.testing.assert_allclose(state.logits[row], model.logits(tokens[row, :-1]), atol=1e-5)
    chosen = np.take_along_axis(state.logits, tokens[:, 1:, None], axis=-1)[..., 0]
    losses = np.log(np.exp(state.logits).sum(-1)) - chosen
    assert state.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert {name: g.shape for name, g in state.gradients.items()} == config.tensor_shapes()


def test_tokens_of_a_text(shakespeare: Model) -> None:
    sections = [f"ROMEO:\nLine {i}." for i in range(80)]
    tokens = tokens_of_text("\n\n".join(sections), shakespeare.tokenizer, 7)
    assert tokens.shape == (4, 65)
    np.testing.assert_array_equal(tokens[:-1, -1], tokens[1:, 0])  # windows overlap by one token
    flat = [*tokens[:, :-1].reshape(-1).tolist(), tokens[-1, -1]]
    expected = [i for s in sections for i in [7, *shakespeare.encode(s + "\n\n")]]
    assert flat == expected[:257]


def test_a_missing_clone_or_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "train_gpt2.c"
    with pytest.raises(NotFoundError, match=r"has no train_gpt2\.c: give a clone"):
        build(tmp_path, source, tmp_path / "program")
    source.write_text("#error broken\n")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(NotFoundError, match="no-such-compiler is not installed"):
        build(tmp_path, source, tmp_path / "program")
    monkeypatch.delenv("CC")
    if shutil.which("gcc"):
        with pytest.raises(GptxError, match="gcc failed on"):
            build(tmp_path, source, tmp_path / "program")


@pytest.mark.parametrize("case", ["124M", "355M"])
def test_llm_c_accepts_logits_loss_and_gradients(case: str, folder: Callable[..., Path]) -> None:
    tokens = random_ids(CASES[case], 4, 33)
    verdict = run_llm_c(clone(), folder(case), tokens, get_backend("numpy"))
    assert verdict.accepted
    assert max(verdict.differences.values()) < 1e-4  # llm.c's own tolerance is 2e-2


@pytest.mark.hub
def test_llm_c_accepts_everything_of_gpt2(tmp_path: Path) -> None:
    source = find_source("gpt2", tmp_path)
    text = shared("data/tinyshakespeare.txt").read_text("utf-8")
    tokens = tokens_of_text(text, gptx.load("gpt2").tokenizer, 50256)
    verdict = run_llm_c(clone(), source.path, tokens, get_backend("numpy"))
    assert verdict.accepted
    assert verdict.overall
