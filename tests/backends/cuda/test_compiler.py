"""The CUDA kernels compile for the GPUs that they are meant for, as CuPy compiles them, by NVRTC.

No GPU is needed for that, only the wheel `nvidia-cuda-nvrtc`.
"""

from __future__ import annotations

import itertools
import locale
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulator import cupy_stand_in as cupy_on_cpu
from tests.emulator.nvrtc import OPTIONS, compile_code, nvrtc

FOLDER = Path(__file__).resolve().parents[3] / "backends" / "cuda" / "kernels"
FILES = sorted(path.name for path in FOLDER.glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90"]


def variants(file: str) -> tuple[str, list[tuple[str, ...]]]:
    """The source of one file, and each set of macros that the backend compiles it with."""
    with cupy_on_cpu.installed():
        from gptx.backends.cuda.compiler import TYPES, Kinds, source
    code = source(file)
    kinds = [
        Kinds(dtype, cache_dtype, bits=bits, group=64 if bits else 0)
        for dtype, bits in itertools.product(TYPES, (0, 8, 4))
        for cache_dtype in (dtype, "float16")
    ]
    return code, sorted({k.macros(code) for k in kinds})


def test_sources_are_read_after_nvrtc_has_set_the_locale() -> None:
    """As that of CUDA 12 does, to "C", in which text is ASCII to Python before 3.15."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        texts = [variants(file)[0] for file in FILES]
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert not "".join(texts).isascii()


@pytest.mark.parametrize("file", FILES)
def test_kernels_compile_for_their_devices(file: str) -> None:
    code, sets = variants(file)
    always = [*OPTIONS, "--Ofast-compile=max"]  # the last is not CuPy's: it takes half of the time
    nvrtc()  # is there, or the test is skipped

    def complaint(macros: tuple[str, ...], architecture: str) -> str:
        _, log = compile_code(code, [*always, f"-arch={architecture}", *macros])
        return log and f"{file} for {architecture} with {' '.join(macros)}: {log}"

    with ThreadPoolExecutor(2) as pool:
        complaints = list(pool.map(complaint, sets, itertools.cycle(ARCHITECTURES)))
    assert "".join(complaints) == ""


def test_what_does_not_compile_is_told() -> None:
    assert "nonsense" in compile_code("nonsense;", ["-arch=sm_90"])[1]
    unused = "__global__ void f() { int unused; }"
    assert "unused" in compile_code(unused, ["-arch=sm_90"])[1]
