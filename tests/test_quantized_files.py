"""Files of quantized models: mlx-lm's, gptx's own, and files that do not fit the config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gptx
from gptx.backends import Backend, get_backend
from gptx.config import GPT2Config
from gptx.errors import ModelWarning, ParameterError, WeightsError
from gptx.generation.text_model import Model
from gptx.quantization import Quantization, QuantizedTensor, dequantize, quantize
from gptx.random_weights import random_weights
from gptx.safetensors_weights import open_weights
from gptx.stored_weights import OWN_HEAD_NOTE, check_weights
from gptx.weights import quantize_weights
from tests.support.cli import raises_error, run
from tests.support.conversions import save
from tests.support.models import floats_of, make_model
from tests.support.random_models import CASES

WEIGHTS = "model.safetensors"
GOLDEN = Path(__file__).parent / "golden"
INT4 = Quantization(32, 4)
INT8 = Quantization(32, 8)
CONFIG = CASES["124M"]

# Files that mlx-lm wrote (golden/make_quantized.py)


@pytest.mark.parametrize(
    ("name", "quantization"),
    [("mlx-lm-int4", Quantization(64, 4)), ("mlx-lm-int8", Quantization(32, 8))],
)
def test_files_of_mlx_lm(name: str, quantization: Quantization, backend: Backend) -> None:
    """Scales are float16 or bfloat16, positions are quantized, names begin with `model.`."""
    with np.load(GOLDEN / name / "logits.npz") as golden:
        ids, expected = golden["ids"], golden["logits"]
    model = gptx.load(GOLDEN / name, backend=backend)
    assert model.config.quantization == quantization
    np.testing.assert_allclose(model.logits(ids[0]), expected[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "quantization", "as_floats"),
    [
        ("mlx-lm-mixed", INT4, "int6 in groups of 32"),
        ("mlx-lm-3-bit", None, "int3 in groups of 32"),
        ("mlx-lm-nvfp4", None, "nvfp4 in groups of 16"),
    ],
)
def test_quantizations_that_are_read_as_floats(
    name: str, quantization: Quantization | None, as_floats: str, backend: Backend
) -> None:
    """The other quantizations of `golden/make_programs.py` run in conversions/test_programs.py."""
    golden = json.loads((GOLDEN / "programs" / f"{name}.json").read_text())
    with pytest.warns(ModelWarning, match=f"{as_floats} are read as floats"):
        model = gptx.load(GOLDEN / "programs" / name, backend=backend)
    assert model.config.quantization == quantization
    found = model.logits(golden["ids"])[-1]
    np.testing.assert_allclose(found, golden["logits"], rtol=0, atol=2e-5)


def test_a_layer_of_another_quantization(saved: Path) -> None:
    """It is read as floats; the others stay quantized."""
    config, before = GPT2Config.from_file(saved / "config.json"), load_file(saved / WEIGHTS)
    layer = "h.1.mlp.c_fc"
    other = quantize(random_weights(config)[f"{layer}.weight"].T, 8, 32)
    parts = {"weight": other.weight, "scales": other.scales, "biases": other.offsets}
    changed = {f"model.{layer}.{part}": array for part, array in parts.items()}
    save_file(before | changed, saved / WEIGHTS)
    data = json.loads((saved / "config.json").read_text())
    data["quantization"] |= {f"model.{layer}": {"group_size": 32, "bits": 8}, "model.wte": True}
    (saved / "config.json").write_text(json.dumps(data))
    given = GPT2Config.from_file(saved / "config.json")
    assert given.quantization == replace(INT4, layers=((layer, INT8),))
    assert GPT2Config.from_dict(given.to_dict()) == given
    found = open_weights([saved / WEIGHTS], given)
    assert found.config == config
    assert found.notes == ("matrices that are int8 in groups of 32 are read as floats",)
    assert found.tensors[f"{layer}.weight"].file_type == "int8"
    floats = found.map()[f"{layer}.weight"]
    np.testing.assert_array_equal(floats, dequantize(other).T)
    np.testing.assert_array_equal(found.tensors[f"{layer}.weight"].read(), floats)
    assert isinstance(found.map()["h.0.mlp.c_fc.weight"], QuantizedTensor)
    data["quantization"][f"model.{layer}"] = False
    (saved / "config.json").write_text(json.dumps(data))
    with raises_error(WeightsError, f'{layer}.weight is quantized, but config.json has no "quant'):
        gptx.load(saved)


@pytest.mark.parametrize("changed", [None, "weight", "scales", "biases"])
def test_a_quantized_head_beside_a_tied_config(saved: Path, changed: str | None) -> None:
    tensors = load_file(saved / WEIGHTS)
    head = {part: tensors[f"model.wte.{part}"].copy() for part in PARTS}
    if changed is not None:
        head[changed][-1, -1] += 1
    save_file(tensors | {f"lm_head.{part}": x for part, x in head.items()}, saved / WEIGHTS)
    given = GPT2Config.from_file(saved / "config.json")
    found = open_weights([saved / WEIGHTS], given)
    assert found.config == replace(given, tie_word_embeddings=changed is None)
    assert found.notes == (() if changed is None else (OWN_HEAD_NOTE,))
    if changed is not None:
        array = found.map()["lm_head.weight"]
        assert isinstance(array, QuantizedTensor)
        np.testing.assert_array_equal(array.weight, head["weight"])


def test_a_head_of_floats_beside_a_quantized_table(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    head = np.ones((97, 32), np.float32)
    save_file(tensors | {"lm_head.weight": head}, saved / WEIGHTS)
    with pytest.warns(ModelWarning, match="the model's own head is used"):
        model = gptx.load(saved)
    assert not model.config.tie_word_embeddings
    logits = model.logits([1, 2])
    np.testing.assert_allclose(logits, logits[:, :1].repeat(97, axis=1), rtol=1e-6)


SMALL = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ({"scales": None}, "tensor h.0.attn.c_proj.scales is missing"),
        ({"scales": np.zeros((32, 1), np.float32)}, "are float32 [32, 1], expected uint8 [32, 1]"),
        ({"scales": np.zeros((32, 2), np.uint8)}, "the scales are uint8 [32, 2], expected uint8"),
        ({"weight": np.zeros((32, 2), np.uint32)}, "16 inputs do not divide into groups of 32"),
        ({"weight": np.zeros((9, 4), np.int32)}, "the quantized values are int32 [4, 9]"),
    ],
)
def test_small_floats_that_do_not_fit(saved: Path, damage: Any, expected: str) -> None:
    tensors = load_file(saved / WEIGHTS)
    del tensors[f"{LAYER}.biases"]
    tensors[f"{LAYER}.scales"] = np.zeros((32, 1), np.uint8)
    for part, array in damage.items():
        tensors[f"{LAYER}.{part}"] = array
    save_file({name: x for name, x in tensors.items() if x is not None}, saved / WEIGHTS)
    data = json.loads((saved / "config.json").read_text())
    data["quantization"][LAYER] = SMALL
    (saved / "config.json").write_text(json.dumps(data))
    with raises_error(WeightsError, expected):
        gptx.load(saved)


def test_floats_of_mlx_lm_are_transposed(folder: Callable[..., Path]) -> None:
    """With the prefix `model.` a linear layer's matrix is [out, in], also a square one."""
    weights = random_weights(CONFIG)
    theirs = {
        f"model.{name}": np.ascontiguousarray(x.T if ".c_" in name else x)
        for name, x in weights.items()
    }
    path = folder("124M")
    save_file(theirs, path / "model.safetensors")
    expected = make_model(CONFIG, get_backend("numpy"), weights)
    assert gptx.load(path).fingerprint == expected.fingerprint
    np.testing.assert_allclose(gptx.load(path).logits([1, 2]), expected.logits([1, 2]), atol=1e-5)


