"""Static sites: their files, and what makes none."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from gptx.errors import ParameterError, TokenizerError, WeightsError
from gptx.random_weights import random_weights
from gptx.server.sites import onnx_runtime_web
from gptx.server.sites import writer as site
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.random_models import CASES, write_model
from tests.support.sites import content

pytest.importorskip("ndonnx", reason="pip install '.[test]'")


def test_pieces_are_named_after_their_content(files_only: Path) -> None:
    manifest = json.loads((files_only / site.MANIFEST).read_bytes())
    named = {piece["name"] for pieces in manifest["files"].values() for piece in pieces}
    found = {path.name for path in (files_only / "model").iterdir()}
    assert found == named | {"model.json"}
    for name in named:
        digest = hashlib.sha256((files_only / "model" / name).read_bytes()).hexdigest()
        assert name == f"{digest[: site.NAME_DIGITS]}.bin"


def test_files_are_split_into_pieces(
    tmp_path: Path, no_runtime: Path, monkeypatch: pytest.MonkeyPatch, files_only: Path
) -> None:
    monkeypatch.setattr(site, "PIECE_BYTES", 2**20)
    site.make_site("shakespeare", tmp_path / "site", ort=no_runtime)
    pieces = json.loads((tmp_path / "site" / site.MANIFEST).read_bytes())["files"]["body"]
    assert len(pieces) == 6
    assert {piece["bytes"] for piece in pieces[:-1]} == {2**20}
    for name in ("head", "body", "step", "lens", "tokenizer"):
        assert content(tmp_path / "site", name) == content(files_only, name)


def test_the_page_has_the_engine_of_the_browser_and_a_policy(files_only: Path) -> None:
    page = (files_only / "index.html").read_text("utf-8")
    assert "wasm_engine.js" in page
    assert "server_engine.js" not in page
    assert f'http-equiv="Content-Security-Policy" content="{site.POLICY}"' in page
    names = {path.name for path in (files_only / "page").iterdir()}
    assert {"main.js", "style.css", "wasm_engine.js", "tokenizer.js"} <= names
    assert "server_engine.js" not in names
    headers = (files_only / "_headers").read_text("utf-8").splitlines()
    assert headers[0] == "/*"
    assert "  Cross-Origin-Embedder-Policy: require-corp" in headers


def test_the_runtime_is_copied(files_only: Path) -> None:
    for name in onnx_runtime_web.FILES:
        assert (files_only / "ort" / name).read_bytes() == name.encode()


def test_a_site_of_a_model_without_a_tokenizer_has_numbers(
    tmp_path: Path, no_runtime: Path
) -> None:
    write_model(tmp_path / "model", CASES["tiny"], random_weights(CASES["tiny"]))
    site.make_site(str(tmp_path / "model"), tmp_path / "site", ort=no_runtime)
    manifest = json.loads((tmp_path / "site" / site.MANIFEST).read_bytes())
    assert "tokenizer" not in manifest["files"]
    assert manifest["config"]["vocab_size"] == CASES["tiny"].vocab_size


def test_a_site_replaces_a_site_only(tmp_path: Path, no_runtime: Path) -> None:
    write_model(tmp_path / "model", CASES["tiny"], random_weights(CASES["tiny"]))
    make = lambda **options: site.make_site(  # noqa: E731
        str(tmp_path / "model"), tmp_path / "site", ort=no_runtime, **options
    )
    (tmp_path / "site").mkdir()
    make()
    with pytest.raises(ParameterError, match="already exists: give another name, or overwrite"):
        make()
    (tmp_path / "site" / "model" / "old.bin").write_bytes(b"old")
    make(overwrite=True)
    assert not (tmp_path / "site" / "model" / "old.bin").exists()
    (tmp_path / "site" / site.MANIFEST).unlink()
    with pytest.raises(ParameterError, match="no site of gptx and would be lost"):
        make(overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "site"}


def test_a_failed_site_leaves_nothing(tmp_path: Path, no_runtime: Path) -> None:
    weights = random_weights(CASES["tiny"])
    weights["h.0.mlp.c_fc.weight"][0, 0] = 1e6
    write_model(tmp_path / "model", CASES["tiny"], weights)
    source = str(tmp_path / "model")
    with pytest.raises(WeightsError, match="too large for float16"):
        site.make_site(source, tmp_path / "site", ort=no_runtime, dtype="float16")
    with pytest.raises(ParameterError, match="dtype is 'int8', expected one of float32, float16"):
        site.make_site(source, tmp_path / "site", ort=no_runtime, dtype="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_tokenizer_is_refused(tmp_path: Path, no_runtime: Path) -> None:
    config = replace(CASES["tiny"], vocab_size=64)
    write_model(tmp_path / "model", config, random_weights(config))
    tokenizer = PipelineTokenizer.of_pieces([chr(65 + i) for i in range(64)])
    tokenizer.save(tmp_path / "model")
    with pytest.raises(TokenizerError, match="no prefix space, no added tokens"):
        site.make_site(str(tmp_path / "model"), tmp_path / "site", ort=no_runtime)
