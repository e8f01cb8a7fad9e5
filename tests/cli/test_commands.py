"""The group of commands: help, version, completion, and imports on call."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import click
import pytest

from gptx import __version__, errors
from gptx.cli.app import BROKEN_PIPE, COMMANDS, load_command
from gptx.errors import GptxError, Interrupted
from tests.support.cli import run

# Runs commands in turn, and prints the modules that each of them imports.
IMPORTS = """
import contextlib, io, json, sys
def new_modules(call, *args):
    before = set(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()):
        call(*args)
    return sorted(set(sys.modules) - before)
from gptx.cli.app import COMMANDS, load_command, run
modules = {"import": sorted(sys.modules)}
modules["--help"] = new_modules(run, ["--help"])
modules["backends"] = new_modules(run, ["backends"])
modules |= {name: new_modules(load_command, name) for name in COMMANDS if name != "backends"}
print(json.dumps(modules))
"""


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """The modules that each command imports in a child process, in the order of the keys."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    return {name: set(modules) for name, modules in json.loads(done.stdout).items()}


def test_help_imports_no_command_and_no_library(imports: dict[str, set[str]]) -> None:
    modules = imports["import"] | imports["--help"]
    ours = {name for name in modules if name.startswith("gptx.")}
    names = ("app", "openblas", "signals")
    assert ours == {"gptx._version", "gptx.errors", "gptx.cli", *(f"gptx.cli.{n}" for n in names)}
    libraries = {"numpy", "numba", "safetensors", "tokenizers", "huggingface_hub", "matplotlib"}
    assert not libraries & modules


def test_backends_imports_no_model(imports: dict[str, set[str]]) -> None:
    modules = imports["backends"]
    assert "gptx.backends" in modules
    libraries = {"numba", "safetensors", "tokenizers", "huggingface_hub", "matplotlib"}
    packages = {f"gptx.{name}" for name in ("bench", "conversions", "generation", "hub", "model")}
    assert not (libraries | packages) & modules


def test_a_command_imports_no_other_command(imports: dict[str, set[str]]) -> None:
    for name in COMMANDS:
        files = {module for module in imports[name] if module.startswith("gptx.cli.")}
        shared = {f"gptx.cli.{x}" for x in ("options", "formatting", "prompts", "streaming")}
        assert files - shared == {f"gptx.cli.{name}"}


def test_python_m_gptx() -> None:
    command = [sys.executable, "-m", "gptx", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"gptx, version {__version__}\n"


def test_the_installed_command() -> None:
    command = shutil.which("gptx", path=os.path.dirname(sys.executable)) or shutil.which("gptx")
    if command is None:
        pytest.skip("the gptx command is not on the path")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gptx, version {__version__}\n"


def test_version() -> None:
    assert run("--version") == (0, f"gptx, version {__version__}\n", "")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_commands_and_exit_codes(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of the usual width, each summary has one line."""
    monkeypatch.setenv("COLUMNS", "80")
    done = run(option)
    assert (done.code, done.err) == (0, "")
    for name, summary in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", done.out, re.MULTILINE)
    kinds = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, GptxError)]
    codes = {kind.exit_code for kind in kinds} | {Interrupted.exit_code, BROKEN_PIPE}
    codes |= {128 + number for number in (1, 15)}  # SIGHUP, SIGTERM
    listed = re.findall(r"^ +(\d+)  \w", done.out, re.MULTILINE)
    assert list(map(int, listed)) == sorted(codes - {GptxError.exit_code})


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str) -> None:
    done = run(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: gptx {name} [OPTIONS]" in done.out
    command = load_command(name)
    assert command.help is not None
    assert " ".join(command.help.split()).startswith(COMMANDS[name])
    for parameter in command.params:
        for option in parameter.opts:
            if option.startswith("-"):
                assert option in done.out
                assert isinstance(parameter, click.Option)
                assert parameter.help


def test_help_without_a_command() -> None:
    done = run()
    text = done.out + done.err  # click 8.1 writes it to standard output, and ends with 0
    assert done.code in (0, 2)
    assert text.startswith("Usage: gptx")
    assert len(text.splitlines()) > 10
