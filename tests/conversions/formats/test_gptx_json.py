"""gptx.conversions.formats.gptx_json, against Python's json."""

from __future__ import annotations

import json
import math
import random
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.config import GPT2Config
from gptx.conversions import convert, detect
from gptx.conversions.formats import gptx_json
from gptx.errors import ConfigError, WeightsError
from gptx.quantization import QuantizedTensor
from gptx.random_weights import random_weights
from gptx.stored_weights import OWN_HEAD_NOTE
from tests.support.fuzz import damaged_copies, fuzz, refuse_every_prefix
from tests.support.random_models import CASES, write_model

TINY = GPT2Config(
    vocab_size=5,
    n_positions=3,
    n_embd=2,
    n_layer=2,
    n_head=1,
    bos_token_id=None,
    eos_token_id=None,
)


def model_dict(config: GPT2Config = TINY) -> dict[str, Any]:
    """Make the object that the project's script passes to json.dump."""
    return {
        name: {"shape": list(w.shape), "data": w.flatten().tolist()}
        for name, w in random_weights(config).items()
    }


def tensors(path: Path, config: GPT2Config = TINY) -> dict[str, np.ndarray]:
    found = {}
    for name, tensor in gptx_json.read(path, config).tensors.items():
        assert not isinstance(tensor, QuantizedTensor)
        found[name] = tensor
    return found


@pytest.mark.parametrize("differs", [False, True])
def test_the_tensors_decide_if_the_head_is_tied(differs: bool, tmp_path: Path) -> None:
    head = random_weights(TINY)["wte.weight"] + differs
    data = model_dict() | {"lm_head.weight": {"shape": head.shape, "data": head.ravel().tolist()}}
    (tmp_path / "model.json").write_text(json.dumps(data))
    checkpoint = gptx_json.read(tmp_path / "model.json", TINY)
    assert checkpoint.config == replace(TINY, tie_word_embeddings=not differs)
    assert checkpoint.notes == ((OWN_HEAD_NOTE,) if differs else ())
    if differs:
        np.testing.assert_array_equal(checkpoint.tensors["lm_head.weight"], head)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(model_dict()))
    return path


@pytest.mark.parametrize("case", ["tiny", "n-inner"])
def test_file_equals_that_of_json_dump(case: str, folder: Any, tmp_path: Path) -> None:
    convert(folder(case), tmp_path / "out.json")
    with open(tmp_path / "expected.json", "w") as file:
        json.dump(model_dict(CASES[case]), file)
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


def test_every_kind_of_number_round_trips(tmp_path: Path) -> None:
    bits = [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3DCCCCCD, 0x7F7FFFFF, 0x7F800000, 0x60AD78EC]
    numbers = np.array([*bits, *(x | 0x80000000 for x in bits), 0x7FC00000], np.uint32)
    config = CASES["tiny"]
    weights = random_weights(config)
    weights["wte.weight"].reshape(-1)[: len(numbers)] = numbers.view(np.float32)
    source = write_model(tmp_path / "source", config, weights)
    convert(source, tmp_path / "out.json")
    text = (tmp_path / "out.json").read_text()
    expected = {
        n: {"shape": list(w.shape), "data": w.flatten().tolist()} for n, w in weights.items()
    }
    assert text == json.dumps(expected)
    assert "NaN" in text
    assert "-Infinity" in text
    found = tensors(tmp_path / "out.json", config)
    assert {n: w.tobytes() for n, w in found.items()} == {
        n: w.tobytes() for n, w in weights.items()
    }


@pytest.mark.parametrize("block", [24, 31, 1000])
def test_blocks_can_end_anywhere(block: int, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptx_json, "READ_BYTES", block)
    found = tensors(tiny)
    for name, weight in random_weights(TINY).items():
        assert found[name].tobytes() == weight.tobytes()


@pytest.mark.parametrize("numbers", [1, 2, 7])
def test_chunks_of_any_size_give_the_same_file(
    numbers: int, folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder("tiny")
    convert(source, tmp_path / "a.json")
    monkeypatch.setattr(gptx_json, "WRITE_NUMBERS", numbers)
    convert(source, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_spaces_order_and_spelling_of_numbers_are_free(tiny: Path) -> None:
    turned = {
        name: {"data": [int(x) if x.is_integer() else x for x in entry["data"]], **entry}
        for name, entry in reversed(model_dict().items())
    }
    tiny.write_text("\n\t " + json.dumps(turned, indent=3).replace("e-", "E-") + "\r\n ")
    assert detect(tiny) == "json"
    for name, weight in random_weights(TINY).items():
        assert tensors(tiny)[name].tobytes() == weight.tobytes()


def test_config_beside_the_file_is_used(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"the width 2 is not a multiple of 64.*config\.json"):
        gptx_json.read(tiny)
    tiny.with_name("config.json").write_text(json.dumps(TINY.to_dict()))
    assert gptx_json.read(tiny).config == TINY


@pytest.mark.soak
def test_reader_and_writer_need_the_memory_of_one_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptx_json, "READ_BYTES", 2**16)
    monkeypatch.setattr(gptx_json, "WRITE_NUMBERS", 2**12)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=1, n_head=1)
    source = write_model(tmp_path / "source", config, random_weights(config))
    convert(source, tmp_path / "out.json")  # imports are not measured
    tracemalloc.start()
    try:
        convert(source, tmp_path / "again.json")
        for name in config.tensor_shapes():
            assert gptx_json.read(tmp_path / "again.json", config).tensors[name].shape
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "again.json").stat().st_size > 1.1e6
    assert peak < 0.7e6  # the largest tensor has 64 kB, a chunk as a list of floats 200 kB


