"""`gptx page`: its options, its messages and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptx.server.sites.onnx_runtime_web import FILES
from tests.support.cli import run

pytest.importorskip("ndonnx", reason="pip install '.[test]'")


@pytest.fixture
def ort(tmp_path: Path) -> str:
    """A folder with the names of onnxruntime-web's files."""
    folder = tmp_path / "ort"
    folder.mkdir()
    for name in FILES:
        (folder / name).touch()
    return str(folder)


def test_the_summary_goes_to_standard_error(tmp_path: Path, ort: str) -> None:
    out = tmp_path / "site"
    done = run("page", "-m", "shakespeare", str(out), "--ort", ort)
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith(f"{out}: 6.")
    assert "MB; serve it over HTTP and open it" in done.err
    assert (out / "index.html").is_file()
    assert run("page", "-m", "shakespeare", str(out), "--ort", ort).code == 2
    again = run("page", "-m", "shakespeare", str(out), "--ort", ort, "--overwrite")
    assert again.code == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "Missing argument 'DIR'"),
        (("{out}", "-m", "nowhere/at/all"), 66, "nowhere/at/all"),
        (("{out}", "--dtype", "int8"), 2, "--dtype is 'int8', expected one of float32, float16"),
        (("{out}", "--ort", "{out}"), 66, "expected the npm package onnxruntime-web"),
        (("{out}/a/b",), 74, "its folder does not exist"),
    ],
)
def test_errors(args: tuple[str, ...], code: int, message: str, tmp_path: Path, ort: str) -> None:
    arguments = [part.format(out=tmp_path / "out") for part in args]
    if args and "-m" not in args:
        arguments += ["-m", "shakespeare"]
    if args and "--ort" not in args:
        arguments += ["--ort", ort]
    done = run("page", *arguments)
    assert done.code == code
    assert message in done.err
    assert not (tmp_path / "out").exists()
