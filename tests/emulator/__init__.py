"""CUDA kernels on the CPU: the text that NVRTC compiles, compiled by g++ against `device.h`.

    module = compile_module(["gemv.cu"], {"REAL": "bf16_t", "BITS": "0"})
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.emulator import accesses
from tests.emulator.memory import Copy, find, guarded
from tests.emulator.nvrtc import OPTIONS, compile_code
from tests.emulator.ptx import max_threads, translate

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "backends" / "cuda" / "kernels"
# All with the same instructions: it is slow to go to and fro between old and new ones.
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-march=native"]
KERNEL_FLAGS = [
    *(*FLAGS, "-Og", "-w", "-ffp-contract=fast"),
    "-fsanitize=alignment,bounds,shift,integer-divide-by-zero",  # fibers.cpp has what this calls
]
PTX_FLAGS = [*FLAGS, "-Og", "-w", "-ffp-contract=off"]
BOUNDS = r"(?:__launch_bounds__\s*\(([^;{]*?)\)\s*)?"
KERNEL = re.compile(rf'extern\s*"C"\s*__global__\s*{BOUNDS}void\s*{BOUNDS}(\w+)\s*\(([^)]*)\)')
# With "sm_90", say, NVRTC compiles the kernels, and what it makes of them is what runs (`ptx.py`).
architecture = os.environ.get("GPTX_PTX", "")
DEVICE = (KERNELS / "device.cuh").read_text("utf-8")
LOCK = threading.Lock()  # a module runs one launch at a time


def compile_module(files: Sequence[str | Path], macros: Mapping[str, str]) -> Module:
    """Compile files (of `backends/cuda`, or by a path) as one text; see `compile_text`."""
    paths = [KERNELS / file for file in files]
    texts = (f'#line 1 "{path.name}"\n{path.read_text("utf-8")}' for path in paths)
    return compile_text("\n".join(texts), macros)


def compile_text(text: str, macros: Mapping[str, str]) -> Module:
    """Compile a text of CUDA C++ that uses what `backends/cuda/device.cuh` declares.

    Raises
    ------
    AssertionError
        What the compiler says.
    """
    return _compile(text, tuple(sorted(macros.items())), architecture)


@functools.cache
def _compile(text: str, macros: tuple[tuple[str, str], ...], architecture: str) -> Module:
    if sys.platform != "linux":
        pytest.skip("the emulator of CUDA needs Linux")
    compiler = shutil.which("g++")
    if compiler is None and not os.environ.get("CI"):
        pytest.skip("g++ is not there, which compiles the CUDA kernels for the CPU")
    assert compiler, "CI has no g++"
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    (folder / "kernels.cu").write_text(text, "utf-8")
    defines = [f"-D{name}={value}" for name, value in macros]
    plain = _run([compiler, "-E", "-P", "-x", "c++", *defines, "kernels.cu"], folder)
    if (plain, architecture) in _modules:  # the macros differ, but not what they make of it
        return _modules[plain, architecture]
    heads = KERNEL.findall(plain)
    bounds = {name: before or after for before, after, name, _ in heads}
    if architecture:
        ptx, log = compile_code(DEVICE + text, [*OPTIONS, f"-arch={architecture}", *defines])
        assert ptx, log
        parameters = {name: declared for *_, name, declared in heads}
        (folder / "kernels.cu").write_text('#include "ptx.h"\n' + translate(ptx, parameters))
        bounds |= max_threads(ptx)
    rows = "".join(f" KERNEL({name}{', ' * bool(n)}{n})" for name, n in bounds.items())
    # An unnamed namespace keeps the linker from merging the __shared__ variables of templates.
    (folder / "module.cpp").write_text(
        '#include "cuda.h"\n#include "races.h"\n'
        'namespace {\n#include "device.h"\n#include "kernels.cu"\n}\n'
        f'#define KERNELS{rows}\n#include "table.h"\n'
    )
    flags = PTX_FLAGS if architecture else KERNEL_FLAGS
    shared = _shared(compiler, tuple(flags))
    command = [compiler, *flags, "-I", str(shared), "-I", str(HERE), *defines]

    def build(kernel: str) -> ctypes.CDLL:
        _run([*command, f"-DKERNEL_{kernel}", "-c", "module.cpp", "-o", f"{kernel}.o"], folder)
        objects = [f"{kernel}.o", *map(str, shared.glob("*.o"))]
        _run([compiler, "-shared", *objects, "-o", f"{kernel}.so"], folder)
        return ctypes.CDLL(str(folder / f"{kernel}.so"))

    module = Module(build, one_by_one=bool(architecture))
    return _modules.setdefault((plain, architecture), module)


_modules: dict[tuple[str, str], Module] = {}


@functools.cache
def _shared(compiler: str, flags: tuple[str, ...]) -> Path:
    """A folder with what every module is made with: a header, compiled, and the fibers."""
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    header = [str(HERE / "cuda.h"), "-o", str(folder / "cuda.h.gch")]
    _run([compiler, *flags, "-x", "c++-header", *header], folder)
    for name in ("fibers", "races"):
        files = [str(HERE / f"{name}.cpp"), "-o", str(folder / f"{name}.o")]
        _run([compiler, *FLAGS, "-O3", "-c", *files], folder)
    return folder


@functools.cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="gptx-cuda-on-cpu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


class Module:
    """The kernels of one compiled text.

    What comes from NVRTC is long, and is compiled one kernel at a time, when it is launched.

    Attributes
    ----------
    kernels
        Name -> types of the parameters: NumPy's names; "*" in front for a pointer, "!*" for a
        pointer to what is only read.
    n_waits
        How many threads have called `wait_for_previous` so far.
    """

    def __init__(self, build: Callable[[str], ctypes.CDLL], one_by_one: bool) -> None:
        self._build, self._one_by_one = build, one_by_one
        self._libraries: dict[str, ctypes.CDLL] = {}
        library = self._library_of("all")
        library.describe_kernels.restype = ctypes.c_char_p
        lines = library.describe_kernels().decode().splitlines()
        self.kernels = {name: types for name, *types in (line.split() for line in lines)}

    def _library_of(self, kernel: str) -> ctypes.CDLL:
        name = kernel if self._one_by_one else "all"
        if name not in self._libraries:
            self._libraries[name] = self._build(name)
            self._libraries[name].launch.restype = ctypes.c_char_p
            self._libraries[name].count_waits.restype = ctypes.c_ulonglong
        return self._libraries[name]

    @property
    def n_waits(self) -> int:
        """See above."""
        return sum(library.count_waits() for library in self._libraries.values())

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
        types = self.kernels[name]
        arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
        with LOCK, guarded(arrays) as copies:
            values = [_value(arg, copies) for arg in args]
            library = self._library_of(name)
            room = accesses.make_room(library)
            fault = library.launch(
                list(self.kernels).index(name),
                (ctypes.c_uint * 3)(*grid),
                (ctypes.c_uint * 3)(*block),
                ctypes.c_size_t(shared_bytes),
                (ctypes.c_void_p * len(args))(*(value.ctypes.data for value in values)),
                ctypes.c_uint(seed),
            )
            if room is not None:
                at = [int(v) if "*" in t else 0 for (v,), t in zip(values, types, strict=True)]
                accesses.note(library, name, room, at)
            assert not fault, explain(fault.decode(), args, copies)
            for arg, wanted in zip(args, types, strict=True):
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
