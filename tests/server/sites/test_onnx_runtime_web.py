"""The files of onnxruntime-web: in a folder, and from npm."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gptx.errors import HubUnavailableError, NotFoundError
from gptx.server.sites import onnx_runtime_web
from tests.support.sites import write_runtime


def test_the_runtime_is_found_in_a_package_and_in_node_modules(
    tmp_path: Path,
) -> None:
    (tmp_path / "dist").mkdir()
    dist = write_runtime(tmp_path / "dist")
    package = tmp_path / "node_modules" / "onnxruntime-web"
    package.mkdir(parents=True)
    shutil.move(dist, package)
    found = {name: name.encode() for name in onnx_runtime_web.FILES}
    assert onnx_runtime_web.read_runtime(package / "dist") == found
    assert onnx_runtime_web.read_runtime(tmp_path) == found
    assert onnx_runtime_web.read_runtime(package) == found


def test_missing_runtimes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match=r"has no ort\.wasm\.min\.mjs"):
        onnx_runtime_web.read_runtime(tmp_path)
    (tmp_path / onnx_runtime_web.MODULE).touch()
    with pytest.raises(NotFoundError, match=r"lacks ort-wasm-simd-threaded\.mjs"):
        onnx_runtime_web.read_runtime(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(NotFoundError, match="npm, which fetches onnxruntime-web, is not installed"):
        onnx_runtime_web.read_runtime()


def test_an_error_of_npm_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "npm error\ncode ENOTFOUND\n")

    monkeypatch.setattr(shutil, "which", lambda _: "npm")
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(HubUnavailableError, match=r"\(npm error code ENOTFOUND\).*by ort"):
        onnx_runtime_web.read_runtime()