def edited(edit: Callable[[dict[str, Any]], object]) -> str:
    data = model_dict()
    edit(data)
    return json.dumps(data)


DATA = json.dumps(model_dict()["ln_f.bias"]["data"])[1:-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"expected \""),
        (edited(lambda d: d.pop("h.1.ln_2.bias")), "h.1.ln_2.bias is missing"),
        (edited(lambda d: d.update(more=d["ln_f.bias"])), "tensor more is unknown"),
        (edited(lambda d: d.update({"h.2.ln_1.bias": d["ln_f.bias"]})), "h.2.ln_1.bias is unknown"),
        (edited(lambda d: d["ln_f.bias"].update(x=[])), "has 'x', expected"),
        (edited(lambda d: d["ln_f.bias"].pop("data")), 'has no "data"'),
        (edited(lambda d: d["ln_f.bias"].pop("shape")), 'has no "shape"'),
        (
            edited(lambda d: d["ln_f.bias"].update(shape=[3])),
            "has 2 numbers, expected 3 by its shape",
        ),
        (
            edited(lambda d: d["ln_f.bias"].update(shape=[1, 2])),
            r"shape \[1, 2\], expected \[2\]: the weights do not fit the config",
        ),
        (edited(lambda d: d["ln_f.bias"].update(shape=[2**58, 2**58])), "has 2 numbers, expected"),
        (edited(lambda d: d["ln_f.bias"].update(shape=[])), "not one or two positive integers"),
        (edited(lambda d: d["ln_f.bias"].update(shape=[-2])), "not one or two positive integers"),
        (edited(lambda d: d["ln_f.bias"].update(shape=[2.0])), "not one or two positive integers"),
        (edited(lambda d: d["ln_f.bias"].update(shape=2)), r"expected \["),
        (edited(lambda d: d["ln_f.bias"].update(data=[1, True])), "among its numbers"),
        (edited(lambda d: d["ln_f.bias"].update(data=[1, None])), "among its numbers"),
        (edited(lambda d: d["ln_f.bias"].update(data=["1", 2])), "among its numbers"),
        (edited(lambda d: d["ln_f.bias"].update(data=[[1, 2]])), "expected , or }"),
        (edited(lambda d: d["ln_f.bias"].update(data=[1e39, 2])), "too large for float32"),
        (json.dumps(model_dict()).replace(DATA, "1e999, 2"), "too large for float32"),
        (json.dumps(model_dict()).replace(DATA, "9" * 5000 + ", 2"), "too large for float32"),
        (json.dumps(model_dict()).replace(DATA, "1 2, 2"), "an invalid number"),
        (json.dumps(model_dict()).replace(DATA, "1.5, .5"), "an invalid number"),
        (json.dumps(model_dict()).replace(DATA, ", "), "an invalid number"),
        (
            json.dumps(model_dict()).replace('"ln_f.bias"', '"ln_f.weight"'),
            "duplicate tensor ln_f.weight",
        ),
        (json.dumps(model_dict()).replace('"ln_f.bias"', '"' + "x" * 9999 + '"'), "a short name"),
        (json.dumps(model_dict()) + "{", "expected the end of the file"),
        (json.dumps(model_dict())[:-1] + ",}", r"expected \""),
        (json.dumps(model_dict()).replace(DATA, "[" * 10**6 + "]" * 10**6), "expected , or }"),
        (json.dumps(model_dict()).replace(DATA, "[" * 10**6 + ","), "among its numbers"),
        ('{"wte.weight": ' + '{"data": ' * 10**5, r"expected \["),
    ],
)
def test_invalid_files_are_refused(text: str, message: str, tiny: Path) -> None:
    tiny.write_text(text)
    with pytest.raises(WeightsError, match=re.compile(message)):
        tensors(tiny)


def test_a_number_longer_than_a_block_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptx_json, "READ_BYTES", 100)
    tiny.write_text(json.dumps(model_dict()).replace(DATA, "0." + "3" * 500 + ", 1.0"))
    with pytest.raises(WeightsError, match=r"ln_f\.bias has a number of more than 100 bytes"):
        tensors(tiny)


@pytest.mark.parametrize(
    "case", ["gelu-erf", "relu", "unscaled", "layer-scaled", "untied", "epsilon"]
)
def test_unsupported_settings_are_refused(case: str, folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="supports only"):
        convert(folder(case), tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def other_tokens(data: bytes, rng: random.Random) -> bytes:
    """Replace a token of JSON by another one."""
    tokens = [*re.finditer(rb'[\[\]{},:]|"[^"]*"|[-0-9.e]+', data)]
    found = rng.choice(tokens)
    other = rng.choice([rng.choice(tokens)[0], b"NaN", b"[" * 99, b"1e999", b"-", b'"', b"null"])
    return data[: found.start()] + other + data[found.end() :]


@damaged_copies
def test_damaged_files_are_refused_or_read(copies: int, tiny: Path) -> None:
    config = replace(TINY, vocab_size=2, n_positions=1, n_embd=1, n_layer=1)
    short = {
        n: {"shape": s, "data": [-0.5] * math.prod(s)} for n, s in config.tensor_shapes().items()
    }
    tiny.write_text(json.dumps(short))
    refused = fuzz(tiny, lambda: tensors(tiny, config), mutations=[other_tokens], copies=copies)
    assert refused > copies // 2
    refuse_every_prefix(tiny, lambda: tensors(tiny, config), copies=copies)
