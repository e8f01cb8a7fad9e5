"""Machine code of the kernels: one compilation, the cache on disk, and what is loaded."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptx.errors import BackendError
from gptx.generation.api import load_once

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

from llvmlite.binding.targets import FeatureMap

from gptx.backends.cpu import machine_code
from gptx.backends.cpu.interface import cpu_features, variant
from gptx.backends.cpu.interface.instructions import FLOAT32


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, empty."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The variants that were compiled, by a stand-in for the compiler."""
    names: list[str] = []

    def compile(name: str) -> bytes:
        names.append(name)
        return name.encode() * 1000

    monkeypatch.setattr(machine_code, "_compile", compile)
    return names


def test_a_variant_is_compiled_once(folder: Path, compiled: list[str]) -> None:
    assert not machine_code.is_compiled("int8")
    for _ in range(2):
        assert machine_code.read_or_compile("int8") == b"int8" * 1000
    assert machine_code.is_compiled("int8")
    assert not machine_code.is_compiled("int8,float16-cache")
    assert machine_code.read_or_compile("int4") == b"int4" * 1000
    assert compiled == ["int8", "int4"]


def test_a_single_call_uses_kernels_that_are_compiled(folder: Path, compiled: list[str]) -> None:
    """It compiles none: that takes longer than a few tokens."""
    assert not load_once("shakespeare", 5).backend.compiles
    machine_code.read_or_compile(variant.variant_name([FLOAT32], float16_cache=False))
    assert load_once("shakespeare", 5).backend.compiles
    assert not load_once("shakespeare", 5, dtype="float64").backend.compiles
    assert not load_once("shakespeare", 5, cache_dtype="float16").backend.compiles
    assert not load_once("shakespeare", 5, compile=False).backend.compiles


def test_the_code_depends_on_the_version_of_numba(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    versions = {machine_code._numba_version()}
    for version in ("0.61", "0.62"):
        package = tmp_path / version / "numba"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "_version.py").write_text(f"version = {version!r}\n")
        spec = PathFinder.find_spec("numba", [str(package.parent)])
        monkeypatch.setattr(machine_code.importlib.util, "find_spec", lambda _, spec=spec: spec)
        versions.add(machine_code._numba_version())
    assert len(versions) == 3
    (package / "_version.py").unlink()
    assert machine_code._numba_version() == metadata.version("numba")


@pytest.mark.parametrize("change", ["cut", "flip", "empty"])
def test_a_damaged_file_is_compiled_again(folder: Path, compiled: list[str], change: str) -> None:
    machine_code.read_or_compile("int8")
    [path] = folder.glob("*.o")
    data = path.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    path.write_bytes({"cut": data[:-1], "flip": flipped, "empty": b""}[change])
    assert machine_code.read_or_compile("int8") == b"int8" * 1000
    assert compiled == ["int8", "int8"]
    assert path.read_bytes() == data


@pytest.mark.skipif(os.name != "posix", reason="a folder of this kind is POSIX's")
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert machine_code.read_or_compile("int8") == b"int8" * 1000
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_folder_of_the_user_is_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    """As after an installation by the administrator."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "file").touch()
    monkeypatch.setattr(machine_code, "KERNELS", tmp_path / "file")
    machine_code.read_or_compile("int8")
    assert len(list((tmp_path / "gptx").glob("*.o"))) == 1
    machine_code.read_or_compile("int8")
    assert compiled == ["int8"]


def test_a_user_without_a_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    """As in a container whose user is a number only, and may not write to the installation."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    (tmp_path / "file").touch()
    monkeypatch.setattr(machine_code, "KERNELS", tmp_path / "file")
    assert machine_code.read_or_compile("int8") == b"int8" * 1000


def test_one_process_compiles_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="the locks of Windows are others")
    locked = []

    def compile(name: str) -> bytes:
        with open(folder / "kernels.lock", "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(name)
        return b"code"

    monkeypatch.setattr(machine_code, "_compile", compile)
    machine_code.read_or_compile("int8")
    assert locked == ["int8"]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program as the compiler: two functions, then an error."""
    program = "print(); print(); raise ImportError('no such thing')"
    popen = subprocess.Popen

    def start(command: list[str], **options: object) -> object:
        return popen([sys.executable, "-c", program], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(machine_code, "N_FUNCTIONS", 4)


MESSAGE = "gptx: compiling the kernels for int8, float16-cache on this processor, once"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("terminal", [False, True])
def test_the_compiler_shows_its_progress_and_its_error(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with pytest.raises(BackendError, match="cannot be compiled: ImportError: no such thing"):
        machine_code._compile("int8,float16-cache")
    percents = "".join(f"\r{MESSAGE}: {n} %" for n in (25, 50))
    shown = f"{percents}\r\x1b[K" if terminal else "\n"
    assert capsys.readouterr().err == f"{MESSAGE} ...{shown}"


def test_a_process_that_loads_the_code_does_not_import_numba() -> None:
    code = (
        "import sys, numpy as np\n"
        "from gptx.backends.cpu.quantized import QuantizedWeight\n"
        "from gptx.quantization import quantize\n"
        "w = np.eye(64, dtype=np.float32)\n"
        "y = QuantizedWeight(quantize(w, 8, 32)).multiply(w[:3], None, 2)\n"
        "assert abs(y - w[:3]).max() < 0.01, y\n"
        "assert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variant.VARIABLE)
    assert variant.variant_name([3, 0, 1], False) == "float32,int4"
    assert variant.variant_name([2, 2], True) == "int8,float16-cache"
    monkeypatch.setenv(variant.VARIABLE, "int4,float32")
    assert variant.variant_name([2], True) == "float32,int8,int4,float16-cache"


FEATURES = "+sse2,+avx,+avx2,+fma,+avx512f,+avx512dq,+avx512vl,+avx512vnni,+amx-int8,-avxvnni"


@pytest.mark.parametrize(
    ("isa", "expected"),
    [
        ("none", ""),
        (
            "avx2",
            "+sse2,+avx,+avx2,+fma,-avx512f,-avx512dq,-avx512vl,-avx512vnni,-amx-int8,-avxvnni",
        ),
        (
            "avx512",
            "+sse2,+avx,+avx2,+fma,+avx512f,+avx512dq,+avx512vl,-avx512vnni,-amx-int8,-avxvnni",
        ),
        (
            "vnni",
            "+sse2,+avx,+avx2,+fma,+avx512f,+avx512dq,+avx512vl,+avx512vnni,-amx-int8,-avxvnni",
        ),
    ],
)
def test_features_of_an_instruction_set(isa: str, expected: str) -> None:
    assert cpu_features.restricted(isa, FEATURES)[1] == expected


def test_an_instruction_set_that_the_processor_does_not_have() -> None:
    with pytest.raises(
        BackendError, match="GPTX_ISA is 'vnni', which this processor does not have"
    ):
        cpu_features.restricted("vnni", "+sse2,+avx2")
    with pytest.raises(
        BackendError, match="GPTX_ISA is 'sse', expected avx2, avx512, vnni, dotprod or none"
    ):
        cpu_features.restricted("sse", FEATURES)


@pytest.mark.parametrize("reported", [(), ("dotprod",), ("dotprod", "i8mm")])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_features_of_arm_that_only_the_system_reports(
    system: str, reported: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Linux in the auxiliary vector, on macOS by name."""
    vector = {16: ("dotprod" in reported) << 20, 26: ("i8mm" in reported) << 13}
    names = {"dotprod": b"hw.optional.arm.FEAT_DotProd", "i8mm": b"hw.optional.arm.FEAT_I8MM"}

    def sysctlbyname(name: bytes, value: Any, *_: Any) -> None:
        value._obj.value = name in [names[feature] for feature in reported]

    library = SimpleNamespace(getauxval=vector.get, sysctlbyname=sysctlbyname)
    monkeypatch.setattr(cpu_features, "ARM", True)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(cpu_features.llvm, "get_host_cpu_features", lambda: FeatureMap(neon=True))
    assert cpu_features._host_features() == ",".join(["+neon", *(f"+{x}" for x in reported)])


def test_features_that_llvm_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("failed to get host cpu features.")

    monkeypatch.setattr(cpu_features, "ARM", False)
    monkeypatch.setattr(cpu_features.llvm, "get_host_cpu_features", fail)
    assert cpu_features._host_features() == ""
