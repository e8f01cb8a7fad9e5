"""gptx info, backends, download, --version and --help: what each prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from gptx import __version__
from gptx.backends import TABLE
from gptx.cli import gptx as group
from gptx.generation.api import Model
from tests.support.cli import error_lines, run, start


def test_the_installed_command() -> None:
    command = shutil.which("gptx", path=os.path.dirname(sys.executable)) or shutil.which("gptx")
    if command is None:
        pytest.skip("the gptx command is not on the path")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gptx, version {__version__}\n"


def test_info_of_the_embedded_model() -> None:
    done = run("info", "shakespeare")
    assert (done.code, done.err) == (0, "")
    assert "shakespeare: 2,915,328 parameters" in done.out
    assert re.search(r"^float32 +11\.7 MB +9\.2 kB +2\.4 MB$", done.out, re.MULTILINE)
    assert re.search(r"^h\.\*\.attn\.c_attn\.weight +\[192, 576\] +6 +663,552$", done.out, re.M)
    assert "stored as float16, all there" in done.out


def test_info_as_json(shakespeare: Model) -> None:
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


def test_info_of_a_folder(folder: Callable[..., Path]) -> None:
    path = folder("untied", dtype="bfloat16", shards=2)
    done = run("info", str(path))
    assert done.code == 0
    assert str(path) in done.out
    assert "head of its own, tokenizer: none" in done.out
    assert "lm_head.weight" in done.out


def test_info_where_the_weights_are_missing(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "model.safetensors").unlink()
    done = run("info", str(path))
    assert (done.code, done.out) == (66, "")
    assert "model.safetensors is missing" in done.err


def test_info_where_the_weights_do_not_fit(folder: Callable[..., Path]) -> None:
    path = folder()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    done = run("info", str(path))
    assert (done.code, done.out) == (65, "")
    assert "h.1.ln_1.weight" in done.err


def test_backends_has_a_row_each() -> None:
    done = run("backends")
    assert done.code == 0
    rows = [line.split(maxsplit=2) for line in done.out.splitlines()]
    assert [row[0] for row in rows] == list(TABLE)
    assert {row[1] for row in rows} <= {"yes", "no"}
    assert rows[0][1] == "yes"


def test_backends_as_json() -> None:
    rows = json.loads(run("backends", "--json").out)
    assert [row["name"] for row in rows] == list(TABLE)
    assert rows[0]["available"] is True
    assert rows[0]["detail"].startswith("numpy ")


def test_backends_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gptx.backends.mlx_backend", None)
    mlx = json.loads(run("backends", "--json").out)[2]
    assert (mlx["name"], mlx["available"]) == ("mlx", False)
    assert "pip install 'mlx" in mlx["detail"]


def test_backends_says_what_compiles_the_numpy_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: "0.99")
    line = run("backends").out.splitlines()[0]
    assert line.endswith(f"numpy {np.__version__}, compiled with Numba 0.99")


def test_backends_says_what_numba_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "numba":
            raise metadata.PackageNotFoundError(package)
        return real(package)

    real = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    line = run("backends").out.splitlines()[0]
    assert line.endswith(
        f"numpy {np.__version__}; pip install 'gptx[fast]' compiles the forward pass, "
        "and keeps quantized weights small"
    )


def test_backends_does_not_import_numba() -> None:
    code = "import sys, gptx.backends as b; b.available(); print('numba' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_download_of_what_is_here(shakespeare: Model) -> None:
    assert run("download", "shakespeare").out == f"{shakespeare.files.folder}\n"


@pytest.mark.parametrize("command", [("download",), ("info",), ("generate", "O", "-m")])
def test_a_folder_that_does_not_exist(command: tuple[str, ...]) -> None:
    done = run(*command, "./no-such-folder")
    assert (done.code, done.out) == (66, "")
    assert "'./no-such-folder' does not exist" in done.err


@pytest.mark.parametrize("command", [("download",), ("info",), ("generate", "O", "-m")])
def test_offline_and_not_in_the_cache(command: tuple[str, ...], tmp_path: Path) -> None:
    args = (*command, "nobody/nothing")
    with start(
        *args, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path)
    ) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (66, b"")
    [line] = error_lines(err)
    assert b"gptx download nobody/nothing" in line


def test_version() -> None:
    assert run("--version") == (0, f"gptx, version {__version__}\n", "")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(option: str) -> None:
    done = run(option)
    assert (done.code, done.err) == (0, "")
    for name in group.commands:
        assert re.search(rf"^  {name} ", done.out, re.MULTILINE)
    assert re.sub(r"\s+", " ", done.out).count("130 interrupted, 141 broken pipe") == 1


@pytest.mark.parametrize("name", group.commands)
def test_help_of_a_command(name: str) -> None:
    done = run(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: gptx {name} [OPTIONS]" in done.out
    for parameter in group.commands[name].params:
        for option in parameter.opts:
            if option.startswith("-"):
                assert option in done.out


def test_without_a_command_there_is_the_help() -> None:
    done = run()
    text = done.out + done.err  # click 8.1 writes it to standard output, and ends with 0
    assert done.code in (0, 2)
    assert text.startswith("Usage: gptx")
    assert len(text.splitlines()) > 10
