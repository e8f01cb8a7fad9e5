"""`gptx info`: the configuration, the tensors and the memory of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from gptx.generation.text_model import Model
from tests.support.cli import run


def test_the_embedded_model() -> None:
    done = run("info", "shakespeare")
    assert (done.code, done.err) == (0, "")
    assert "shakespeare: 2,915,328 parameters" in done.out
    assert re.search(r"^float32 +11\.7 MB +9\.2 kB +2\.4 MB$", done.out, re.MULTILINE)
    assert re.search(r"^h\.\*\.attn\.c_attn\.weight +\[192, 576\] +6 +663,552$", done.out, re.M)
    assert "stored as float16, complete" in done.out


def test_json(shakespeare: Model) -> None:
    data = json.loads(run("info", "shakespeare", "--json").out)
    assert data["parameters"] == 2_915_328
    assert data["weights_bytes"] == {
        "float32": 11_661_312,
        "float16": 5_830_656,
        "bfloat16": 5_830_656,
    }
    assert data["cache_bytes_per_token"]["float32"] == 2 * 6 * 192 * 4
    assert data["config"] == shakespeare.config.to_dict()
    assert data["stored"] == ["float16"]
    shapes = {name: list(shape) for name, shape in shakespeare.config.tensor_shapes().items()}
    assert data["tensors"] == shapes


def test_a_folder(folder: Callable[..., Path]) -> None:
    path = folder("untied", dtype="bfloat16", shards=2)
    done = run("info", str(path))
    assert done.code == 0
    assert str(path) in done.out
    assert "head not tied, tokenizer: none" in done.out
    assert "lm_head.weight" in done.out


def test_missing_weights(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "model.safetensors").unlink()
    done = run("info", str(path))
    assert (done.code, done.out) == (66, "")
    assert "model.safetensors is missing" in done.err


def test_weights_that_do_not_fit_the_config(folder: Callable[..., Path]) -> None:
    path = folder()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    done = run("info", str(path))
    assert (done.code, done.out) == (65, "")
    assert "h.1.ln_1.weight" in done.err
