"""Files that other programs made: their logits, token ids and ends of text, or a clear refusal.

`tests/golden/make_programs.py` made the files, and computed the numbers with each program.
"""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.config import GPT2Config
from gptx.conversions import read
from gptx.errors import ConfigError, WeightsError
from gptx.generation.text_model import Model
from tests.support.models import EXACT, make_model

PROGRAMS = Path(__file__).resolve().parents[1] / "golden" / "programs"
RESULTS = {path.stem: json.loads(path.read_text("utf-8")) for path in PROGRAMS.glob("*.json")}
MODELS = sorted(name for name, results in RESULTS.items() if "logits" in results)
ACTIVATIONS = [
    (program, name)
    for program in ("transformers4-activations", "transformers5-activations")
    for name in RESULTS[program]["last_logits"]
]
SUPPORTED = {
    "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu",
    "gelu_python", "relu",
}  # fmt: skip
REFUSED = {
    "transformers4-SequenceClassification": "GPT2ForSequenceClassification",
    "transformers5-SequenceClassification": "GPT2ForSequenceClassification",
    "transformers4-TokenClassification": "GPT2ForTokenClassification",
    "transformers5-TokenClassification": "GPT2ForTokenClassification",
    "transformers4-QuestionAnswering": "GPT2ForQuestionAnswering",
    "transformers5-QuestionAnswering": "GPT2ForQuestionAnswering",
    "transformers4-cross-attention": "add_cross_attention",
    "transformers5-cross-attention": "add_cross_attention",
    "torch-no-model": "epoch, optimizer, names",
    "torch-whole-module": "state_dict",
    "peft-lora": "adapter .*LoRA",
    "peft-ia3": "adapter",
    "peft-prompt": "adapter",
    "peft-state-dict": "LoRA",
}
# With float32 weights, sums in another order differ by this much of the largest logit.
TOLERANCE = 2e-6

pytestmark = pytest.mark.filterwarnings("ignore::gptx.errors.ModelWarning")


def path_of(name: str) -> Path:
    """Return the folder of a case, or its only file with weights if no folder has that name."""
    folder = PROGRAMS / name
    files = [p for p in folder.iterdir() if p.suffix in (".gguf", ".pt", ".pth", ".ckpt")]
    return files[0] if files else folder


@lru_cache
def loaded(name: str) -> Model:
    """Load a model in float64, without overrides."""
    return gptx.load(path_of(name), backend=EXACT)


def assert_close(logits: np.ndarray, expected: Any) -> None:
    """Compare logits with those of the program."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * scale)


def test_every_case_has_a_test() -> None:
    cases = {path.name for path in PROGRAMS.iterdir() if path.is_dir()}
    assert cases == {*MODELS, *REFUSED, *(program for program, _ in ACTIVATIONS)}
    assert cases == set(RESULTS)


@pytest.mark.parametrize("name", MODELS)
def test_load_has_the_logits_of_the_program(name: str) -> None:
    results = RESULTS[name]
    assert_close(loaded(name).logits(results["ids"])[-1], results["logits"])


@pytest.mark.parametrize("name", MODELS)
def test_a_conversion_has_the_logits_of_the_program(name: str) -> None:
    results = RESULTS[name]
    checkpoint = read(path_of(name))[1].as_floats()
    model = make_model(checkpoint.config, EXACT, checkpoint.tensors)
    assert_close(model.logits(results["ids"])[-1], results["logits"])


@pytest.mark.parametrize("name", [name for name in MODELS if "texts" in RESULTS[name]])
def test_texts_have_the_ids_of_the_program(name: str) -> None:
    tokenizer = read(path_of(name))[1].tokenizer
    assert tokenizer is not None
    for text, ids in RESULTS[name]["texts"].items():
        assert loaded(name).encode(text, allow_special=True) == ids
        assert tokenizer.encode(text, allow_special=True) == ids


@pytest.mark.parametrize("name", [name for name in MODELS if "greedy" in RESULTS[name]])
def test_a_text_ends_where_it_ends_for_the_program(name: str) -> None:
    results = RESULTS[name]
    model, n = loaded(name), len(results["without_end"])
    without_end = model.generate(results["ids"], max_tokens=n, ignore_eos=True)
    assert without_end.tokens == results["without_end"]
    result = model.generate(results["ids"], max_tokens=n)
    # The result of transformers has the end-of-text token, that of gptx does not.
    assert (result.tokens, result.finish_reason) == (results["greedy"][:-1], "stop")


@pytest.mark.parametrize(("program", "activation"), ACTIVATIONS)
def test_each_activation_is_that_of_the_program_or_is_refused(
    program: str, activation: str, tmp_path: Path
) -> None:
    shutil.copy(PROGRAMS / program / "model.safetensors", tmp_path)
    config = json.loads((PROGRAMS / program / "config.json").read_text("utf-8"))
    config["activation_function"] = activation
    (tmp_path / "config.json").write_text(json.dumps(config))
    if activation not in SUPPORTED:
        with pytest.raises(ConfigError, match=f"activation_function is '{activation}'"):
            GPT2Config.from_file(tmp_path / "config.json")
        return
    model = gptx.load(tmp_path, backend=EXACT)
    results = RESULTS[program]
    assert_close(model.logits(results["ids"])[-1], results["last_logits"][activation])


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_another_kind_is_refused_by_its_kind(name: str) -> None:
    error = ConfigError if name.endswith("cross-attention") else WeightsError
    with pytest.raises(error, match=REFUSED[name]):
        gptx.load(path_of(name), backend=EXACT)
    with pytest.raises(error, match=REFUSED[name]):
        read(path_of(name))