def test_matrices_that_mlx_lm_does_not_quantize(tmp_path: Path) -> None:
    """96 inputs do not divide into groups of 64, 384 do."""
    config = replace(CONFIG, quantization=Quantization(64, 4))
    weights: dict[str, Any] = random_weights(config)
    for name in [name for name in weights if name.endswith("mlp.c_proj.weight")]:
        weights[name] = quantize(weights[name].T, 4, 64)
    save(tmp_path, config, weights)
    got = gptx.load(tmp_path).logits([1, 2, 3])
    expected = make_model(CONFIG, get_backend("numpy"), floats_of(weights)).logits([1, 2, 3])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


# Files that gptx wrote


@pytest.mark.parametrize("quantization", [INT4, INT8], ids=str)
@pytest.mark.parametrize("case", ["124M", "untied"])
def test_a_written_model_reads_the_same(
    tmp_path: Path, case: str, quantization: Quantization
) -> None:
    weights, config = quantize_weights(random_weights(CASES[case]), CASES[case], quantization)
    save(tmp_path / "new" / "folder", config, weights)
    path = tmp_path / "new" / "folder"
    assert GPT2Config.from_file(path / "config.json") == config
    found = open_weights([path / "model.safetensors"], config).map()
    assert set(found) == set(weights)
    for name, x in weights.items():
        y = found[name]
        if isinstance(x, QuantizedTensor):
            assert isinstance(y, QuantizedTensor)
            for part in ("weight", "scales", "offsets"):
                np.testing.assert_array_equal(getattr(y, part), getattr(x, part))
        else:
            np.testing.assert_array_equal(y, x)


