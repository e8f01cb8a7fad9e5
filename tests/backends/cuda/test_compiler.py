"""NVRTC compiles the CUDA kernels for the supported architectures; no GPU is needed."""

from __future__ import annotations

import itertools
import locale
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.emulator import KERNELS, cupy_stand_in
from tests.emulator.nvrtc import OPTIONS, compile_code, load_nvrtc

FILES = sorted(path.name for path in KERNELS.glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90"]


def variants(file: str) -> tuple[str, list[tuple[str, ...]]]:
    """Return the source of a module, and each set of options that the backend compiles it with."""
    with cupy_stand_in.installed():
        from gptx.backends.cuda.compiler import CUDA_TYPES, KernelVariant, source
    code = source(file)
    all_variants = [
        KernelVariant(dtype, cache_dtype, bits=bits, group_size=64 if bits else 0)
        for dtype, bits in itertools.product(CUDA_TYPES, (0, 8, 4))
        for cache_dtype in (dtype, "float16")
    ]
    return code, sorted({variant.options(code) for variant in all_variants})


def test_sources_are_read_in_the_locale_c() -> None:
    """NVRTC of CUDA 12 sets this locale; Python before 3.15 then reads text as ASCII."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        texts = [variants(file)[0] for file in FILES]
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert not "".join(texts).isascii()


@pytest.mark.ptx
@pytest.mark.parametrize("file", FILES)
def test_kernels_compile_without_warnings(file: str) -> None:
    code, sets = variants(file)
    always = [*OPTIONS, "--Ofast-compile=max"]  # the last one halves the time
    load_nvrtc()  # skips the test in this thread if it is missing

    def complaint(macros: tuple[str, ...], architecture: str) -> str:
        _, log = compile_code(code, [*always, f"-arch={architecture}", *macros])
        return log and f"{file} for {architecture} with {' '.join(macros)}: {log}"

    with ThreadPoolExecutor(2) as pool:
        complaints = list(pool.map(complaint, sets, itertools.cycle(ARCHITECTURES)))
    assert "".join(complaints) == ""


@pytest.mark.ptx
def test_errors_and_warnings_are_reported() -> None:
    assert "nonsense" in compile_code("nonsense;", ["-arch=sm_90"])[1]
    unused = "__global__ void f() { int unused; }"
    assert "unused" in compile_code(unused, ["-arch=sm_90"])[1]
