"""`gptx info`: the configuration, the tensors and the memory of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from gptx.conversions import convert
from gptx.conversions.containers.gguf import GgufFile
from gptx.generation.text_model import Model
from gptx.random_weights import random_weights
from tests.support.cli import run
from tests.support.random_models import CASES


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


def test_generation_config(folder: Callable[..., Path]) -> None:
    path = folder()
    assert json.loads(run("info", str(path), "--json").out)["generation_config"] is None
    settings = {"do_sample": True, "top_k": 5, "min_p": None, "transformers_version": "5.24.0"}
    (path / "generation_config.json").write_text(json.dumps(settings))
    assert json.loads(run("info", str(path), "--json").out)["generation_config"] == settings
    shown = "  generation_config.json: do_sample true, top_k 5 (gptx generate --generation-config)"
    assert shown in run("info", str(path)).out.splitlines()


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


@pytest.mark.parametrize(
    ("options", "stored", "line"),
    [
        ({}, ["float16", "float32"], "GGUF (llama.cpp), stored as float16, float32, complete:"),
        ({"quantize": "int8"}, ["Q8_0", "float32"], "stored as Q8_0, float32, complete:"),
    ],
)
def test_a_file_of_another_format(
    options: dict[str, str], stored: list[str], line: str, tmp_path: Path, shakespeare: Model
) -> None:
    path = tmp_path / "model.gguf"
    convert("shakespeare", path, **options)
    with mock.patch.object(GgufFile, "read", side_effect=AssertionError):  # no tensor is read
        done = run("info", str(path))
        data = json.loads(run("info", str(path), "--json").out)
    assert (done.code, done.err) == (0, "")
    assert f"{path}: 2,915,328 parameters" in done.out
    assert "tokenizer: model.gguf" in done.out
    assert line in done.out
    assert (data["format"], data["stored"]) == ("GGUF (llama.cpp)", stored)
    assert data["stored_bytes"] == path.stat().st_size
    assert data["config"] == shakespeare.config.to_dict()


def test_a_tokenizer_beside_the_file_is_named(shakespeare: Model) -> None:
    folder = shakespeare.files.folder
    of_folder, of_file = (
        json.loads(run("info", str(path), "--json").out)["tokenizer"]
        for path in (folder, folder / "model.safetensors")
    )
    assert of_file == of_folder == sorted(shakespeare.files.tokenizer)


def test_notes_and_a_given_config(tmp_path: Path, shakespeare: Model) -> None:
    path = tmp_path / "model"
    convert("shakespeare", path, "staticgrad")
    done = run("info", str(path), "--json")
    assert done.err.startswith("Note: the file has no number of heads: 3 of width 64")
    data = json.loads(done.out)
    assert len(data["notes"]) == 1
    assert data["stored_bytes"] == 4 * 2_915_328
    config = shakespeare.files.config
    done = run("info", str(path), "--json", "--config", str(config))
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["config"] == shakespeare.config.to_dict()


def test_unknown_tensors_can_be_left_out(folder: Callable[..., Path]) -> None:
    weights = random_weights(CASES["tiny"]) | {"v_head.summary.weight": np.ones((1, 8), "f4")}
    path = folder(weights=weights)
    more = folder("tiny", "more", weights=weights | {"h.0.extra.weight": np.ones(3, "f4")})
    assert run("info", str(path)).code == 0
    assert run("info", str(more)).code == 65
    done = run("info", str(more), "--ignore-unknown")
    assert done.code == 0
    assert "h.0.extra.weight" in done.err