def test_the_names_and_shapes_that_mlx_lm_expects(tmp_path: Path) -> None:
    weights, config = quantize_weights(random_weights(CONFIG), CONFIG, INT4)
    save(tmp_path, config, weights)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "model.h.3.mlp.c_fc"
    assert {name: (str(x.dtype), x.shape) for name, x in tensors.items() if layer in name} == {
        f"{layer}.weight": ("uint32", (384, 96 // 8)),
        f"{layer}.scales": ("float32", (384, 3)),
        f"{layer}.biases": ("float32", (384, 3)),
        f"{layer}.bias": ("float32", (384,)),
    }
    assert all(name.startswith("model.") for name in tensors)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["quantization"] == {"group_size": 32, "bits": 4}


# Files that do not fit the config


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a quantized model, for a test to damage."""
    weights, config = quantize_weights(random_weights(CASES["relu"]), CASES["relu"], INT4)
    save(tmp_path / "saved", config, weights)
    return tmp_path / "saved"


PARTS = ("weight", "scales", "biases")
LAYER = "model.h.0.attn.c_proj"
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{LAYER}.scales"), "h.0.attn.c_proj.scales is missing"),
    "no biases": (lambda t: t.pop("model.wte.biases"), "tensor wte.biases is missing"),
    "no weight": (lambda t: t.pop(f"{LAYER}.weight"), "h.0.attn.c_proj.weight is missing"),
    "only a weight": (
        lambda t: [t.pop(f"{LAYER}.{part}") for part in ("scales", "biases")],
        "tensors h.0.attn.c_proj.scales, h.0.attn.c_proj.biases are missing",
    ),
    "no part": (
        lambda t: [t.pop(f"{LAYER}.{part}") for part in PARTS],
        "tensor h.0.attn.c_proj.weight is missing",
    ),
    "too few groups": (
        lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:16]}),
        "is not int4 in groups of 32: the scales are float32 [16, 1], expected float32 [32, 1]",
    ),
    "biases of integers": (
        lambda t: t.update({f"{LAYER}.biases": t[f"{LAYER}.biases"].astype(np.int32)}),
        "tensor h.0.attn.c_proj.biases is of type int32, expected a float type",
    ),
    "no rows": (
        lambda t: t.update({f"{LAYER}.{part}": t[f"{LAYER}.{part}"][:0] for part in PARTS}),
        "tensor h.0.attn.c_proj.weight has shape [0, 4], expected a matrix",
    ),
    "floats with scales": (
        lambda t: t.update({f"{LAYER}.weight": np.zeros((32, 32), np.float32)}),
        "is not int4 in groups of 32: the quantized values are float32 [32, 32], expected a matrix",
    ),
    "another layer's": (
        lambda t: t.update({f"{LAYER}.{part}": t[f"model.wte.{part}"] for part in PARTS}),
        "tensor h.0.attn.c_proj.weight has shape [32, 97], expected [32, 32]",
    ),
    "a quantized norm": (
        lambda t: t.update({"model.ln_f.scales": np.zeros((1, 1), np.float32)}),
        "tensor ln_f.biases is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit(saved: Path, damage: str) -> None:
    change, expected = DAMAGE[damage]
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors")
    with raises_error(WeightsError, expected):
        gptx.load(saved)
    done = run("info", str(saved))
    assert (done.code, done.out) == (65, "")
    assert expected in done.err
    assert run("convert", "--check", str(saved)).err == done.err


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"group_size": 32, "bits": 8}, "wte.weight is not int8 in groups of 32: 16"),
        ({"group_size": 64, "bits": 4}, "is not int4 in groups of 64: 32 inputs do not divide"),
        (None, 'wte.weight is quantized, but config.json has no "quantization"'),
    ],
)
def test_a_config_that_does_not_fit(saved: Path, quantization: Any, expected: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "quantization": quantization}))
    with raises_error(WeightsError, expected):
        gptx.load(saved)


def test_floats_with_a_quantized_config(folder: Callable[..., Path]) -> None:
    """mlx-lm loads them too: it quantizes the layers that have scales."""
    path = folder("124M")
    fingerprint = gptx.load(path).fingerprint
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization": INT4.to_dict()}))
    note = "no tensor is int4 in groups of 32 as in the config: all are floats"
    with pytest.warns(ModelWarning, match=note):
        model = gptx.load(path)
    assert (model.config, model.fingerprint) == (CONFIG, fingerprint)


def test_norms_and_biases_are_floats() -> None:
    weights, config = quantize_weights(random_weights(CONFIG), CONFIG, INT4)
    weights["ln_f.weight"] = weights["wte.weight"]
    with raises_error(WeightsError, "ln_f.weight is int4 in groups of 32, expected floats"):
        check_weights(weights, config)


def test_a_written_model_generates_the_same_text(tmp_path: Path, shakespeare: Model) -> None:
    files = shakespeare.files
    weights, config = quantize_weights(
        open_weights(files.weights, shakespeare.config).map(),
        shakespeare.config,
        Quantization(64, 4),
    )
    save(tmp_path, config, weights)
    shutil.copy(files.tokenizer["tokenizer.json"], tmp_path)
    expected = gptx.load("shakespeare", quantize="int4").generate("ROMEO:", max_tokens=20)
    assert gptx.load(tmp_path).generate("ROMEO:", max_tokens=20).text == expected.text


# Options and commands


def test_quantizing_a_quantized_model(saved: Path) -> None:
    same = gptx.load(saved, quantize="int4", group_size=32)
    assert same.fingerprint == gptx.load(saved).fingerprint
    for options in ({"quantize": "int8", "group_size": 32}, {"quantize": "int4"}):
        with raises_error(ParameterError, "the weights are int4 in groups of 32 already"):
            gptx.load(saved, **options)


def test_info_of_a_quantized_model(saved: Path) -> None:
    size = (saved / "model.safetensors").stat().st_size
    out = run("info", str(saved)).out
    assert "  matrices quantized: int4 in groups of 32\n" in out
    assert f"stored as float32, int4, complete: {size / 1000:.1f} kB\n" in out
    shown = json.loads(run("info", str(saved), "--json").out)
    assert shown["config"]["quantization"] == {"group_size": 32, "bits": 4}
    assert (shown["stored"], shown["stored_bytes"]) == (["float32", "int4"], size)
