"""Compile CUDA kernels for the CPU, by g++ (g++ path) or by NVRTC and g++ (PTX path).

    module = compile_module(["gemv.cu"], {"REAL": "bf16_t", "BITS": "0"})
    module.launch("gemv_1", (4, 1, 1), (128, 1, 1), [x, weight, None, np.int32(8)], 1024)

The folder `CACHE` keeps each library, by a hash of everything that the library depends on.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.emulator.module import Module
from tests.emulator.nvrtc import OPTIONS, compile_code, version
from tests.emulator.ptx_translator import max_threads, translate

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "backends" / "cuda" / "kernels"
DEVICE_HEADER = (KERNELS / "device.cuh").read_text("utf-8")

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptx-emulator"
MAX_UNUSED_DAYS = 14  # then an entry of the cache is deleted

# All code uses the same instruction set: transitions between SSE and AVX are slow.
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-march=native")
CUDA_FLAGS = (
    *(*FLAGS, "-Og", "-w", "-ffp-contract=fast"),
    "-fsanitize=alignment,bounds,shift,integer-divide-by-zero",  # fibers.cpp handles the calls
)
PTX_FLAGS = (*FLAGS, "-Og", "-w", "-ffp-contract=off")
BOUNDS = r"(?:__launch_bounds__\s*\(([^;{]*?)\)\s*)?"
KERNEL = re.compile(rf'extern\s*"C"\s*__global__\s*{BOUNDS}void\s*{BOUNDS}(\w+)\s*\(([^)]*)\)')
COMMENT = re.compile(r"//[^\n]*")

# The architecture of the PTX path, for example "sm_90"; empty for the g++ path.
_architecture = os.environ.get("GPTX_PTX", "")


@contextmanager
def compiled_by(architecture: str) -> Iterator[None]:
    """Select the PTX path for an architecture such as "sm_90", or the g++ path ("")."""
    global _architecture
    before, _architecture = _architecture, architecture
    try:
        yield
    finally:
        _architecture = before


def compile_module(files: Sequence[str | Path], macros: Mapping[str, str]) -> Module:
    """Compile files of `backends/cuda/kernels` as one text; see `compile_text`."""
    paths = [KERNELS / file for file in files]
    texts = (f'#line 1 "{path.name}"\n{path.read_text("utf-8")}' for path in paths)
    return compile_text("\n".join(texts), macros)


def compile_text(text: str, macros: Mapping[str, str]) -> Module:
    """Compile CUDA C++ that uses the declarations of `device.cuh`.

    Raises
    ------
    AssertionError
        The compiler reports an error; the message is the compiler's.
    """
    if sys.platform != "linux":
        pytest.skip("the CUDA emulator requires Linux")
    used = ((name, x) for name, x in sorted(macros.items()) if re.search(rf"\b{name}\b", text))
    return _compile(text, tuple(used), _architecture)


@functools.cache
def _compile(text: str, macros: tuple[tuple[str, str], ...], architecture: str) -> Module:
    build = Build(text, [f"-D{name}={value}" for name, value in macros], architecture)
    return Module(build.library, separate_kernels=bool(architecture))


class Build:
    """One text of kernels and its libraries in the cache.

    Parameters
    ----------
    defines
        Options -DNAME=VALUE of the compilers.
    architecture
        The architecture that NVRTC compiles for; empty on the g++ path.
    """

    def __init__(self, text: str, defines: Sequence[str], architecture: str) -> None:
        self.text, self.defines, self.architecture = text, defines, architecture
        self.flags = PTX_FLAGS if architecture else CUDA_FLAGS
        nvrtc = (version(), DEVICE_HEADER) if architecture else ()
        self.key = _key(*self.flags, *defines, architecture, *nvrtc, text)

    def library(self, kernel: str) -> Path:
        """Return the shared library of one kernel, or of "all"; build it if it is missing.

        The PTX of a kernel is long, so the PTX path builds each kernel when a test launches it.
        """

        def build(target: Path) -> None:
            runtime, folder = _runtime(self.flags), self._sources
            include = ["-I", str(runtime), "-I", str(HERE)]
            options = [*self.flags, *include, *self.defines, f"-DKERNEL_{kernel}"]
            _run([_compiler(), *options, "-c", "module.cpp", "-o", f"{kernel}.o"], folder)
            objects = [f"{kernel}.o", *map(str, sorted(runtime.glob("*.o")))]
            _run([_compiler(), "-shared", *objects, "-o", str(target)], folder)

        return _cached(f"{self.key}/{kernel}.so", build)

    @functools.cached_property
    def _sources(self) -> Path:
        """A temporary folder with module.cpp, the translation unit of all kernels."""
        folder = Path(_temporary().name) / self.key
        folder.mkdir()
        (folder / "kernels.cu").write_text(self.text, "utf-8")
        preprocess = [_compiler(), "-E", "-P", "-x", "c++", *self.defines, "kernels.cu"]
        heads = KERNEL.findall(_run(preprocess, folder))
        bounds = {name: before or after for before, after, name, _ in heads}
        if self.architecture:
            options = [*OPTIONS, f"-arch={self.architecture}", *self.defines]
            ptx, log = compile_code(DEVICE_HEADER + self.text, options)
            assert ptx, log
            parameters = {name: declared for *_, name, declared in heads}
            translated = '#include "ptx_instructions.h"\n' + translate(ptx, parameters)
            (folder / "kernels.cu").write_text(translated)
            bounds |= max_threads(ptx)
        kernels = "".join(f" KERNEL({name}{', ' * bool(n)}{n})" for name, n in bounds.items())
        # An unnamed namespace: the linker would merge the __shared__ variables of templates.
        (folder / "module.cpp").write_text(
            '#include "cuda.h"\n#include "race_detector.h"\n'
            'namespace {\n#include "device.h"\n#include "kernels.cu"\n}\n'
            f'#define KERNELS{kernels}\n#include "kernel_table.h"\n'
        )
        return folder


def _runtime(flags: tuple[str, ...]) -> Path:
    """Return a folder with the precompiled cuda.h and the objects that each library contains."""

    def build(folder: Path) -> None:
        folder.mkdir()
        header = [str(HERE / "cuda.h"), "-o", str(folder / "cuda.h.gch")]
        _run([_compiler(), *flags, "-x", "c++-header", *header], folder)
        for name in ("fibers", "race_detector"):
            files = [str(HERE / f"{name}.cpp"), "-o", str(folder / f"{name}.o")]
            _run([_compiler(), *FLAGS, "-O3", "-c", *files], folder)

    return _cached(f"{_key(*flags)}/runtime", build)


@functools.cache
def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None and not os.environ.get("CI"):
        pytest.skip("g++ is missing: the CUDA emulator compiles kernels with it")
    assert compiler, "g++ is missing in CI"
    return compiler


@functools.cache
def _common_key() -> str:
    """Return a hash of the compiler, the processor's instruction set and the emulator's sources."""
    probe = [_compiler(), "-march=native", "-E", "-v", "-x", "c++", os.devnull]
    target = subprocess.run(probe, capture_output=True, encoding="utf-8").stderr
    sources = sorted({*HERE.glob("*.h"), *HERE.glob("*.cpp"), *HERE.glob("ptx_translator.py")})
    return _digest(target, str(HERE), *(path.read_text("utf-8") for path in sources))


def _key(*texts: str) -> str:
    return _digest(_common_key(), *texts)


def _digest(*texts: str) -> str:
    """Hash texts without their comments."""
    return hashlib.sha256("\0".join(COMMENT.sub("", x) for x in texts).encode()).hexdigest()[:32]


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return a file or folder of the cache; one process builds it, others wait for that one."""
    _prune()
    path = CACHE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            build(unfinished)
            unfinished.rename(path)
    return path


@functools.cache
def _prune() -> None:
    """Delete the entries of the cache that no process has used lately."""
    for lock in CACHE.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > MAX_UNUSED_DAYS * 24 * 3600:
            shutil.rmtree(lock.parent, ignore_errors=True)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gptx-emulator-")


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout
