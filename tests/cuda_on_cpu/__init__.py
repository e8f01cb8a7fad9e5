"""CUDA kernels on the CPU: the text that NVRTC compiles, compiled by g++ against `device.h`.

    module = compile_module(["linear.cu"], {"REAL": "bf16_t", "BITS": "0"})
    module.launch("linear_1", (4, 1, 1), (128, 1, 1), [x, weight, None, np.int32(8)], 1024)

A fault of a kernel (see `fibers.cpp`) is an AssertionError that names it.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuda_on_cpu.memory import Copy, find, guarded

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "backends" / "cuda"
# All with the same instructions: it is slow to go to and fro between old and new ones.
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-march=native"]
KERNEL_FLAGS = [
    *(*FLAGS, "-Og", "-w", "-ffp-contract=fast"),
    "-fsanitize=alignment,bounds,shift,integer-divide-by-zero",  # fibers.cpp has what this calls
]
BOUNDS = r"(?:__launch_bounds__\s*\(([^;{]*?)\)\s*)?"
KERNEL = re.compile(rf'extern\s*"C"\s*__global__\s*{BOUNDS}void\s*{BOUNDS}(\w+)\s*\(')
LOCK = threading.Lock()  # a module runs one launch at a time


def compile_module(files: Sequence[str | Path], macros: Mapping[str, str]) -> Module:
    """Compile files (of `backends/cuda`, or by a path) as one text; see `compile_text`."""
    paths = [KERNELS / file for file in files]
    return compile_text(
        "\n".join(f'#line 1 "{path.name}"\n{path.read_text()}' for path in paths), macros
    )


def compile_text(text: str, macros: Mapping[str, str]) -> Module:
    """Compile a text of CUDA C++ that uses what `backends/cuda/device.cuh` declares.

    Raises
    ------
    AssertionError
        What the compiler says.
    """
    return _compile(text, tuple(sorted(macros.items())))


@functools.cache
def _compile(text: str, macros: tuple[tuple[str, str], ...]) -> Module:
    if sys.platform != "linux":
        pytest.skip("the emulator of CUDA needs Linux")
    compiler = shutil.which("g++")
    if compiler is None and not os.environ.get("CI"):
        pytest.skip("g++ is not there, which compiles the CUDA kernels for the CPU")
    assert compiler, "CI has no g++"
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    (folder / "kernels.cu").write_text(text)
    defines = [f"-D{name}={value}" for name, value in macros]
    plain = _run([compiler, "-E", "-P", "-x", "c++", *defines, "kernels.cu"], folder)
    if plain in _modules:  # the macros differ, but not what they make of it
        return _modules[plain]
    rows = "".join(
        f" KERNEL({name}{', ' if before or after else ''}{before or after})"
        for before, after, name in KERNEL.findall(plain)
    )
    # An unnamed namespace keeps the linker from merging the __shared__ variables of templates.
    (folder / "module.cpp").write_text(
        '#include "cuda.h"\n'
        'namespace {\n#include "device.h"\n#include "kernels.cu"\n}\n'
        f'#define KERNELS{rows}\n#include "table.h"\n'
    )
    shared = _shared(compiler)
    include = ["-I", str(shared), "-I", str(HERE)]
    _run([compiler, *KERNEL_FLAGS, *include, *defines, "-c", "module.cpp"], folder)
    _run([compiler, "-shared", "module.o", str(shared / "fibers.o"), "-o", "module.so"], folder)
    return _modules.setdefault(plain, Module(folder / "module.so"))


_modules: dict[str, Module] = {}


@functools.cache
def _shared(compiler: str) -> Path:
    """A folder with what every module is made with: a header, compiled, and the fibers."""
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    header = [str(HERE / "cuda.h"), "-o", str(folder / "cuda.h.gch")]
    _run([compiler, *KERNEL_FLAGS, "-x", "c++-header", *header], folder)
    fibers = [str(HERE / "fibers.cpp"), "-o", str(folder / "fibers.o")]
    _run([compiler, *FLAGS, "-O3", "-c", *fibers], folder)
    return folder


@functools.cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="gptx-cuda-on-cpu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Module:
    """The kernels of one compiled text.

    Attributes
    ----------
    kernels
        Name -> types of the parameters: NumPy's names; "*" in front for a pointer, "!*" for a
        pointer to what is only read.
    n_waits
        How many threads have called `wait_for_previous` so far.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.describe_kernels.restype = ctypes.c_char_p
        self._library.launch.restype = ctypes.c_char_p
        lines = self._library.describe_kernels().decode().splitlines()
        self.kernels = {name: types for name, *types in (line.split() for line in lines)}

    @property
    def n_waits(self) -> int:
        """See above."""
        return ctypes.c_ulonglong.in_dll(self._library, "n_waits").value

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        seed: int = 1,
    ) -> None:
        """Run a kernel to its end.

        Parameters
        ----------
        args
            Contiguous arrays, NumPy scalars and None (a null pointer), of the types that the kernel
            has. It works on copies of the arrays that end where no memory is; what it may write to
            is copied back.
        shared_bytes
            Of dynamic shared memory.
        seed
            Of the order in which threads run.

        Raises
        ------
        AssertionError
            The arguments do not fit, or the kernel has a fault.
        """
        self.check(name, args)
        arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
        with LOCK, guarded(arrays) as copies:
            values = [_value(arg, copies) for arg in args]
            fault = self._library.launch(
                list(self.kernels).index(name),
                (ctypes.c_uint * 3)(*grid),
                (ctypes.c_uint * 3)(*block),
                ctypes.c_size_t(shared_bytes),
                (ctypes.c_void_p * len(args))(*(value.ctypes.data for value in values)),
                ctypes.c_uint(seed),
            )
            assert not fault, explain(fault.decode(), args, copies)
            for arg, wanted in zip(args, self.kernels[name], strict=True):
                if isinstance(arg, np.ndarray):
                    copy = find(copies, arg)
                    assert copy.is_clean_around(), f"{name} writes before or behind {wanted}"
                    if not wanted.startswith("!"):
                        copy.copy_back()

    def check(self, name: str, args: Sequence[Any]) -> None:
        """Whether the arguments have the types of the kernel's parameters; an AssertionError."""
        assert name in self.kernels, f"no kernel {name!r} among {', '.join(self.kernels)}"
        types = self.kernels[name]
        assert len(args) == len(types), f"{name} takes {len(types)} arguments, not {len(args)}"
        for i, (arg, wanted) in enumerate(zip(args, types, strict=True)):
            where = f"{name}, argument {i}: {wanted} wanted"
            if "*" not in wanted:
                assert isinstance(arg, np.generic), f"{where}, not {type(arg).__name__}"
                assert arg.dtype.name == wanted, f"{where}, not {arg.dtype.name}"
            elif arg is not None:
                assert isinstance(arg, np.ndarray), f"{where}, not {type(arg).__name__}"
                contiguous = arg.flags.c_contiguous or arg.flags.f_contiguous
                assert contiguous, f"{where}, in one piece"
                fits = wanted.endswith(("*void", f"*{arg.dtype.name}"))
                assert fits, f"{where}, not an array of {arg.dtype.name}"


def _value(arg: Any, copies: Sequence[Copy]) -> np.ndarray:
    """What the kernel is given, in memory: a number, or an address."""
    if arg is None:
        return np.zeros(1, np.uint64)
    if isinstance(arg, np.ndarray):
        copy = find(copies, arg)
        arg = np.uint64(copy.address + arg.ctypes.data - copy.start)
    return np.array([arg])


def explain(fault: str, args: Sequence[Any], copies: Sequence[Copy]) -> str:
    """Say of an address where no array is how far it is from an argument's."""
    found = re.search("no array is at address (0x[0-9a-f]+|0)", fault)
    near = []
    for i, arg in enumerate(args if found else ()):
        if isinstance(arg, np.ndarray):
            copy = find(copies, arg)
            distance = int(found[1], 16) - copy.address - arg.ctypes.data + copy.start
            if -mmap.PAGESIZE < distance < arg.nbytes + mmap.PAGESIZE:
                near.append(f"byte {distance} of the {arg.nbytes} of argument {i}")
    return f"{fault} ({', '.join(near) or 'near no argument'})" if found else fault
