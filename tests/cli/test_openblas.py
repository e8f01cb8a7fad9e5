"""Selection of OpenBLAS's AVX-512 kernels by the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import threadpoolctl

from gptx.cli import openblas
from gptx.cli.openblas import VARIABLE, select_kernels

AVX512_FLAGS = "fpu sse2 avx avx2 fma avx512f avx512dq avx512cd avx512bw avx512vl amx_tile"


def set_system(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(openblas.sys, "platform", system)
    monkeypatch.setattr(
        openblas.os, "uname", lambda: SimpleNamespace(machine=machine), raising=False
    )


@pytest.fixture
def cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """/proc/cpuinfo of a Linux machine with AVX-512, on which the variable is not set."""
    set_system(monkeypatch, "linux", "x86_64")
    monkeypatch.setenv(VARIABLE, "")  # so that monkeypatch restores the variable
    monkeypatch.delenv(VARIABLE)
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: {AVX512_FLAGS}\nbugs\t\t:\n\nprocessor\t: 1\n")
    return path


def test_avx512(cpuinfo: Path) -> None:
    select_kernels(str(cpuinfo))
    assert os.environ[VARIABLE] == "SkylakeX"


@pytest.mark.parametrize("value", ["Haswell", ""])
def test_a_value_of_the_user_is_kept(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    select_kernels(str(cpuinfo))
    assert os.environ[VARIABLE] == value


@pytest.mark.parametrize("missing", ["", "avx512f ", "avx512dq ", "avx512cd ", "avx512vl "])
def test_a_missing_flag(cpuinfo: Path, missing: str) -> None:
    flags = AVX512_FLAGS.replace(missing, "") if missing else ""
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    select_kernels(str(cpuinfo))
    assert VARIABLE not in os.environ


@pytest.mark.parametrize(("system", "machine"), [("darwin", "x86_64"), ("linux", "aarch64")])
def test_another_system(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    set_system(monkeypatch, system, machine)
    select_kernels(str(cpuinfo))
    assert VARIABLE not in os.environ


def test_a_missing_cpuinfo(cpuinfo: Path) -> None:
    select_kernels(str(cpuinfo.with_name("none")))
    assert VARIABLE not in os.environ


def test_the_command_line_sets_the_variable_before_numpy_is_imported() -> None:
    """`import gptx` does not set it."""
    report = (
        "import os, threadpoolctl; found = threadpoolctl.threadpool_info();"
        f"print(os.environ.get('{VARIABLE}'), *(x.get('architecture') for x in found))"
    )
    command = "import gptx.cli.app; gptx.cli.app.run(['info', '--help']); "
    env = {name: value for name, value in os.environ.items() if name != VARIABLE}

    def output(code: str) -> list[str]:
        args = [sys.executable, "-c", code + report]
        done = subprocess.run(args, env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1].split()

    variable, *architectures = output(command)
    if variable == "None":
        pytest.skip("needs Linux and a processor with AVX-512")
    assert variable == "SkylakeX"
    if "openblas" in [x["internal_api"] for x in threadpoolctl.threadpool_info()]:
        assert "SkylakeX" in architectures
    assert output("import gptx.generation.api; ")[0] == "None"
