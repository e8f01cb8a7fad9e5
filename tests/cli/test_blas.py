"""OpenBLAS is told to use AVX-512 where the processor has it, before NumPy is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import threadpoolctl

from gptx.cli import blas

FULL = "fpu sse2 avx avx2 fma avx512f avx512dq avx512cd avx512bw avx512vl amx_tile"
VARIABLE = "OPENBLAS_CORETYPE"


@pytest.fixture
def cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file of a Linux machine with AVX-512, on which nothing is set."""
    monkeypatch.setattr(blas.sys, "platform", "linux")
    monkeypatch.setattr(blas.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    monkeypatch.delenv(VARIABLE)
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: {FULL}\nbugs\t\t:\n\nprocessor\t: 1\n")
    return path


def test_it_is_set(cpuinfo: Path) -> None:
    blas.choose_kernels(str(cpuinfo))
    assert os.environ[VARIABLE] == "SkylakeX"


@pytest.mark.parametrize("value", ["Haswell", ""])
def test_what_the_user_set_is_left(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    blas.choose_kernels(str(cpuinfo))
    assert os.environ[VARIABLE] == value


@pytest.mark.parametrize(
    "flags",
    ["", *(FULL.replace(flag, "") for flag in ("avx512f ", "avx512dq ", "avx512cd ", "avx512vl "))],
)
def test_a_processor_without(cpuinfo: Path, flags: str) -> None:
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    blas.choose_kernels(str(cpuinfo))
    assert VARIABLE not in os.environ


@pytest.mark.parametrize(("system", "machine"), [("darwin", "x86_64"), ("linux", "aarch64")])
def test_another_system(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    monkeypatch.setattr(blas.sys, "platform", system)
    monkeypatch.setattr(blas.platform, "machine", lambda: machine)
    blas.choose_kernels(str(cpuinfo))
    assert VARIABLE not in os.environ


def test_a_system_that_does_not_tell(cpuinfo: Path) -> None:
    blas.choose_kernels(str(cpuinfo.with_name("none")))
    assert VARIABLE not in os.environ


def test_the_command_line_sets_it_in_time() -> None:
    """What OpenBLAS then says of itself; the library alone sets nothing."""
    report = (
        "import os, threadpoolctl; found = threadpoolctl.threadpool_info();"
        f"print(os.environ.get('{VARIABLE}'), *(x.get('architecture') for x in found))"
    )
    env = {name: value for name, value in os.environ.items() if name != VARIABLE}
    said = []
    for imports in ("import gptx.generation.api", "import gptx.cli"):
        command = [sys.executable, "-c", f"{imports}; {report}"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        said.append(done.stdout.split())
    assert said[0][0] == "None"
    if said[1][0] == "None":
        pytest.skip("not a Linux machine with AVX-512")
    assert said[1][0] == "SkylakeX"
    names = [x["internal_api"] for x in threadpoolctl.threadpool_info()]
    if "openblas" in names:
        assert "SkylakeX" in said[1][1:]
