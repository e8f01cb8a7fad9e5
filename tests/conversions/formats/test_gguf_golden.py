"""Files of llama-quantize: the numbers, the logits and the ids of llama.cpp."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from gptx.conversions import convert, read
from gptx.conversions.containers.gguf import GgufFile
from tests.support.models import EXACT, make_model

GOLDEN = Path(__file__).parents[2] / "golden" / "gguf"
FACTS = json.loads((GOLDEN / "llama_cpp.json").read_text(encoding="utf-8"))
TYPES = {
    "q4_k_m": {"F32", "Q8_0", "Q5_0", "Q4_K", "Q6_K"},
    "iq4_xs": {"F32", "Q8_0", "IQ4_NL", "IQ4_XS"},
}

pytestmark = pytest.mark.parametrize("name", TYPES)


def test_the_numbers_are_those_of_ggml(name: str) -> None:
    file = GgufFile(GOLDEN / f"{name}.gguf")
    assert {tensor.type.name for tensor in file.tensors.values()} == TYPES[name]
    found = {
        tensor: hashlib.sha256(file.read(info).tobytes()).hexdigest()
        for tensor, info in file.tensors.items()
    }
    assert found == FACTS[name]["sha256"]


def test_the_logits_are_those_of_llama_cpp(name: str) -> None:
    _, model = read(GOLDEN / f"{name}.gguf")
    with np.load(GOLDEN / "logits.npz") as golden:
        ids, expected = golden["ids"].tolist(), golden[name]
    logits = make_model(model.config, EXACT, model.tensors).logits(ids)
    # llama.cpp multiplies with activations of 8 bits.
    assert np.linalg.norm(logits - expected) < 0.03 * np.linalg.norm(expected)


def test_the_ids_are_those_of_llama_cpp(name: str) -> None:
    _, model = read(GOLDEN / f"{name}.gguf")
    assert model.tokenizer is not None
    facts = FACTS[name]
    assert model.tokenizer.encode(facts["text"], allow_special=True) == facts["ids"]
    assert model.config.eos_token_id == 256


def test_a_converted_file_has_the_same_numbers(tmp_path: Path, name: str) -> None:
    convert(GOLDEN / f"{name}.gguf", tmp_path / "folder")
    before, after = read(GOLDEN / f"{name}.gguf")[1], read(tmp_path / "folder")[1]
    for tensor, expected in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[tensor], expected)
