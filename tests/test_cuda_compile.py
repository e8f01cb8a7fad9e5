"""The CUDA kernels compile for the GPUs that they are meant for, as CuPy compiles them, by NVRTC.

No GPU is needed for that, only the wheel `nvidia-cuda-nvrtc`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cupy_on_cpu
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "backends" / "cuda"
FILES = sorted(path.name for path in FOLDER.glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90"]
LIBRARY = re.compile(r"libnvrtc\.so[.\d]*|nvrtc64_\d+_0\.dll")


@pytest.fixture(scope="module")
def nvrtc() -> ctypes.CDLL:
    """NVRTC from its wheel, which has other names for each version of CUDA."""
    for distribution in importlib.metadata.distributions():
        if distribution.name.startswith("nvidia-cuda-nvrtc"):
            for file in distribution.files or ():
                if LIBRARY.fullmatch(file.name):
                    return ctypes.CDLL(str(file.locate()))
    assert not os.environ.get("CI"), "CI has no NVRTC"
    pytest.skip("NVRTC is not there: pip install nvidia-cuda-nvrtc")


def compile_code(nvrtc: ctypes.CDLL, code: str, options: list[str]) -> str:
    """What the compiler says, nothing if it has no complaint."""
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"", 0, None, None)
    assert created == 0
    failed = nvrtc.nvrtcCompileProgram(program, len(options), texts)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode() or f"error {failed}" * bool(failed)


def variants(file: str) -> tuple[str, list[tuple[str, ...]]]:
    """The source of one file, and each set of macros that the backend compiles it with."""
    with cupy_on_cpu.installed():
        from gptx.backends.cupy_kernels import TYPES, Kinds, source
    code = source(file)
    kinds = [
        Kinds(dtype, cache_dtype, bits=bits, group=64 if bits else 0)
        for dtype, bits in itertools.product(TYPES, (0, 8, 4))
        for cache_dtype in (dtype, "float16")
    ]
    return code, sorted({k.macros(code) for k in kinds})


@pytest.mark.parametrize("file", FILES)
def test_kernels_compile_for_their_devices(file: str, nvrtc: ctypes.CDLL) -> None:
    code, sets = variants(file)
    # As CuPy does, but for the last, which takes half of the time.
    always = ["-std=c++17", "-ftz=true", "--device-as-default-execution-space"]
    always.append("--Ofast-compile=max")

    def complaint(macros: tuple[str, ...], architecture: str) -> str:
        log = compile_code(nvrtc, code, [*always, f"-arch={architecture}", *macros])
        return log and f"{file} for {architecture} with {' '.join(macros)}: {log}"

    with ThreadPoolExecutor(2) as pool:
        complaints = list(pool.map(complaint, sets, itertools.cycle(ARCHITECTURES)))
    assert "".join(complaints) == ""


def test_what_does_not_compile_is_told(nvrtc: ctypes.CDLL) -> None:
    assert "nonsense" in compile_code(nvrtc, "nonsense;", ["-arch=sm_90"])
    assert "unused" in compile_code(nvrtc, "__global__ void f() { int unused; }", ["-arch=sm_90"])
